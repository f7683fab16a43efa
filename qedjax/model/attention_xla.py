"""Chunked attention in plain XLA: exact, O(T) memory, own gradient (blockwise softmax of FlashAttention-2, Dao 2023).

Runs on local arrays (inside shard_map), so loop bounds may depend on data: a block of queries starts at the first
block of keys that may share a segment with it, so a packed row costs what its documents cost and padding costs nothing.

Letters besides the model's: G query heads a kv head, C positions a block, Q / S positions of a query / key block, I blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NEGATIVE = -1e30  # finite: exp(NEGATIVE - NEGATIVE) must not be NaN in rows that see nothing


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int) -> jax.Array:
    """q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] -> [B, T, N, H]. Rows of one block take one dense step."""
    T = q.shape[1]
    if block >= T:
        return _dense(q, k, v, segment_ids)
    pad = -T % block
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    return _chunked(q, k, v, segment_ids, block)[:, :T]


def _dense(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], -1, H)
    scores = jnp.einsum('BQKGH,BSKH->BKGQS', q, k, preferred_element_type=jnp.float32) * H**-0.5
    visible = _visible(segment_ids, segment_ids, 0, 0)[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, NEGATIVE), axis=-1) * visible
    out = jnp.einsum('BKGQS,BSKH->BQKGH', weights.astype(v.dtype), v).reshape(B, T, N, H)
    return checkpoint_name(out, 'attention')


def _visible(query_segments: jax.Array, key_segments: jax.Array, query_start, key_start) -> jax.Array:
    """Mask [B, Q, S]: same segment, not padding, key not after query."""
    query = query_start + jnp.arange(query_segments.shape[1])[:, None]
    key = key_start + jnp.arange(key_segments.shape[1])[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (query_segments[:, :, None] > 0) & (key <= query)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q, k, v, segment_ids, block):
    return _forward(q, k, v, segment_ids, block)[0]


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, K, (G,) H] -> [I, B, K, (G,) C, H]."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, T // block, block, *x.shape[2:]), (1, 2), (0, -2))


def _rows(x: jax.Array) -> jax.Array:
    """Inverse of _blocks."""
    x = jnp.moveaxis(x, (0, -2), (1, 2))
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _meeting(segments: jax.Array) -> jax.Array:
    """Whether blocks i and j may share a segment, bool [I, I]: ranges of ids in segments [I, B, C] overlap in a row."""
    high = segments.max(-1)
    low = jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max).min(-1)
    return ((low[:, None] <= high[None, :]) & (low[None, :] <= high[:, None])).any(-1)


def _split(q, k, v, segment_ids, block):
    B, T, _, H = q.shape
    query_blocks = _blocks(q.reshape(B, T, k.shape[2], -1, H), block)
    segments = jnp.moveaxis(segment_ids.reshape(B, -1, block), 1, 0)
    return query_blocks, _blocks(k, block), _blocks(v, block), segments, H**-0.5


def _forward(q, k, v, segment_ids, block):
    """Output [B, T, N, H] and log-sum-exp of scores [I, B, K, G, C] in float32."""
    qs, ks, vs, segments, scale = _split(q, k, v, segment_ids, block)
    count = len(ks)
    meeting = _meeting(segments)
    # First key block that query block i may meet: at most i, but a block of padding meets none, itself included.
    first = jnp.where(meeting.any(1), jnp.argmax(meeting, axis=1), count)

    def query_block(_, inputs):
        i, q_i, segments_i = inputs

        def key_block(j, carry):
            highest, total, out = carry
            scores = jnp.einsum('BKGQH,BKSH->BKGQS', q_i, ks[j], preferred_element_type=jnp.float32) * scale
            visible = _visible(segments_i, segments[j], i * block, j * block)[:, None, None]
            scores = jnp.where(visible, scores, NEGATIVE)
            new_highest = jnp.maximum(highest, scores.max(-1))
            weights = jnp.exp(scores - new_highest[..., None]) * visible
            decay = jnp.exp(highest - new_highest)
            update = jnp.einsum('BKGQS,BKSH->BKGQH', weights.astype(v.dtype), vs[j], preferred_element_type=jnp.float32)
            return new_highest, total * decay + weights.sum(-1), out * decay[..., None] + update

        shape = q_i.shape[:-1]
        start = (jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros(q_i.shape, jnp.float32))
        highest, total, out = jax.lax.fori_loop(first[i], i + 1, key_block, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((out / total[..., None]).astype(q.dtype), highest + jnp.log(total))

    _, (out, lse) = jax.lax.scan(query_block, None, (jnp.arange(count), qs, segments))
    return _rows(out).reshape(q.shape), lse


def _forward_residuals(q, k, v, segment_ids, block):
    out, lse = _forward(q, k, v, segment_ids, block)
    out, lse = checkpoint_name(out, 'attention'), checkpoint_name(lse, 'attention')
    return out, (q, k, v, segment_ids, out, lse)


def _backward(block, residuals, d_out):
    q, k, v, segment_ids, out, lse = residuals
    qs, ks, vs, segments, scale = _split(q, k, v, segment_ids, block)
    count, shape = len(ks), (*q.shape[:2], k.shape[2], -1, q.shape[3])
    d_outs = _blocks(d_out.reshape(shape), block)
    inner = jnp.sum(d_outs.astype(jnp.float32) * _blocks(out.reshape(shape), block).astype(jnp.float32), axis=-1)
    meeting = _meeting(segments)
    # Last query block that key block j may meet; none for a block of padding.
    last = jnp.where(meeting.any(1), count - 1 - jnp.argmax(meeting[:, ::-1], axis=1), -1)

    def key_block(d_qs, inputs):
        j, k_j, v_j, segments_j = inputs

        def query_block(i, carry):
            d_qs, d_k, d_v = carry
            scores = jnp.einsum('BKGQH,BKSH->BKGQS', qs[i], k_j, preferred_element_type=jnp.float32) * scale
            visible = _visible(segments[i], segments_j, i * block, j * block)[:, None, None]
            weights = jnp.where(visible, jnp.exp(scores - lse[i][..., None]), 0.0)
            d_weights = jnp.einsum('BKGQH,BKSH->BKGQS', d_outs[i], v_j, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - inner[i][..., None]) * scale).astype(q.dtype)
            weights = weights.astype(q.dtype)
            d_v += jnp.einsum('BKGQS,BKGQH->BKSH', weights, d_outs[i], preferred_element_type=jnp.float32)
            d_k += jnp.einsum('BKGQS,BKGQH->BKSH', d_scores, qs[i], preferred_element_type=jnp.float32)
            d_q = jnp.einsum('BKGQS,BKSH->BKGQH', d_scores, k_j, preferred_element_type=jnp.float32)
            return d_qs.at[i].add(d_q), d_k, d_v

        zeros = jnp.zeros(k_j.shape, jnp.float32)
        d_qs, d_k, d_v = jax.lax.fori_loop(j, last[j] + 1, query_block, (d_qs, zeros, zeros))
        return d_qs, (d_k.astype(k.dtype), d_v.astype(v.dtype))

    blocks = (jnp.arange(count), ks, vs, segments)
    d_qs, (d_ks, d_vs) = jax.lax.scan(key_block, jnp.zeros(qs.shape, jnp.float32), blocks)
    return _rows(d_qs).reshape(q.shape).astype(q.dtype), _rows(d_ks), _rows(d_vs), None


_chunked.defvjp(_forward_residuals, _backward)
