"""The objective against an independent computation in NumPy: values and gradients, for the defaults and every alternative."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qedjax.model.transformer import Transformer
from qedjax.rl import losses
from qedjax.rl.batch import Sample, make_samples, pack
from qedjax.rl.losses import ObjectiveConfig
from qedjax.sharding import MeshConfig, create, make_mesh, put
from qedjax.testing import tiny_config
from qedjax.train.step import init_state, make_summed_step
from qedjax.types import Completion, Group, RLBatch, Rollout

NUM_VALID, TEMPERATURE, MOST = 300, 0.8, 30
CASES = {
    'reference': {}, 'ppo': {'clip_low': 0.1, 'clip_high': 0.2}, 'dual clip': {'clip_low': 0.1, 'clip_high': 0.2, 'ratio_cap': 1.1},
    'reinforce': {'loss': 'reinforce', 'clip_high': 0.2}, 'cispo': {'loss': 'cispo', 'clip_low': 0.1, 'clip_high': 0.2},
    'gspo': {'loss': 'gspo', 'clip_low': 0.05, 'clip_high': 0.05}, 'kl': {'kl_coef': 0.3}, 'entropy': {'entropy_coef': 0.5},
}


def random_groups(seed, groups=4, size=4, deviation=0.4):
    """Ragged groups of random answers, some ungraded, some cut; log-probs are made up, near those of a flat distribution."""
    rng = np.random.default_rng(seed)
    made = []
    for draw in range(groups):
        prompt = tuple(rng.integers(0, NUM_VALID, rng.integers(1, 8)).tolist())
        rollouts = []
        for _ in range(size):
            ids = tuple(rng.integers(0, NUM_VALID, rng.integers(1, MOST)).tolist())
            logprobs = tuple((-np.log(NUM_VALID) + deviation * rng.normal(size=len(ids))).tolist())
            reward = None if rng.random() < 0.15 else float(rng.integers(0, 8)) / 7
            completion = Completion('', ids, logprobs, 'length' if rng.random() < 0.3 else 'stop', prompt, ((draw, len(ids)),))
            rollouts.append(Rollout(completion, 'x', reward))
        made.append(Group(draw, '', tuple(rollouts)))
    return made


def token_terms(cfg, new, old, entropy, reference, advantage):
    """The objective of the tokens of one answer, from section 3.5 of the recipe and the papers, in float64."""
    rho = np.exp(new - old)
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    if cfg.loss == 'gspo':
        rho = np.full_like(rho, np.exp(np.mean(new - old)))
    surrogate = np.minimum(rho * advantage, np.clip(rho, low, high) * advantage)
    if cfg.ratio_cap and advantage < 0:
        surrogate = np.maximum(surrogate, cfg.ratio_cap * advantage)
    if cfg.loss == 'reinforce':
        surrogate = new * advantage * np.clip(rho, 0, high)
    if cfg.loss == 'cispo':
        surrogate = new * advantage * np.clip(rho, low, high)
    d = np.clip(reference - new, -5, 5)
    return surrogate - cfg.kl_coef * (np.exp(d) - d - 1) + cfg.entropy_coef * entropy


def policy(model, sample):
    """Log-probs and entropies of a sample's sampled ids from whole logits, in float64."""
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(sample)] = sample.prompt + sample.ids
    logits = np.asarray(logits_of(model, ids), np.float64)[0, :, :NUM_VALID] / TEMPERATURE
    logprobs = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True)) - logits.max(-1, keepdims=True)
    seen = slice(len(sample.prompt) - 1, len(sample.prompt) + len(sample.ids) - 1)
    chosen = logprobs[seen][np.arange(len(sample.ids)), list(sample.ids)]
    return chosen, -np.sum(np.exp(logprobs[seen]) * logprobs[seen], -1)


@jax.jit
def logits_of(model, ids):
    return model.logits(model(ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)))


@pytest.fixture(scope='module')
def model():
    return create(lambda: Transformer(tiny_config(init_std=0.05), jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))


@functools.partial(jax.jit, static_argnums=2)
def loss_of(model, batches, cfg):
    return sum(losses.rl_loss(model, batch, cfg, TEMPERATURE, NUM_VALID)[0] for batch in batches)


@pytest.mark.parametrize('case', CASES)
def test_the_loss_is_its_formula(model, mesh, case):
    cfg = ObjectiveConfig(**CASES[case])
    samples = make_samples(random_groups(1), cfg, MOST)
    batches = [place(batch) for batch in pack(samples, 96, 2)]
    references = [dataclasses.replace(b, references=jnp.where(b.weights > 0, b.logprobs + 0.2, 0)) for b in batches]
    got = float(loss_of(model, references, cfg))
    want = 0.0
    for sample in samples:
        (new, entropy), old = policy(model, sample), np.array(sample.logprobs)
        want -= sample.weight * np.sum(token_terms(cfg, new, old, entropy, old + 0.2, sample.advantage))
    assert got == pytest.approx(want, abs=1e-6, rel=1e-5)


@pytest.mark.parametrize('case', ['ppo', 'dual clip', 'kl'])
def test_gradients_are_those_of_the_values(case):
    """By finite differences, of a function of the log-probs alone; these losses are their own surrogates."""
    cfg, rng = ObjectiveConfig(**CASES[case]), np.random.default_rng(0)
    old, advantage = jnp.asarray(rng.normal(size=40) * 0.1, jnp.float32), jnp.asarray(rng.normal(size=40), jnp.float32)

    def value(new):
        surrogate = losses.ppo(new, old, advantage, cfg.clip_low, cfg.clip_high, cfg.ratio_cap)
        return jnp.sum(surrogate - cfg.kl_coef * losses.kl(new, old + 0.2))

    check_grads(value, (old + jnp.asarray(rng.normal(size=40) * 0.3, jnp.float32),), order=1, modes=['rev'], atol=2e-2, rtol=2e-2)


