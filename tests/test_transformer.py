"""The decoder agrees with itself: padded, packed, sharded, cached, rematerialised. Its compiled form keeps its promises."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from qedjax.model.cache import PagedCache
from qedjax.model.embedding import lookup
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, abstract, create, make_mesh, put
from qedjax.testing import random_batch, tiny_config
from qedjax.train.losses import next_token_loss
from qedjax.types import TrainBatch

CFG = tiny_config()
MESHES = {
    'fsdp8': MeshConfig(fsdp=8),
    'data2_fsdp4': MeshConfig(data=2, fsdp=4),
    'fsdp2_tensor4': MeshConfig(fsdp=2, tensor=4),
    'fsdp2_context2_tensor2': MeshConfig(fsdp=2, context=2, tensor=2),
    'context4_tensor2': MeshConfig(fsdp=1, context=4, tensor=2),
}


@jax.jit
def logits_of(model, batch):
    return model.logits(model(batch.tokens, batch.positions, batch.segment_ids))


def evaluate(cfg, *documents, length=48):
    """Loss, logits of each document and gradients by name, of one packed row."""
    rows = [list(documents)]
    (loss, logits), gradients = reference.evaluate(reference.seeded_model(cfg), reference.pack(rows, length))
    return loss, reference.unpack(np.asarray(logits), rows), reference.named(gradients)


def assert_same_gradients(got, want, tolerance=1e-5):
    for name, gradient in want.items():
        assert reference.error(got[name], gradient) < tolerance, name


A, B = reference.document(CFG, 13, 'A'), reference.document(CFG, 18, 'B')


def test_padding_changes_nothing(mesh):
    """A row padded to three blocks of attention, whatever ids the padding holds."""
    loss, (logits,), gradients = evaluate(CFG, A, length=len(A.tokens))
    batch = reference.pack([[A]], 48)
    batch = dataclasses.replace(batch, tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 7))
    (padded_loss, padded_logits), padded_gradients = reference.evaluate(reference.seeded_model(CFG), batch)
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
    assert reference.error(np.asarray(padded_logits)[0, : len(logits)], logits) < 1e-5
    assert_same_gradients(reference.named(padded_gradients), gradients)


def test_packed_documents_equal_documents_alone(mesh):
    """[A, B, A] in a row: logits of each by itself, losses and gradients their sum."""
    (loss_a, (logits_a,), gradients_a), (loss_b, (logits_b,), gradients_b) = evaluate(CFG, A), evaluate(CFG, B)
    loss, logits, gradients = evaluate(CFG, A, B, A)
    np.testing.assert_allclose(loss, 2 * loss_a + loss_b, rtol=1e-6)
    for got, want in zip(logits, (logits_a, logits_b, logits_a), strict=True):
        assert reference.error(got, want) < 1e-5
    assert_same_gradients(gradients, {name: 2 * gradient + gradients_b[name] for name, gradient in gradients_a.items()})


@pytest.fixture(scope='module')
def batch():
    return random_batch(0, rows=8, length=32)


ONE_BLOCK = dataclasses.replace(CFG, attention_block=32)


@pytest.fixture(scope='module')
def one_device(batch):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        return np.asarray(logits_of(reference.seeded_model(ONE_BLOCK), jax.tree.map(jnp.asarray, batch)))


@pytest.mark.parametrize('name', MESHES)
def test_logits_are_the_same_on_every_mesh(name, batch, one_device):
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh):
        logits = logits_of(reference.seeded_model(ONE_BLOCK), put(batch, mesh, 'batch', 'sequence'))
    used = batch.segment_ids > 0
    assert reference.error(np.asarray(logits)[used], one_device[used]) < 1e-5


def test_chunked_prefill_and_ragged_decoding_equal_one_forward_pass(mesh):
    """Two rows of different lengths; what the shorter one's padding wrote into the cache is never seen."""
    model, lengths = reference.seeded_model(CFG), np.array([16, 11])
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 20)).astype(np.int32)
    positions = np.broadcast_to(np.arange(20, dtype=np.int32), (2, 20))
    whole = TrainBatch(tokens, tokens, None, positions, np.ones((2, 20), np.int32))
    want = np.asarray(logits_of(model, jax.tree.map(jnp.asarray, whole)))

    @jax.jit
    def decode(model, tokens, positions, cache):
        x, cache = model.decode(tokens, positions, cache, table)
        return model.logits(x), cache

    cache, table = PagedCache.create(CFG, 12, 4), np.array([[7, 2, 10, 0, 5], [4, 11, 1, 9, 3]], np.int32)
    prompts = np.where(np.arange(20) < lengths[:, None], tokens, 3)
    for start in (0, 8):
        logits, cache = decode(model, prompts[:, start : start + 8], positions[:, start : start + 8], cache)
        for row, length in enumerate(lengths):
            known = slice(start, min(start + 8, length))
            assert reference.error(np.asarray(logits)[row, : known.stop - start], want[row, known]) < 1e-5
    for step in range(4):
        at = (lengths + step)[:, None]
        logits, cache = decode(model, np.take_along_axis(tokens, at, 1), at, cache)
        assert reference.error(np.asarray(logits)[:, 0], np.take_along_axis(want, at[..., None], 1)[:, 0]) < 1e-5
    _, after = decode(model, tokens[:, :1], np.array([[-1], [-1]]), cache)  # no tokens
    np.testing.assert_array_equal(cache.pages[:, :-1], after.pages[:, :-1])  # the last page is nobody's


