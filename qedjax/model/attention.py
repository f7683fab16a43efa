"""Attention over packed rows and over the cache. Backends see local arrays only: one shard_map serves them all.

Packed rows are causal by index inside each segment; segment 0 is padding, attends to nothing and yields zeros. A
backend that cannot honour segment ids refuses; none drops them. Each names what remat='attention' keeps, in its own
layout, so that the output is stored once.
"""

import jax
import jax.numpy as jnp

from qedjax.model import attention_cudnn, attention_splash, attention_xla
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
    x = jax.reshard(x, spec('batch', None, None, None))
    return jnp.repeat(x, repeats, axis=2)


def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention of queries at `positions` to all cache slots at or before them.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H] with slot = position; positions: int32 [B, T].

    Returns: [B, T, N, H]; softmax in float32. Memory is B x N x T x S: for decode steps and short prefills.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H, out_sharding=spec('batch', None, 'kv_heads', None, None))
    scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k, preferred_element_type=jnp.float32) * H**-0.5
    visible = jnp.arange(k.shape[1]) <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum('BKGTS,BSKH->BTKGH', weights, v)
    return out.reshape(B, T, N, H, out_sharding=spec('batch', None, 'heads', None))