def test_gradients_of_the_other_losses(mesh):
    """d/dl in closed form: the weight is a constant for REINFORCE and CISPO; for GSPO the ratio moves as one token's."""
    rng = np.random.default_rng(0)
    old, advantage = rng.normal(size=(1, 12)) * 0.1, rng.normal(size=(1, 12))
    advantage[:, :5], advantage[:, 5:] = advantage[0, 0], advantage[0, 5]
    new = old + rng.normal(size=old.shape) * 0.3
    arrays = [jnp.asarray(x, jnp.float32) for x in (new, old, advantage)]
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    batch = RLBatch(segments, segments, jnp.ones((1, 12)), segments, segments, arrays[2], arrays[1], arrays[1])
    rho = np.exp(new - old)
    answer = np.exp(np.concatenate([np.full(5, np.mean((new - old)[0, :5])), np.full(7, np.mean((new - old)[0, 5:]))]))[None]
    inside = np.where(advantage > 0, answer <= 1.2, answer >= 0.9)
    cases = {
        'reinforce': (lambda l, o, a: losses.reinforce(l, o, a, 0.2), advantage * np.minimum(rho, 1.2)),
        'cispo': (lambda l, o, a: losses.cispo(l, o, a, 0.1, 0.2), advantage * np.clip(rho, 0.9, 1.2)),
        'gspo': (lambda l, o, a: losses.gspo(l, o, a, lambda x: losses.answer_means(x, batch), 0.1, 0.2), advantage * answer * inside)}
    for name, (loss, want) in cases.items():
        got = jax.grad(lambda l, loss=loss: loss(l, *arrays[1:]).sum())(arrays[0])
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def place(batch, mesh=None):
    return put(batch, mesh or jax.sharding.get_mesh(), 'batch', 'sequence')


SHAPES = {'short rows': (MeshConfig(fsdp=1), 64, 1), 'long rows': (MeshConfig(fsdp=1), 160, 2),
          'fsdp and tensor': (MeshConfig(fsdp=4, tensor=2), 64, 4), 'context too': (MeshConfig(fsdp=2, context=2, tensor=2), 96, 2)}


@pytest.fixture(scope='module')
def whole():
    """Gradients of each case on one device."""
    return functools.cache(lambda case: gradients(ObjectiveConfig(**CASES[case]), random_groups(2), MeshConfig(fsdp=1), 96, 2))


@pytest.mark.parametrize(('case', 'shape'), [('reference', 'short rows'), ('gspo', 'long rows'), ('reference', 'fsdp and tensor'),
                                             ('kl', 'context too'), ('gspo', 'context too')])
def test_one_step_does_not_depend_on_packing_micro_batches_order_or_devices(whole, case, shape):
    got = gradients(ObjectiveConfig(**CASES[case]), random_groups(2)[::-1], *SHAPES[shape])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole(case)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def gradients(cfg, groups, shape, row_length, rows):
    """The gradient of a step, as what plain SGD at rate 1 takes away, and its metrics' sums."""
    import optax

    mesh = make_mesh(shape, jax.devices()[: shape.fsdp * shape.tensor * shape.context])
    step = make_summed_step(functools.partial(losses.rl_loss, cfg=cfg, temperature=TEMPERATURE, num_valid=NUM_VALID),
                            optax.scale(-1.0), 0.0, 0)
    state = create(lambda: init_state(Transformer(tiny_config(init_std=0.05), jax.random.key(0)), optax.scale(-1.0)), mesh)
    before = jax.device_get(state.model)
    with jax.set_mesh(mesh):
        batches = [place(b, mesh) for b in pack(make_samples(groups, cfg, MOST), row_length, rows)]
        state, metrics = step(state, batches)
    after = jax.device_get(state.model)
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), before, after), {
        name: float(metrics[name]) / 1000 for name in ('tokens', 'ratio', 'entropy', 'loss')}


def test_no_gradient_reaches_prompts_padding_or_equal_rewards(model, mesh):
    cfg = ObjectiveConfig(entropy_coef=0.0)
    equal = [dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, reward=0.35) for r in g.rollouts)) for g in random_groups(3)]
    batches = [place(b) for b in pack(make_samples(equal, cfg, MOST), 96, 2)]
    grads = jax.grad(loss_of)(model, batches, cfg)
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))


def test_means_of_the_metrics():
    got = losses.summarise({'tokens': 4.0, 'ratio': 4.0, 'ratio_squared': 8.0, 'log_ratio': 2.0, 'clipped': 1.0, 'entropy': 6.0, 'kl': 0.0})
    assert (got['ratio'], got['ess'], got['clipped'], got['entropy']) == (1.0, 0.5, 0.25, 1.5)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'loss': 'grpo'}, "objective.loss is 'grpo'; choose one of ppo"), ({'clip_low': -1}, 'objective.clip_low is -1'),
    ({'ratio_cap': 0.5}, 'must exceed 1'), ({'overlong': 'shaped'}, 'needs objective.overlong_buffer'),
    ({'kl_coef': float('nan')}, 'objective.kl_coef is nan')])
def test_objectives_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        losses.validate(ObjectiveConfig(**changes))


def test_a_sample_has_one_logprob_an_id():
    with pytest.raises(ValueError, match='3 ids, 2 log-probs'):
        Sample((1, 2), (3, 4, 5), (0.0,) * 2, 1.0, 1.0)
    with pytest.raises(ValueError, match='5 tokens, but a row holds 4'):
        pack([Sample((1, 2), (3, 4, 5), (0.0,) * 3, 1.0, 1.0)], 4, 1)
