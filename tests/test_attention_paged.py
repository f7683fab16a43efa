"""Attention to pages: equal to a plain softmax whatever the pages' order, lengths and neighbours, and a fault stays in its row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.model import attention_paged
from qedjax.model.attention import attend_cache, plan_cache
from qedjax.model.cache import PagedCache, page_spec
from qedjax.sharding import make_rollout_mesh

B, n, C, P, K, G, H = 3, 5, 4, 17, 2, 2, 8

def softmax_attention(q, pages, table, positions):
    """Every query by itself, in float64: q [B, T, N, H], pages [P, 2, K, C, H]."""
    out = np.zeros(q.shape)
    for b, t in np.argwhere(positions >= 0):
        seen = np.moveaxis(pages[table[b]], 3, 1).reshape(-1, 2, K, H)[: positions[b, t] + 1].astype(np.float64)  # [S, 2, K, H]
        for head in range(K * G):
            scores = seen[:, 0, head // G] @ q[b, t, head] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, head] = weights @ seen[:, 1, head // G] / weights.sum()
    return out


@jax.jit
def attend(q, pages, table, positions):
    return attention_paged.attend(q, pages, table, positions, attention_paged.plan(table, positions, C))


def random_case(seed, starts, T):
    """Queries at T positions from each start (-1: an idle row), pages scattered over the cache."""
    rng = np.random.default_rng(seed)
    table = rng.permutation(P)[: B * n].reshape(B, n).astype(np.int32)
    positions = np.where(np.array(starts)[:, None] < 0, -1, np.array(starts)[:, None] + np.arange(T)).astype(np.int32)
    q, pages = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, K * G, H), (P, 2, K, C, H)))
    return q, pages, table, positions


@pytest.mark.parametrize(('width', 'T'), [(1, 1), (2, 1), (7, 1), (64, 1), (1, 3), (4, 3)])
def test_any_number_of_pages_a_step_equals_a_plain_softmax(monkeypatch, width, T):
    monkeypatch.setattr(attention_paged, 'POSITIONS', width * C)
    monkeypatch.setattr(attention_paged, 'SCORES', width * T * C)
    run = jax.jit(lambda *a: attention_paged.attend(*a, attention_paged.plan(a[2], a[3], C)))
    for seed, starts in enumerate([(0, 3, 4), (16, -1, 7), (-1, -1, 0), (-1, -1, -1), (17 - T, 12, 8)]):
        case = random_case(seed, starts, T)
        np.testing.assert_allclose(run(*case), softmax_attention(*case), atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(-1, n * C - 1)] * B))
def test_lengths_of_neighbours_and_unused_pages_do_not_matter(seed, starts):
    q, pages, table, positions = random_case(seed, starts, 1)
    got = np.asarray(attend(q, pages, table, positions))
    np.testing.assert_allclose(got, softmax_attention(q, pages, table, positions), atol=2e-6)
    used = np.isin(np.arange(P), [page for b in range(B) for page in table[b, : positions[b, 0] // C + 1]])
    pages[~used] = np.nan
    for b in range(B):  # and what its own last page holds beyond its position
        pages[table[b, positions[b, 0] // C], :, :, positions[b, 0] % C + 1 :] = np.nan if positions[b, 0] >= 0 else 0
    np.testing.assert_array_equal(attend(q, pages, table, positions), got)


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone():
    q, pages, table, positions = random_case(0, (13, 9, 19), 1)
    want = np.asarray(attend(q, pages, table, positions))
    for value in (np.nan, np.inf):
        for channel in (0, 1):  # keys, values
            pages[table[1, 1], channel, 1, 2] = value
            got = np.asarray(attend(q, pages, table, positions))
            assert not np.isfinite(got[1]).all()
            np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize('shape', [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_writing_and_attending_on_every_mesh(shape):
    """Two layers; each shard counts its own pages; only the layer and the pages of live rows change."""
    rng = np.random.default_rng(1)
    B, L, P = 4, 2, 16
    q, k, v = (rng.normal(size=(B, 1, heads, H)).astype(np.float32) for heads in (K * G, K, K))
    start = np.array([[6], [-1], [0], [11]], np.int32)
    with jax.set_mesh(make_rollout_mesh(*shape)):
        shards = shape[0]
        table = np.concatenate([rng.permutation(P // shards - 1)[: B // shards * 3].reshape(-1, 3) for _ in range(shards)]).astype(np.int32)
        contents = rng.normal(size=(L, P, 2, K, C, H)).astype(np.float32)

        @jax.jit
        def run(q, k, v, contents, table, positions):
            q, k, v, table, positions = (jax.reshard(x, jax.P('data')) for x in (q, k, v, table, positions))
            q, k, v = (jax.reshard(x, jax.P('data', None, 'tensor')) for x in (q, k, v))
            cache = PagedCache(jax.reshard(contents, page_spec('xla')), 'xla')
            return attend_cache(q, k, v, cache, jnp.int32(1), table, positions, plan_cache(cache, table, positions))

        out, cache = run(q, k, v, contents, table, start)
    want, owned = contents.copy(), table + (np.arange(B) // (B // shards) * (P // shards))[:, None]
    for b in (0, 2, 3):
        page, offset = owned[b, start[b, 0] // C], start[b, 0] % C
        want[1, page, 0, :, offset], want[1, page, 1, :, offset] = k[b, 0], v[b, 0]
    got, nobodys = np.asarray(cache.pages), P // shards * (np.arange(shards) + 1) - 1
    np.testing.assert_array_equal(np.delete(got, nobodys, axis=1), np.delete(want, nobodys, axis=1))
    np.testing.assert_allclose(out, softmax_attention(q, want[1], owned, start), atol=2e-6)
