"""Attention to a paged cache by JAX's ragged paged attention kernel for TPUs; block sizes are explicit, so it compiles ahead of time too."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

KEYS_A_BLOCK = 512  # positions of the cache that are in VMEM at a time, twice
QUERIES_A_BLOCK = 32
VMEM_BYTES = 64 * 2**20  # the most that the kernel may take, below what every TPU since v5 has


def attend(q: jax.Array, pages: jax.Array, table: jax.Array, positions: jax.Array, work) -> jax.Array:
    """Same contract as attention_paged.attend; positions of a row must be consecutive, with -1 at the end only."""
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
