"""Attention of new positions to a paged cache in plain XLA: its cost follows the pages in use, not the longest row nor the table.

Pages of all rows are laid out in one list of work; a loop takes W of them at a time, whichever rows they belong to, and merges their
partial softmaxes into the rows (the split-key scheme of Flash-Decoding, Dao et al. 2023, over a ragged list). The list's end is data.

Letters besides the model's: P pages, C positions a page, n pages a row, W pages taken at a time, G query heads a kv head.
"""

import dataclasses

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite: exp(NEGATIVE - NEGATIVE) must not be NaN in rows that see nothing
SCORES = 2048  # query-key pairs of one head that a step of the loop handles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """Pages to visit: `row` and `block` (index of the page in its row), each [items]; the first `count` [1] of them are real."""

    row: jax.Array
    block: jax.Array
    count: jax.Array


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
    return max(1, SCORES // (queries * page_size))


def attend(q: jax.Array, pages: jax.Array, table: jax.Array, positions: jax.Array, work: Work) -> jax.Array:
    """q [B, T, N, H], pages [P, C, 2K, H], table [B, n] of page numbers, positions [B, T] -> [B, T, N, H] in q's dtype.

    A query sees what its row's pages hold at its own position and before. Softmax in float32; zeros where positions is -1.
    """
    B, T, N, H = q.shape
    C, K = pages.shape[1], pages.shape[2] // 2
    W = _width(T, C)
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]

    def step(i, carry):
        highest, total, out = carry
        index = i * W + jnp.arange(W)
        row, block = work.row[index], work.block[index]
        key_value = pages[table[row, block]]
        scores = jnp.einsum('WKGTH,WCKH->WKGTC', q[row], key_value[:, :, 0::2], preferred_element_type=jnp.float32) * H**-0.5
        seen = (block[:, None] * C + jnp.arange(C))[:, None, :] <= positions[row][:, :, None]
        seen = (seen & (index < work.count)[:, None, None])[:, None, None]
        scores = jnp.where(seen, scores, NEGATIVE)
        own = (row == jnp.arange(B)[:, None]) & (index < work.count)  # [B, W]
        peaks = scores.max(-1)
        new_highest = jnp.maximum(highest, jnp.where(own[:, :, None, None, None], peaks, NEGATIVE).max(1))
        weights = jnp.where(seen, jnp.exp(scores - new_highest[row][..., None]), 0.0)
        parts = jnp.einsum('WKGTC,WCKH->WKGTH', weights.astype(q.dtype), key_value[:, :, 1::2], preferred_element_type=jnp.float32)
        sums, parts, poison = _contain(weights.sum(-1), parts, own)
        own, decay = own.astype(jnp.float32), jnp.exp(highest - new_highest)
        total = total * decay + jnp.einsum('BW,WKGT->BKGT', own, sums, precision='highest') + poison[:, None, None, None]
        return new_highest, total, out * decay[..., None] + jnp.einsum('BW,WKGTH->BKGTH', own, parts, precision='highest')

    shape = q.shape[:-1]
    start = (jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, (work.count[0] + W - 1) // W, step, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q.dtype)


def _contain(sums: jax.Array, parts: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Replaces what is not finite by zeros, and NaN [B] for the rows it came from: zero times a neighbour's NaN would be NaN."""
    finite = jnp.isfinite(parts).all(axis=(1, 2, 3, 4)) & jnp.isfinite(sums).all(axis=(1, 2, 3))
    poison = jnp.where(own & ~finite, jnp.nan, 0.0).sum(1)
    return jnp.where(finite[:, None, None, None], sums, 0), jnp.where(finite[:, None, None, None, None], parts, 0), poison
