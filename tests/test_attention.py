"""Each attention backend that runs here against a naive float64 reference, and against itself.

Padding, packing, blocks and shards must change nothing.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from qedjax.model import attention_splash, attention_xla
from qedjax.model.attention import attend_packed
from qedjax.model.attention_cudnn import attend as attend_cudnn
from qedjax.model.rope import rope_angles
from qedjax.model.transformer import Block, rematerialize
from qedjax.plan import hlo
from qedjax.plan.collectives import collectives, sent_by_kind
from qedjax.sharding import MeshConfig, make_mesh, put, spec
from qedjax.testing import tiny_config

# (backend, block): one dense block, several blocks with and without a ragged last one, and the TPU kernel in interpret
# mode, in one block and in several.
KINDS = [('xla', 512), ('xla', 32), ('xla', 24), ('splash', 256), ('splash', 128)]
T = 160
SEGMENTS = np.array([
    [1] * 160,
    [1] * 50 + [2] * 1 + [3] * 70 + [4] * 20 + [0] * 19,
    [2] * 40 + [0] * 30 + [1] * 60 + [5] * 30,  # padding between, ids out of order
    [0] * 160], np.int32)


def naive_attention(q, k, v, segments):
    """Loops over rows and heads in float64; padding yields zeros."""
    out = np.zeros(q.shape)
    causal = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    for b in range(q.shape[0]):
        visible = causal & (segments[b][:, None] == segments[b][None, :]) & (segments[b][:, None] > 0)
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[2])
            scores = q[b, :, n].astype(np.float64) @ k[b, :, kv].T.astype(np.float64) / np.sqrt(q.shape[3])
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, initial=-1e9, keepdims=True))
            out[b, :, n] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v[b, :, kv]
    return out


def make_qkv(seed, rows=4, length=T, heads=4, kv_heads=2, head_dim=16):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(rows, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads))


@functools.partial(jax.jit, static_argnames='cfg')
def values_and_grads(q, k, v, segments, weights, cfg):
    def loss(q, k, v):
        out = attend_packed(q, k, v, segments, cfg)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def run(kind, q, k, v, segments, weights, mesh_config=None, devices=1):
    """Output and the gradients of q, k, v, on the host."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
    cfg = tiny_config(attention=kind[0], attention_block=kind[1])
    with jax.set_mesh(mesh), mock.patch.object(attention_splash, 'BLOCKS', (kind[1],)):
        arrays = [put(x, mesh, 'batch', 'sequence', 'heads', None) for x in (q, k, v)]
        rest = put(segments, mesh, 'batch', 'sequence'), put(weights, mesh, 'batch', 'sequence', 'heads', None)
        return [np.asarray(x) for x in values_and_grads(*arrays, *rest, cfg)]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_equals_naive_attention(kind, kv_heads):
    q, k, v = make_qkv(kv_heads, kv_heads=kv_heads)
    out, *_ = run(kind, q, k, v, SEGMENTS, np.ones_like(q))
    np.testing.assert_allclose(out, naive_attention(q, k, v, SEGMENTS), atol=3e-6)
    assert not out[SEGMENTS == 0].any()


@pytest.fixture(scope='module')
def dense():
    """Inputs, random output weights, and the dense path's values and gradients: the reference for the other paths."""
    q, k, v = make_qkv(7)
    weights = np.random.default_rng(8).normal(size=q.shape).astype(np.float32)
    return (q, k, v, SEGMENTS, weights), run(KINDS[0], q, k, v, SEGMENTS, weights)


