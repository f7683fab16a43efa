"""Attention to a paged cache by JAX's ragged paged attention kernel for TPUs; explicit block sizes let it compile ahead of time.

A page is [C, 2K, H], key and value of a head side by side. Same contract as attention_paged.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

PAGE_AXES = (None, 'kv_heads', None)
KEYS_A_BLOCK = 512  # positions of the cache that are in VMEM at a time, twice
QUERIES_A_BLOCK = 32
VMEM_BYTES = 64 * 2**20  # the most that the kernel may take, below what every TPU since v5 has


def page_shape(page_size: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Layout of a page."""
    return page_size, 2 * kv_heads, head_dim


def page_size(pages: jax.Array) -> int:
    """Positions of a page, given pages [..., C, 2K, H]."""
    return pages.shape[-3]


def write(k: jax.Array, v: jax.Array, pages: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Stores k, v [B, T, K, H] at offset [B, T] of page [B, T] in pages [P, C, 2K, H]."""
    new = jnp.stack([k, v], axis=3).reshape(*k.shape[:2], -1, k.shape[3])
    return pages.at[page, offset].set(new.astype(pages.dtype))


def attend(q: jax.Array, pages: jax.Array, table: jax.Array, positions: jax.Array, work) -> jax.Array:
    """See attention_paged.attend; here the positions of a row must be consecutive, with -1 at the end only."""
    del work  # the kernel plans by itself
    B, T, N, H = q.shape
    C = pages.shape[1]
    start = jnp.maximum(positions[:, 0], 0)
    # Each row has T queries at the end of start + T keys: those that a short row lacks see keys that are not there, and are zeroed below.
    table = jnp.pad(table, ((0, 0), (0, -(-T // C))))
    out = ragged_paged_attention(
        q.reshape(B * T, N, H), pages, start + T, table, jnp.arange(B + 1, dtype=jnp.int32) * T, jnp.array([B], jnp.int32),
        sm_scale=H**-0.5, num_kv_pages_per_block=min(table.shape[1], max(1, KEYS_A_BLOCK // C)),
        num_queries_per_block=min(B * T, QUERIES_A_BLOCK), vmem_limit_bytes=VMEM_BYTES)
    return jnp.where((positions >= 0)[..., None, None], out.reshape(q.shape), 0)
