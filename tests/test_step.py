"""The compiled train step: accumulation, sharding and normalisation change nothing; bad steps change nothing either."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import random_batch, tiny_config
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from qedjax.train.step import init_state, make_eval_step, make_train_step, place_batch
from qedjax.types import TrainBatch

LOSS = functools.partial(next_token_loss, num_valid=300)
SGD = OptimizerConfig(name='sgd', learning_rate=0.1, schedule='constant', warmup_fraction=0, clip_norm=0)


def run_steps(batches, optimizer=SGD, mesh_config=None, devices=1, accumulation=1, **model_changes):
    """Final state and the metrics of each step, on the host."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
    cfg = tiny_config(**model_changes)
    with jax.set_mesh(mesh):
        tx = make_optimizer(optimizer, len(batches))
        state = create(lambda: init_state(Transformer(cfg, jax.random.key(0)), tx), mesh)
        step = make_train_step(LOSS, tx, optimizer.clip_norm, 1)
        history = []
        for batch in batches:
            state, metrics = step(state, place_batch(batch, mesh, accumulation))
            history.append(jax.tree.map(np.asarray, metrics))
        return jax.tree.map(np.asarray, state), history


def assert_same_run(got, want, rtol=2e-5):
    for (state, history), (want_state, want_history) in [(got, want)]:
        for metrics, want_metrics in zip(history, want_history, strict=True):
            for name in want_metrics:
                np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=rtol, err_msg=name)
        for leaf, want_leaf in zip(jax.tree.leaves(state.model), jax.tree.leaves(want_state.model), strict=True):
            np.testing.assert_allclose(leaf, want_leaf, rtol=rtol, atol=1e-6)


@pytest.fixture(scope='module')
def batches():
    """Two batches of 8 rows with very unequal numbers of trained tokens a row, one row without any."""
    made = [random_batch(seed, rows=8, length=32) for seed in range(2)]
    for batch in made:
        batch.weights[0] = 0
        batch.weights[1, 3:] = 0
    return made


@pytest.fixture(scope='module')
def one_device(batches):
    return run_steps(batches)


@pytest.mark.parametrize('accumulation', [2, 4, 8])
def test_accumulation_changes_nothing(batches, one_device, accumulation):
    assert_same_run(run_steps(batches, accumulation=accumulation), one_device)


@pytest.mark.parametrize(('mesh_config', 'accumulation'), [
    (MeshConfig(fsdp=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 2), (MeshConfig(fsdp=2, tensor=4), 4),
    (MeshConfig(fsdp=2, context=2, tensor=2), 2)])
def test_sharding_changes_nothing(batches, one_device, mesh_config, accumulation):
    assert_same_run(run_steps(batches, mesh_config=mesh_config, devices=8, accumulation=accumulation), one_device)


def test_loss_is_the_mean_over_weighted_tokens(batches, one_device):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        model = Transformer(tiny_config(), jax.random.key(0))
        batch = batches[0]
        x = model(*(jnp.asarray(a) for a in (batch.tokens, batch.positions, batch.segment_ids)))
        logprobs = np.asarray(jax.nn.log_softmax(model.logits(x)[..., :300]))
        chosen = np.take_along_axis(logprobs, batch.targets[..., None], -1)[..., 0]
        want = -(chosen * batch.weights).sum() / batch.weights.sum()
        np.testing.assert_allclose(one_device[1][0]['loss'], want, rtol=1e-5)
        sums = make_eval_step(LOSS)(model, jax.tree.map(lambda a: jnp.asarray(a)[None], batch))
        np.testing.assert_allclose(sums['loss'] / sums['weight'], want, rtol=1e-5)


def test_padding_rows_change_nothing(batches, one_device):
    padded = [jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch) for batch in batches]
    assert_same_run(run_steps(padded), one_device)