def test_gradients_of_the_dense_path_equal_finite_differences(dense):
    (q, k, v, segments, weights), (_, *grads) = dense
    rng = np.random.default_rng(0)
    for i in range(3):
        direction = rng.normal(size=(q, k, v)[i].shape)
        ends = []
        for sign in (1, -1):
            moved = [x.astype(np.float64) for x in (q, k, v)]
            moved[i] = moved[i] + sign * 1e-5 * direction
            ends.append((naive_attention(*moved, segments) * weights).sum())
        np.testing.assert_allclose((grads[i] * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4)


@pytest.mark.parametrize('kind', KINDS[1:])
def test_values_and_gradients_equal_the_dense_path(dense, kind):
    inputs, want = dense
    for got, expected in zip(run(kind, *inputs), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.fixture(scope='module')
def wide():
    """Eight rows and heads, so that eight devices can split either; values and gradients of the dense path on one device."""
    q, k, v = make_qkv(9, rows=8, heads=8, kv_heads=4, head_dim=8)
    weights = np.random.default_rng(10).normal(size=q.shape).astype(np.float32)
    segments = np.concatenate([SEGMENTS, SEGMENTS[::-1]])
    return (q, k, v, segments, weights), run(KINDS[0], q, k, v, segments, weights)


@pytest.mark.parametrize('kind', [KINDS[0], KINDS[1], KINDS[3]])
@pytest.mark.parametrize('mesh_config', [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(fsdp=2, tensor=2, context=2),
                                         MeshConfig(fsdp=1, tensor=2, context=4)])  # the last one must copy kv heads
def test_sharding_changes_nothing(wide, kind, mesh_config):
    inputs, want = wide
    for got, expected in zip(run(kind, *inputs, mesh_config, devices=8), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_heads_that_do_not_fit_the_mesh_are_refused():
    q, k, v = make_qkv(0, heads=4)
    with pytest.raises(ValueError, match='num_heads=4 cannot be split over tensor x context = 8 devices'):
        run(KINDS[0], q, k, v, SEGMENTS, np.ones_like(q), MeshConfig(fsdp=1, tensor=2, context=4), devices=8)


@pytest.mark.parametrize('kind', KINDS)
def test_documents_do_not_see_each_other(kind):
    """[A, B, A] in a row: B's values and gradients do not move by a bit when A changes, and both copies of A come out alike."""
    q, k, v = make_qkv(3, rows=1)
    weights = np.random.default_rng(4).normal(size=q.shape).astype(np.float32)
    segments = np.array([[1] * 40 + [2] * 60 + [3] * 40 + [0] * 20], np.int32)
    for x in (q, k, v, weights):
        x[:, 100:140] = x[:, :40]
    first = run(kind, q, k, v, segments, weights)
    for x in first:
        np.testing.assert_allclose(x[:, 100:140], x[:, :40], atol=1e-5)
    for x in (q, k, v):
        x[:, :40] += 1
        x[:, 140:] = 1e3  # padding may hold anything finite
    second = run(kind, q, k, v, segments, weights)
    for before, after in zip(first, second, strict=True):
        np.testing.assert_array_equal(before[:, 40:140], after[:, 40:140])
        assert not after[:, 140:].any()
    assert np.abs(first[0][:, :40] - second[0][:, :40]).max() > 0.1


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), seed=st.integers(0, 3))
def test_blocks_equal_the_dense_path_for_any_segmentation(lengths, seed):
    ids = np.random.default_rng(seed).permutation(len(lengths))  # 0 included: padding anywhere
    segments = np.repeat(ids, lengths)[:T].astype(np.int32)
    segments = np.pad(segments, (0, T - len(segments)))[None]
    q, k, v = make_qkv(seed, rows=1)
    weights = np.random.default_rng(seed + 1).normal(size=q.shape).astype(np.float32)
    for got, want in zip(run(KINDS[1], q, k, v, segments, weights), run(KINDS[0], q, k, v, segments, weights), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_stays_close(dense):
    (q, k, v, segments, weights), want = dense
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    for kind in (KINDS[0], KINDS[1]):
        got = run(kind, *low, segments, weights)[0].astype(np.float32)
        assert np.abs(got - want[0]).max() < 0.03


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_blocks_left_out_share_no_segment(lengths, seed):
    """Where two blocks of a row share a segment, `_meeting` says so; where a block is all padding, it meets nothing."""
    segments = np.repeat(np.random.default_rng(seed).integers(0, 6, len(lengths)), lengths)
    segments = np.pad(segments, (0, T))[:T].reshape(-1, 1, 16)
    meeting = np.asarray(jax.jit(attention_xla._meeting)(segments))
    for i, left in enumerate(segments[:, 0]):
        for j, right in enumerate(segments[:, 0]):
            assert meeting[i, j] >= bool(set(left[left > 0]) & set(right[right > 0]))
        if not left.any():
            assert not meeting[i].any()


@pytest.mark.parametrize(('length', 'size'), [(8, 128), (100, 128), (160, 128), (500, 512), (640, 256), (1024, 1024), (1100, 256),
                                              (5000, 1024), (49_152, 1024)])
def test_splash_pads_rows_by_little(length, size):
    assert attention_splash.block_size(length) == size
    assert -length % size < max(128, length / 4)


@pytest.mark.parametrize(('kind', 'kept', 'loops'), [(('xla', 512), 1, 0), (('xla', 32), 2, 1), (('splash', 128), 2, 0)])
def test_remat_keeps_the_output_once(mesh, kind, kept, loops):
    """Under remat='attention' the backward pass is given the output (and log-sum-exp) once, and does not run the loop that made them.

    That it does not run splash's kernel again shows in the code compiled for a TPU: see test_attention_tpu.py.
    """
    cfg = tiny_config(attention=kind[0], attention_block=kind[1])
    x, segments = put(np.ones((2, 64, cfg.embed_dim), np.float32), mesh, 'batch', 'sequence', None), jnp.ones((2, 64), jnp.int32)
    block = jax.eval_shape(lambda: Block(cfg, jax.random.key(0)))
    angles = rope_angles(cfg, jnp.broadcast_to(jnp.arange(64), (2, 64)))

    def layer(x, block):
        return block(x, angles, lambda q, k, v: (attend_packed(q, k, v, segments, cfg), None))[0]

    def kept_and_loops(policy):
        body = rematerialize(layer, policy)
        kept = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(body, *inputs)[1], x, block))
        # Not the mask tables: newer JAX drops those of a kernel that is not run again.
        kept = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
        both_passes = jax.make_jaxpr(jax.value_and_grad(lambda *inputs: body(*inputs).sum()))(x, block)
        return len(kept), str(both_passes).count('while[')

    full, attention = kept_and_loops('full'), kept_and_loops('attention')
    assert attention == (full[0] + kept, full[1] - loops)


