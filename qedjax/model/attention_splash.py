"""Splash attention: JAX's Pallas kernel for TPU, with a lazy causal mask and segment ids. Off TPU it runs in interpret mode, for tests."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, CausalMask, MultiHeadMask, SegmentIds, make_splash_mha

LANES = 128  # block sizes are multiples of it, and so are rows
# Blocks of queries and keys, forward and backward. Larger blocks keep the matrix unit busy and shrink the mask tables of long rows, until
# the scores of a block (block x block x 4 bytes, several copies) fill VMEM.
LARGEST_BLOCK = 1024


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int) -> jax.Array:
    """q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] -> [B, T, N, H]; `block` is the xla backend's and is not used.

    Rows are padded to whole blocks. Padding attends to padding inside the kernel, so its outputs are zeroed after it, and with them its
    gradients.
    """
    T = q.shape[1]
    size = min(LARGEST_BLOCK, -(-T // LANES) * LANES)
    pad = -T % size
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * q.shape[-1]**-0.5, k, v))
    segments = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    kernel = make_splash_mha(
        MultiHeadMask([CausalMask((T + pad, T + pad))] * q.shape[1]), head_shards=1, q_seq_shards=1, block_sizes=_block_sizes(size),
        residual_checkpoint_name='attention', interpret=not _on_tpu())
    out = jax.vmap(kernel)(q, k, v, SegmentIds(segments, segments)).swapaxes(1, 2)[:, :T]
    return jnp.where((segment_ids > 0)[:, :, None, None], out, 0)


def _on_tpu() -> bool:
    """Whether the mesh in force is of TPUs: the default backend would be wrong when compiling ahead of time for another machine."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform == 'tpu'


def _block_sizes(size: int) -> BlockSizes:
    return BlockSizes(block_q=size, block_kv=size, block_kv_compute=min(size, 512), block_q_dkv=size, block_kv_dkv=size,
                      block_kv_dkv_compute=min(size, 512), block_q_dq=size, block_kv_dq=size)
