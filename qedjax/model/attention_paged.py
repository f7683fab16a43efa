"""Attention of new positions to a paged cache in plain XLA: its cost follows the pages in use, not the longest row nor the table.

Pages of all rows are laid out in one list of work; a loop takes W of them at a time, whichever rows they belong to, and merges their
partial softmaxes into the rows (the split-key scheme of Flash-Decoding, Dao et al. 2023, over a ragged list). The list's end is data.
A page is [2, K, C, H], keys then values, head by head: products over a page need no transposition.

Letters besides the model's: P pages, C positions a page, n pages a row, W pages taken at a time, G query heads a kv head, Q = G T.
"""

import dataclasses

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite: exp(NEGATIVE - NEGATIVE) must not be NaN in rows that see nothing
PAGE_AXES = (None, 'kv_heads', None, None)
POSITIONS = 2048  # of the cache that a step of the loop handles when each row has one query
SCORES = 2**16  # query-key pairs of one head that it handles at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """Pages to visit: `row` and `block` (index of the page in its row), each [items]; the first `count` [1] of them are real."""

    row: jax.Array
    block: jax.Array
    count: jax.Array


def page_shape(page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Layout of a page."""
    return 2, kv_heads, page_size, head_dim


def page_size(pages: jax.Array) -> int:
    """Positions of a page, given pages [..., 2, K, C, H]."""
    return pages.shape[-2]


def plan(table: jax.Array, positions: jax.Array, page_size: int) -> Work:
    """The work for rows at `positions` [B, T] (-1 where there is no query): every page up to a row's last position."""
    B, n = table.shape
    counts = positions.max(axis=1) // page_size + 1
    ends = jnp.cumsum(counts)
    items = jnp.arange(B * n + _width(positions.shape[1], page_size) - 1)
    row = jnp.minimum(jnp.searchsorted(ends, items, side='right', method='compare_all'), B - 1).astype(jnp.int32)
    block = jnp.clip(items - (ends - counts)[row], 0, n - 1)
    return Work(row, block, ends[-1:])


def _width(queries: int, page_size: int) -> int:
    """Pages a step: enough to fill the machine, few enough to waste little at the end of the list."""
    return max(1, min(POSITIONS, SCORES // queries) // page_size)


def write(k: jax.Array, v: jax.Array, pages: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Stores k, v [B, T, K, H] at offset [B, T] of page [B, T] in pages [P, 2, K, C, H]."""
    return pages.at[page, :, :, offset].set(jnp.stack([k, v], axis=2).astype(pages.dtype))


def attend(q: jax.Array, pages: jax.Array, table: jax.Array, positions: jax.Array, work: Work) -> jax.Array:
    """q [B, T, N, H], pages [P, 2, K, C, H], table [B, n] of page numbers, positions [B, T] -> [B, T, N, H] in q's dtype.

    A query sees what its row's pages hold at its own position and before. Softmax in float32; zeros where positions is -1.
    """
    B, T, N, H = q.shape
    P, _, K, C, _ = pages.shape
    W, halves = _width(T, C), pages.reshape(2 * P, K, C, H)
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, -1, H)
    last = jnp.tile(positions, (1, N // K))  # of each query, [B, Q]

    def step(i, carry):
        highest, total, out = carry
        index = i * W + jnp.arange(W)
        row, block = work.row[index], work.block[index]
        page = 2 * table[row, block]
        scores = jax.lax.platform_dependent(q[row], halves[page], cpu=_scores_cpu, default=_scores) * H**-0.5
        real = index < work.count
        seen = jnp.where(real[:, None], last[row] - block[:, None] * C, -1)[..., None] >= jnp.arange(C)
        scores = jnp.where(seen[:, None], scores, NEGATIVE)
        own = (row == jnp.arange(B)[:, None]) & real  # [B, W]
        new_highest = jnp.maximum(highest, jnp.where(own[:, :, None, None], scores.max(-1), NEGATIVE).max(1))
        weights = jnp.where(seen[:, None], jnp.exp(scores - new_highest[row][..., None]), 0.0)
        # What nobody has written yet may hold anything of a former owner's: zero times its NaN would be NaN.
        values = jnp.where(seen.any(1)[:, None, :, None], halves[page + 1], 0)
        parts = jnp.einsum('WKQC,WKCH->WKQH', weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        sums, parts, poison = _contain(weights.sum(-1), parts, own)
        own, decay = own.astype(jnp.float32), jnp.exp(highest - new_highest)
        total = total * decay + jnp.einsum('BW,WKQ->BKQ', own, sums, precision='highest') + poison[:, None, None]
        return new_highest, total, out * decay[..., None] + jnp.einsum('BW,WKQH->BKQH', own, parts, precision='highest')

    shape = q.shape[:-1]
    start = (jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, (work.count[0] + W - 1) // W, step, start)
    out = (out / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype)
    return jnp.moveaxis(out.reshape(B, K, N // K, T, H), 3, 1).reshape(B, T, N, H)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum('WKQH,WKCH->WKQC', q, k, preferred_element_type=jnp.float32)


def _scores_cpu(q: jax.Array, k: jax.Array) -> jax.Array:
    """The same, with keys transposed while they are gathered: XLA's small products on CPUs would do it at several times the cost."""
    k = jax.lax.optimization_barrier(jnp.swapaxes(k, 2, 3))
    return jnp.einsum('WKQH,WKHC->WKQC', q, k, preferred_element_type=jnp.float32)


def _contain(sums: jax.Array, parts: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replaces what is not finite by zeros, and NaN [B] for the rows it came from: zero times a neighbour's NaN would be NaN."""
    finite = jnp.isfinite(parts).all(axis=(1, 2, 3)) & jnp.isfinite(sums).all(axis=(1, 2))
    poison = jnp.where(own & ~finite, jnp.nan, 0.0).sum(1)
    return jnp.where(finite[:, None, None], sums, 0), jnp.where(finite[:, None, None, None], parts, 0), poison
