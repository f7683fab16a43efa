"""The plain sampler: greedy equals recomputation, seeded streams depend on nothing else, log-probs equal the trainer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qedjax.model.transformer import Transformer
from qedjax.rollout.static import generate
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_config
from qedjax.train.lm_head import token_stats
from qedjax.types import SamplingParams

NUM_VALID = 300


@pytest.fixture(scope='module')
def model():
    """A tiny model whose head is scaled up, so that its distributions are far from flat. The mesh stays in force."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(0)), mesh)
    with jax.set_mesh(mesh):
        yield model


@pytest.fixture(scope='module')
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, NUM_VALID, n).tolist() for n in (1, 5, 63, 64, 65, 7)]


def padded(ids):
    """Rows of one length, so that every prompt shares one compilation: tokens, positions, segment ids [1, 96]."""
    row = np.zeros((1, 96), np.int32)
    row[0, : len(ids)] = ids
    return row, np.arange(96, dtype=np.int32)[None], (np.arange(96) < len(ids)).astype(np.int32)[None]


@jax.jit
def forward_logprobs(model, tokens, positions, segments):
    return jax.nn.log_softmax(model.logits(model(tokens, positions, segments))[0, :, :NUM_VALID])


def next_logprobs(model, ids):
    """Log-probs [T, num_valid] of the token after each position, by one full forward."""
    return np.asarray(forward_logprobs(model, *padded(ids)))[: len(ids)]


def test_greedy_equals_recomputation_from_scratch(model, prompts):
    params = [SamplingParams(temperature=0, max_tokens=6)] * len(prompts)
    for prompt, (ids, logprobs, reason) in zip(prompts, generate(model, prompts, params, num_valid=NUM_VALID, batch=4), strict=True):
        table = next_logprobs(model, [*prompt, *ids])[len(prompt) - 1 : -1]
        assert ids == tuple(table.argmax(-1).tolist())
        np.testing.assert_allclose(logprobs, table.max(-1), atol=2e-5)
        assert (len(ids), reason) == (6, 'length')


@pytest.mark.parametrize('temperature', [0.6, 1.0, 1.5])
def test_logprobs_are_those_of_the_trainer(model, prompts, temperature):
    params = [SamplingParams(temperature=temperature, max_tokens=12, seed=i) for i in range(len(prompts))]

    @jax.jit
    def trainer(model, tokens, positions, segments):
        x = model(tokens, positions, segments)
        return token_stats(x, model.head, jnp.roll(tokens, -1, axis=1), num_valid=NUM_VALID, temperature=temperature).logprob[0]

    for prompt, (ids, logprobs, _) in zip(prompts, generate(model, prompts, params, num_valid=NUM_VALID), strict=True):
        want = np.asarray(trainer(model, *padded([*prompt, *ids])))[len(prompt) - 1 :][: len(ids)]
        np.testing.assert_allclose(logprobs, want, atol=1e-5)


def test_a_seeded_stream_depends_on_seed_sample_and_position_alone(model, prompts):
    params = SamplingParams(temperature=1.0, max_tokens=8, seed=42)
    alone = generate(model, prompts[:1], [params], num_valid=NUM_VALID, batch=1)[0][0]
    others = [SamplingParams(temperature=0.7, max_tokens=5, seed=i) for i in range(5)]
    for order in (slice(None), slice(None, None, -1)):
        crowd = generate(model, [*prompts[1:], prompts[0]][order], [*others, params][order], num_valid=NUM_VALID, batch=3)
        assert crowd[order][-1][0] == alone
    copies = generate(model, [prompts[0]] * 8, [params] * 8, num_valid=NUM_VALID, samples=range(8))
    assert copies[0][0] == alone
    assert len({c[0] for c in copies}) == 8


@pytest.mark.slow
def test_every_mesh_gives_the_same_ids(model, prompts):
    params = [SamplingParams(temperature=i % 2, max_tokens=6, seed=i) for i in range(len(prompts))]
    want = [r[0] for r in generate(model, prompts, params, num_valid=NUM_VALID, batch=8)]
    for mesh in (make_rollout_mesh(2, 2), make_mesh(MeshConfig(fsdp=4, tensor=2))):
        with jax.set_mesh(mesh):
            moved = create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(0)), mesh)
            assert [r[0] for r in generate(moved, prompts, params, num_valid=NUM_VALID, batch=8)] == want


def test_stop_ids_end_a_row_and_are_kept(model, prompts):
    free = generate(model, prompts, [SamplingParams(temperature=0, max_tokens=6)] * 6, num_valid=NUM_VALID)
    stops = [r[0][3] for r in free]
    params = [SamplingParams(temperature=0, max_tokens=6, stop_ids=(NUM_VALID - 1, stop)) for stop in stops]
    for (ids, logprobs, reason), (want, _, _), stop in zip(generate(model, prompts, params, num_valid=NUM_VALID), free, stops, strict=True):
        assert ids == want[: want.index(stop) + 1]
        assert (len(logprobs), reason) == (len(ids), 'stop')


@pytest.mark.parametrize(('prompt', 'params', 'message'), [
    ([], SamplingParams(), 'prompt 0 is empty'),
    ([1] * 4000, SamplingParams(max_tokens=97), '4000 tokens and asks for 97 more, but the model has 4096 positions'),
    ([1], SamplingParams(max_tokens=0), 'asks for max_tokens=0'),
    ([1], SamplingParams(seed=2**32), 'asks for seed=4294967296'),
    ([1], SamplingParams(top_k=3), 'asks for more than temperature'),
    ([300], SamplingParams(), r'has ids outside \[0, 300\)'),
    ([1], SamplingParams(temperature=-1.0), 'asks for temperature=-1.0'),
    ([1], SamplingParams(temperature=float('nan')), 'asks for temperature='),
    ([1], SamplingParams(temperature=1e-40), 'asks for temperature='),
    ([1], SamplingParams(temperature=float('inf')), 'asks for temperature=')])
def test_requests_that_cannot_be_served_are_refused(model, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt], [params], num_valid=NUM_VALID)


def test_a_model_that_breaks_reports_an_error(model):
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    assert generate(broken, [[1, 2]], [SamplingParams()], num_valid=NUM_VALID)[0] == ((), (), 'error')