@pytest.mark.parametrize('context', [4, 8])
def test_no_device_is_sent_more_heads_than_it_works_on(context):
    """Fewer kv heads than devices, forward and backward: what is sent is one exchange each of q, k, v, the output, and gradients."""
    mesh = make_mesh(MeshConfig(context=context), jax.devices()[:context])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, spec('batch', 'sequence', None, None))
        q, k = (jax.ShapeDtypeStruct((1, 64, n, 16), jnp.float32, sharding=rows) for n in (8, 2))
        segments = jax.ShapeDtypeStruct((1, 64), jnp.int32, sharding=NamedSharding(mesh, spec('batch', 'sequence')))
        compiled = values_and_grads.lower(q, k, k, segments, q, tiny_config(attention_block=64)).compile()
    sent = sent_by_kind(collectives(hlo.parse(compiled.as_text())))
    exchanges = 4 * 8 + 4 * context  # heads of q, output and their gradients, and of k, v and theirs, one a device
    assert sent.pop('all-to-all') == exchanges * 16 * 64 * 4 / context * (context - 1) / context
    assert sum(sent.values()) <= 64 * 4 * 2  # of segment ids


def compiled_backward(length):
    cfg, mesh = tiny_config(attention_block=64), make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 2, 2)]
        rest = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        return values_and_grads.lower(*shapes, *rest, cfg).compile()


def test_memory_is_linear_in_length():
    short, long = compiled_backward(4096), compiled_backward(8192)
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert temporary[1] < 2.2 * temporary[0]
    assert '8192,8192' not in long.as_text()


def test_cudnn_refuses_what_it_cannot_do(mesh, monkeypatch):
    q, k, v = (jnp.asarray(x) for x in make_qkv(0, head_dim=64))
    with pytest.raises(ValueError, match='needs an NVIDIA GPU, but the mesh is of cpu'):
        attend_cudnn(q, k, v, jnp.asarray(SEGMENTS), 0)
    monkeypatch.setattr('qedjax.model.attention_cudnn._platform', lambda: 'cuda')
    with pytest.raises(ValueError, match='bfloat16 or float16, not float32'):
        attend_cudnn(q, k, v, jnp.asarray(SEGMENTS), 0)
    with pytest.raises(ValueError, match='head_dim that is a multiple of 8 up to 128, not 160'):
        attend_cudnn(*(jnp.asarray(x, jnp.bfloat16) for x in make_qkv(0, head_dim=160)), jnp.asarray(SEGMENTS), 0)


def test_cudnn_lowers_to_its_kernel_with_a_causal_mask_and_lengths(mesh, monkeypatch):
    """Lowered for CUDA on this machine; it runs on a GPU only."""
    monkeypatch.setattr('qedjax.model.attention_cudnn._platform', lambda: 'cuda')
    monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version', lambda: 91000)
    monkeypatch.setattr('jax._src.cudnn.fused_attention_stablehlo.check_compute_capability', lambda capability: True)
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in make_qkv(0, length=128, head_dim=64))
    segments = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def loss(q, k, v, segments):
        return attend_cudnn(q, k, v, segments, 0).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, segments).lower(lowering_platforms=('cuda',)).as_text()
    for call in ('__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'):
        line = next(line for line in lowered.splitlines() if f'@{call}(' in line)
        assert 'PADDING_CAUSAL' in line
        assert line.count('tensor<4xi32>') == 2  # the rows' lengths, of queries and of keys


def test_cudnn_masks_around_the_kernel(mesh, monkeypatch):
    """With a kernel that leaves NaN beyond a row's length, padding is zero in both passes; packed rows come back as NaN."""
    monkeypatch.setattr('qedjax.model.attention_cudnn._platform', lambda: 'cuda')

    def kernel(q, k, v, *, query_seq_lengths, key_value_seq_lengths, is_causal, implementation):
        assert is_causal
        assert implementation == 'cudnn'
        np.testing.assert_array_equal(query_seq_lengths, [160, 100, 0, 160])
        return jnp.where((jnp.arange(q.shape[1]) < query_seq_lengths[:, None])[:, :, None, None], q, jnp.nan)

    monkeypatch.setattr('jax.nn.dot_product_attention', kernel)
    segments = jnp.asarray([[1] * 160, [1] * 100 + [0] * 60, [0] * 160, [1] * 90 + [2] * 70], jnp.int32)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in make_qkv(0))
    out, pull = jax.vjp(lambda q: attend_cudnn(q, k, v, segments, 0), q)
    np.testing.assert_array_equal(out[:3], jnp.where(segments[:3, :, None, None] > 0, q[:3], 0))
    assert jnp.isnan(out[3]).all()
    (d_q,) = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(d_q[:3], jnp.broadcast_to(segments[:3, :, None, None] > 0, q[:3].shape))
