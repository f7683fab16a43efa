"""Token embedding without gathering the table: ids travel to the shards, rows travel back.

A table sharded over (vocab, embed) would be all-gathered by the partitioner: V x D values. Here each device looks all ids of its fsdp
group up in its own columns and one all-to-all returns B x T x D values, which is less as soon as a group holds fewer tokens than V.
"""

import jax
import jax.numpy as jnp

from qedjax.sharding import spec


def lookup(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Rows of table [V, D] for ids tokens [B, T] (all in [0, V)), as [B, T, D] in `dtype`, sharded like the residual stream."""
    vocab_axis, embed_axis = spec('vocab', 'embed')

    def local(table, tokens):
        if embed_axis:
            tokens = jax.lax.all_gather(tokens, embed_axis, axis=0, tiled=True)
        ids = tokens - (jax.lax.axis_index(vocab_axis) * table.shape[0] if vocab_axis else 0)
        mine = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(mine[..., None], table[jnp.where(mine, ids, 0)], 0).astype(dtype)
        if vocab_axis:
            rows = jax.lax.psum(rows, vocab_axis)
        if embed_axis:
            rows = jax.lax.all_to_all(rows, embed_axis, split_axis=0, concat_axis=2, tiled=True)
        return rows

    specs = (spec('vocab', 'embed'), spec('batch', 'sequence'))
    return jax.shard_map(local, in_specs=specs, out_specs=spec('batch', 'sequence', None))(table, jax.reshard(tokens, specs[1]))