@pytest.mark.parametrize('remat', ['dots', 'attention', 'full'])
def test_rematerialisation_changes_nothing(remat, mesh):
    (loss, logits, gradients), want = evaluate(dataclasses.replace(CFG, remat=remat), A, B, A), evaluate(CFG, A, B, A)
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    assert reference.error(np.concatenate(logits), np.concatenate(want[1])) < 1e-6
    assert_same_gradients(gradients, want[2], 1e-6)


def test_bfloat16_stays_close_to_float32(mesh, batch, one_device):
    model = reference.seeded_model(dataclasses.replace(ONE_BLOCK, dtype='bfloat16'))
    logits = logits_of(model, jax.tree.map(jnp.asarray, batch))
    assert logits.dtype == jnp.float32
    used = batch.segment_ids > 0
    assert 1e-4 < reference.error(np.asarray(logits)[used], one_device[used]) < 0.05


def test_program_does_not_grow_with_depth(mesh):
    def program(layers):
        cfg = dataclasses.replace(CFG, num_layers=layers, remat='full')
        model = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(0, 1, 32))
        return jax.jit(jax.grad(lambda *inputs: next_token_loss(*inputs)[0])).lower(model, batch).as_text()

    short, deep = program(4), program(36)
    assert short.count('\n') == deep.count('\n')
    assert len(deep) < 1.02 * len(short)


@pytest.mark.parametrize(('mesh_config', 'changes', 'message'), [
    (MeshConfig(fsdp=2, tensor=4), {'num_heads': 6, 'num_kv_heads': 2},
     "the heads axis has 6 entries, which 4 devices cannot share evenly; make the mesh axis 'tensor' a divisor of 6"),
    (MeshConfig(fsdp=2, tensor=4), {'num_kv_heads': 2}, 'the kv_heads axis has 2 entries'),
    (MeshConfig(fsdp=2, tensor=4), {'vocab_size': 321}, 'the vocab axis has 321 entries'),
    (MeshConfig(fsdp=8), {'embed_dim': 36}, 'the embed axis has 36 entries.*mesh axis .fsdp. a divisor of 36')])
def test_dimensions_that_a_mesh_cannot_split_are_refused_by_name(mesh_config, changes, message):
    with jax.set_mesh(make_mesh(mesh_config)), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: Transformer(tiny_config(**changes), jax.random.key(0)))


def test_heads_are_split_over_tensor_times_context():
    mesh = make_mesh(MeshConfig(fsdp=1, context=4, tensor=2))
    batch = put(random_batch(0, 1, 32), mesh, 'batch', 'sequence')
    cfg = tiny_config(num_heads=4, num_kv_heads=2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match='num_heads=4 cannot be split over tensor x context = 8'):
        jax.eval_shape(logits_of, abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh), batch)


def test_without_a_mesh_the_error_says_what_to_do():
    with pytest.raises(ValueError, match=r'no mesh is set: wrap the call in `with jax\.set_mesh'):
        Transformer(CFG, jax.random.key(0))