def test_clipping_bounds_the_update(batches):
    clip = dataclasses.replace(SGD, clip_norm=0.5, b1=0.0)
    (state, history), (free, _) = run_steps(batches[:1], clip), run_steps(batches[:1], dataclasses.replace(SGD, b1=0.0))
    assert history[0]['grad_norm'] > 0.5  # reported before clipping
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        start = jax.tree.map(np.asarray, Transformer(tiny_config(), jax.random.key(0)))
    moved, moved_free = (np.sqrt(sum(np.square(a - b).sum() for a, b in zip(jax.tree.leaves(s.model), jax.tree.leaves(start), strict=True)))
                         for s in (state, free))
    np.testing.assert_allclose(moved, 0.1 * 0.5, rtol=1e-3)
    np.testing.assert_allclose(moved_free, 0.1 * history[0]['grad_norm'], rtol=1e-3)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_learns_on_a_sharded_mesh(batches, name):
    rate = {'sgd': 0.1, 'adafactor': 0.01, 'lion': 1e-3, 'adamw': 3e-3}[name]
    optimizer = OptimizerConfig(name=name, learning_rate=rate, weight_decay=0.01, warmup_fraction=0)
    _, history = run_steps(batches[:1] * 6, optimizer, MeshConfig(fsdp=2, tensor=2), devices=4)
    losses = [m['loss'] for m in history]
    assert losses[-1] < losses[0] - 0.05
    assert np.all(np.isfinite(losses))


def poisoned_loss(model, batch):
    """Not finite where the batch holds the id 299."""
    loss, metrics = LOSS(model, batch)
    return jnp.where(jnp.any(batch.tokens == 299), jnp.nan, 1.0) * loss, metrics


def test_steps_that_are_not_finite_or_weightless_change_only_counters(batches):
    good, bad, empty = batches[0], jax.tree.map(np.copy, batches[0]), jax.tree.map(np.copy, batches[0])
    good.tokens[good.tokens == 299] = 0
    bad.tokens[0, 0] = 299
    empty.tokens[:], empty.weights[:] = 1, 0
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        tx = make_optimizer(OptimizerConfig(), 10)
        state = create(lambda: init_state(Transformer(tiny_config(), jax.random.key(0)), tx), mesh)
        step = make_train_step(poisoned_loss, tx, 1.0, 1)
        seen = []
        for batch in (good, bad, bad, empty, good):
            before = jax.tree.map(np.asarray, (state.model, state.opt_state))
            state, metrics = step(state, place_batch(batch, mesh, 1))
            after = jax.tree.map(np.asarray, (state.model, state.opt_state))
            same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
            seen.append((same, int(metrics['skipped']), int(metrics['skipped_in_a_row'])))
    assert seen == [(False, 0, 0), (True, 1, 1), (True, 2, 2), (True, 2, 0), (False, 2, 0)]
    assert int(state.step) == 5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))


@pytest.mark.slow
def test_parameters_move_at_the_recipes_learning_rate(batches):
    """1e-6 under AdamW: float32 masters all move; bfloat16 ones move in proportion, by stochastic rounding alone."""
    optimizer = OptimizerConfig(learning_rate=1e-6, schedule='constant', warmup_fraction=0)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        for dtype, least, most in (('float32', 0.9, 1.0), ('bfloat16', 1e-3, 0.5)):
            start = jax.device_get(jax.jit(lambda dtype=dtype: Transformer(tiny_config(param_dtype=dtype), jax.random.key(0)))())
            state, _ = run_steps(batches[:1] * 4, optimizer, param_dtype=dtype)
            moved = np.mean(np.concatenate([(np.asarray(a) != np.asarray(b)).ravel() for a, b in
                                            zip(jax.tree.leaves(state.model), jax.tree.leaves(start), strict=True)]))
            assert least < moved <= most, (dtype, moved)


def test_moments_are_sharded_like_their_parameters_from_birth():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    tx = make_optimizer(OptimizerConfig(), 10)
    state = create(lambda: init_state(Transformer(tiny_config(), jax.random.key(0)), tx), mesh)
    parameters = jax.tree.leaves(state.model)
    moments = jax.tree.leaves(state.opt_state[0].mu) + jax.tree.leaves(state.opt_state[0].nu)
    assert [m.sharding for m in moments] == [p.sharding for p in parameters] * 2
    largest = max(parameters, key=lambda p: p.size)
    assert largest.addressable_shards[0].data.size * 8 == largest.size
    step = make_train_step(LOSS, tx, 1.0, 1)
    with jax.set_mesh(mesh):
        before = [leaf.sharding for leaf in jax.tree.leaves(state)]
        after, _ = step(state, place_batch(random_batch(0, 8, 32), mesh, 1))
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == before


def test_batch_of_unequal_fields_is_placed_row_by_row(batches):
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    placed = place_batch(batches[0], mesh, 2)
    assert isinstance(placed, TrainBatch)
    assert placed.tokens.shape == (2, 4, 32)
    np.testing.assert_array_equal(np.asarray(placed.tokens).reshape(8, 32), batches[0].tokens)
