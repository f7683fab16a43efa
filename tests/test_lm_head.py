"""The chunked LM head against a plain log-softmax, in values, gradients, shardings and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.sharding import MeshConfig, make_mesh, put
from qedjax.train.lm_head import token_stats

MESHES = [(1, MeshConfig()), (8, MeshConfig(fsdp=8)), (8, MeshConfig(fsdp=2, tensor=4)), (8, MeshConfig(fsdp=2, context=2, tensor=2)),
          (8, MeshConfig(data=2, fsdp=2, tensor=2))]


def plain_stats(x, head, targets, num_valid, temperature):
    """Log-prob, entropy and log-sum-exp with the logits in full, float64-free but direct."""
    logits = jnp.einsum('BTD,VD->BTV', x, head)[..., :num_valid] / temperature
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, -1), jax.nn.logsumexp(logits, -1)


def make_inputs(seed, B=8, T=6, D=16, V=96, num_valid=90):
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    return x, head, rng.integers(0, num_valid, (B, T)).astype(np.int32)


def weighted_sum(stats, weights):
    return sum(jnp.sum(s * w) for s, w in zip(jax.tree.leaves(stats), weights, strict=True))


@pytest.mark.parametrize(('devices', 'mesh_config'), MESHES)
@pytest.mark.parametrize('block', [None, 7, 32])
def test_equals_plain_log_softmax_on_every_mesh(devices, mesh_config, block):
    x, head, targets = make_inputs(0)
    weights = np.random.default_rng(1).normal(size=(3, *targets.shape)).astype(np.float32)
    want, want_grads = jax.value_and_grad(lambda x, h: weighted_sum(plain_stats(x, h, targets, 90, 0.8), weights), (0, 1))(x, head)

    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        x, head = put(x, mesh, 'batch', 'sequence', None), put(head, mesh, 'vocab', 'embed')
        targets = put(targets, mesh, 'batch', 'sequence')
        weights = [put(w, mesh, 'batch', 'sequence') for w in weights]

        def loss(x, head):
            return weighted_sum(token_stats(x, head, targets, num_valid=90, temperature=0.8, block=block), weights)

        got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, head)
        assert grads[1].sharding.spec == head.sharding.spec
    np.testing.assert_allclose(got, want, rtol=2e-6)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, want_grad, rtol=1e-4, atol=2e-6 * np.abs(want_grad).max())


SMALL_STATS = jax.jit(functools.partial(token_stats, num_valid=9, block=4), static_argnames='temperature')


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 30.0, 300.0]), temperature=st.sampled_from([0.6, 1.0, 1.5]))
def test_statistics_hold_for_flat_and_for_peaked_distributions(seed, scale, temperature):
    x, head, targets = make_inputs(seed, B=2, T=3, D=4, V=11, num_valid=9)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        stats = SMALL_STATS(x * scale, head, targets, temperature=temperature)
    for got, want in zip(jax.tree.leaves(stats), plain_stats(x * scale, head, targets, 9, temperature), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=3e-5 * max(1, scale))
    assert np.all(np.asarray(stats.entropy) >= -1e-4)


def test_rows_the_tokenizer_cannot_decode_get_no_probability_and_no_gradient(mesh):
    x, head, targets = make_inputs(2, B=2)
    head[90:] = 1e3  # would dominate the softmax

    def loss(head):
        return token_stats(jnp.asarray(x), head, jnp.asarray(targets), num_valid=90, block=32).logprob.sum()

    value, grad = jax.value_and_grad(loss)(jnp.asarray(head))
    np.testing.assert_allclose(value, plain_stats(x, head, targets, 90, 1.0)[0].sum(), rtol=1e-5)
    assert np.all(np.asarray(grad)[90:] == 0)
    assert np.any(np.asarray(grad)[:90] != 0)


def test_bfloat16_inputs_accumulate_in_float32(mesh):
    x, head, targets = make_inputs(3, B=2, D=512)
    x, head = jnp.asarray(x / 8, jnp.bfloat16), jnp.asarray(head / 8, jnp.bfloat16)
    stats = token_stats(x, head, jnp.asarray(targets))
    want = plain_stats(x.astype(jnp.float32), head.astype(jnp.float32), targets, 96, 1.0)
    for got, exact in zip(jax.tree.leaves(stats), want, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def temporary_bytes(T, V):
    def loss(x, head, targets):
        return token_stats(x, head, targets, block=128).logprob.sum()

    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, T, 32), jnp.float32), ((V, 32), jnp.float32), ((1, T), jnp.int32))]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_positions_times_vocabulary():
    small, long, wide, both = (temporary_bytes(T, V) for T, V in ((512, 2048), (2048, 2048), (512, 8192), (2048, 8192)))
    assert both < 2048 * 8192 * 4 / 4  # a quarter of one logits buffer
    assert both - long <= 1.1 * (wide - small) + 2**16  # no cross term


def test_temperature_must_be_positive(mesh):
    x, head, targets = (jnp.asarray(a) for a in make_inputs(0, B=1))
    with pytest.raises(ValueError, match='temperature must be positive'):
        token_stats(x, head, targets, temperature=0.0)
