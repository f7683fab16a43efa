"""Attention over packed rows and over the cache. Backends see local arrays only: one shard_map serves them all.

Packed rows are causal by index inside each segment; segment 0 is padding, attends to nothing and yields zeros. A
backend that cannot honour segment ids refuses; none drops them. Each names what remat='attention' keeps, in its own
layout, so that the output is stored once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qedjax.model import attention_cudnn, attention_paged, attention_splash, attention_xla
from qedjax.model.cache import BACKENDS as PAGED_BACKENDS
from qedjax.model.cache import PagedCache, page_spec
from qedjax.model.config import ModelConfig
from qedjax.sharding import axis_size, spec

BACKENDS = {'xla': attention_xla.attend, 'splash': attention_splash.attend, 'cudnn': attention_cudnn.attend}


def attend_packed(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Causal self-attention of packed rows.

    Args:
      q, k, v: [B, T, N, H], [B, T, K, H], [B, T, K, H], sharded over batch, sequence and heads.
      segment_ids: int32 [B, T], 0 where padding.
      cfg: chooses the backend and its block size.

    Returns: [B, T, N, H] in q's dtype and sharding. Between the two reshards rows are whole and heads are split over
    tensor and context.
    """
    shards = axis_size('attention_heads')
    if q.shape[2] % shards:
        raise ValueError(f'num_heads={q.shape[2]} cannot be split over tensor x context = {shards} devices; '
                         'choose a smaller mesh axis')
    if k.shape[2] % shards:  # copy kv heads just enough for every device to hold its own; gradients add up again
        repeats = next(r for r in range(1, q.shape[2] // k.shape[2] + 1)
                       if k.shape[2] * r % shards == 0 and q.shape[2] % (k.shape[2] * r) == 0)
        k, v = (_repeat_heads(x, repeats) for x in (k, v))
    whole, rows = spec('batch', None, 'attention_heads', None), spec('batch', None)
    q, k, v = (jax.reshard(x, whole) for x in (q, k, v))
    segment_ids = jax.reshard(segment_ids, rows)

    def local(q, k, v, segment_ids):
        return BACKENDS[cfg.attention](q, k, v, segment_ids, cfg.attention_block)

    inputs = (whole, whole, whole, rows)
    out = jax.shard_map(local, in_specs=inputs, out_specs=whole, check_vma=False)(q, k, v, segment_ids)
    return jax.reshard(out, spec('batch', 'sequence', 'heads', None))


def _repeat_heads(x: jax.Array, repeats: int) -> jax.Array:
    """Every kv head `repeats` times, made where the head is: a device then is sent one copy of the one that it needs, not all heads."""
    B, T, K, H = x.shape
    copies = jnp.broadcast_to(x[:, :, :, None], (B, T, K, repeats, H))
    return copies.reshape(B, T, K * repeats, H, out_sharding=spec('batch', 'sequence', 'kv_heads', None))


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, cache: PagedCache, layer: jax.Array, table: jax.Array, positions: jax.Array,
                 work: attention_paged.Work) -> tuple[jax.Array, PagedCache]:
    """Writes new keys and values to a layer's pages and attends to all that the rows' pages then hold.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H].
      cache, layer: pages of all layers, and which to use.
      table: int32 [B, n], pages of each row, counted on its own shard of the batch.
      positions: int32 [B, T], on one shard of the sequence axis; -1 where there is no token: nothing is written, and zeros come back.
        The 'ragged' backend takes rows of consecutive positions, with -1 at the end only.
      work: from plan_cache.

    Returns: [B, T, N, H] in q's dtype, and the cache.
    """
    heads, kv_heads = spec('batch', 'sequence', 'heads', None), spec('batch', 'sequence', 'kv_heads', None)
    pages_spec, backend = page_spec(cache.backend), PAGED_BACKENDS[cache.backend]

    def local(q, k, v, pages, table, positions, work, layer):
        L, P = pages.shape[:2]
        flat = pages.reshape(L * P, *pages.shape[2:])
        table = table + layer * P  # pages of all layers are one list: no layer is ever sliced out, so none is copied
        page = jnp.take_along_axis(table, jnp.maximum(positions, 0) // cache.page_size, axis=1, mode='clip')
        page = jnp.where(positions < 0, L * P - 1, page)
        flat = backend.write(k, v, flat, page, positions % cache.page_size)
        return backend.attend(q, flat, table, positions, work), flat.reshape(pages.shape)

    inputs = (heads, kv_heads, kv_heads, pages_spec, spec('batch', None), spec('batch', 'sequence'), _work_specs(), PartitionSpec())
    out, pages = jax.shard_map(local, in_specs=inputs, out_specs=(heads, pages_spec), check_vma=False)(
        q, k, v, cache.pages, table, positions, work, layer)
    return out, dataclasses.replace(cache, pages=pages)


def plan_cache(cache: PagedCache, table: jax.Array, positions: jax.Array) -> attention_paged.Work:
    """What attend_cache is to visit, the same for every layer: computed once a step."""
    inputs = (spec('batch', None), spec('batch', 'sequence'))
    plan = functools.partial(attention_paged.plan, page_size=cache.page_size)
    return jax.shard_map(plan, in_specs=inputs, out_specs=_work_specs(), check_vma=False)(table, positions)


def _work_specs() -> attention_paged.Work:
    return attention_paged.Work(*[spec('batch')] * 3)  # type: ignore[arg-type]