def test_parameters_are_sharded_at_birth():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    cfg = tiny_config(vocab_size=4096, embed_dim=256, num_layers=4, tie_embeddings=False)

    def make():
        return Transformer(cfg, jax.random.key(0))

    planned = abstract(make, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, planned)
    model = create(make, mesh)
    for leaf, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(planned), strict=True):
        assert (leaf.sharding, leaf.shape, leaf.dtype) == (wanted.sharding, wanted.shape, wanted.dtype)
    for name, path in (('heads', model.layers.attn.wq), ('mlp', model.layers.mlp.w_down), ('vocab', model.lm_head)):
        assert path[...].addressable_shards[0].data.size * 8 == path[...].size, name
    with jax.set_mesh(mesh):
        memory = jax.jit(make, out_shardings=shardings).lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 4 * cfg.num_params / 7.5
    assert memory.temp_size_in_bytes < 4 * cfg.vocab_size * cfg.embed_dim  # no device ever holds a whole table


@jax.jit
def lookup_and_pull(table, tokens, weights):
    rows, transpose = jax.vjp(lambda table: lookup(table, tokens, 'float32'), table)
    return rows, transpose(weights)[0]


@pytest.mark.parametrize('name', ['one', *MESHES])
def test_lookup_equals_indexing(name):
    mesh = make_mesh(MESHES[name]) if name in MESHES else make_mesh(MeshConfig(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(64, 16)).astype(np.float32), rng.integers(0, 64, (8, 12)).astype(np.int32)
    tokens[:, :4] = 63  # repeated ids, whose gradients add up
    weights = rng.normal(size=(8, 12, 16)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharded = put(table, mesh, 'vocab', 'embed')
        rows, gradient = lookup_and_pull(
            sharded, put(tokens, mesh, 'batch', 'sequence'), put(weights, mesh, 'batch', 'sequence', None))
    np.testing.assert_array_equal(rows, table[tokens])
    want = np.zeros_like(table)
    np.add.at(want, tokens, weights)
    np.testing.assert_allclose(gradient, want, atol=1e-5)
    assert gradient.sharding == sharded.sharding


SHAPE = re.compile(r'\b(?:pred|[a-z]+\d+)\[([\d,]+)\]')


def shapes_in(text: str) -> set[tuple[int, ...]]:
    return {tuple(int(size) for size in sizes.split(',')) for sizes in SHAPE.findall(text)}


def test_lookup_gathers_no_table():
    mesh = make_mesh(MeshConfig(fsdp=8))
    V, D = 4096, 64
    with jax.set_mesh(mesh):
        table = put(np.zeros((V, D), np.float32), mesh, 'vocab', 'embed')
        tokens = put(np.zeros((8, 16), np.int32), mesh, 'batch', 'sequence')
        value_and_grad = jax.value_and_grad(lambda table, tokens: jnp.square(lookup(table, tokens, 'float32')).sum())
        text = jax.jit(value_and_grad).lower(table, tokens).compile().as_text()
    gathers = [line for line in text.splitlines() if re.search(r' all-gather(-start)?\(', line)]
    assert gathers  # of the ids
    assert max(math.prod(shape) for shape in shapes_in('\n'.join(gathers))) <= 8 * 16 * D
    assert max(math.prod(shape) for shape in shapes_in(text)) <= V * D // 8  # the shard itself is the largest array


def test_gradient_of_a_long_row_holds_no_logits_and_no_scores():
    """T = 4096: no array of T x V or T x T values anywhere in the compiled program."""
    T, V = 4096, 6144
    mesh, cfg = make_mesh(MeshConfig(), jax.devices()[:1]), tiny_config(vocab_size=V, attention_block=512, remat='full')
    shape = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_batch(0, rows=2, length=T)))
    with jax.set_mesh(mesh):
        model = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
        compiled = jax.jit(jax.grad(lambda *inputs: next_token_loss(*inputs)[0])).lower(model, shape).compile()
    shapes = shapes_in(compiled.as_text())
    assert (V, 32) in shapes  # the table: shapes are read as they should be
    assert max(math.prod(shape) for shape in shapes) < T * V
    assert not [shape for shape in shapes if sum(size >= T for size in shape) > 1]
