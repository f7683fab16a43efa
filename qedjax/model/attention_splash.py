"""Splash attention: JAX's Pallas kernel for TPU, with a lazy causal mask and segment ids.

Off TPU it runs in interpret mode, for tests.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

# Positions a block, forward and backward. Larger blocks keep the matrix unit busy and shrink the mask tables of long
# rows; beyond 1024 the scores of a block (block x block x 4 bytes, several copies) no longer fit VMEM. The kernel takes
# no less than 128.
BLOCKS = (1024, 512, 256, 128)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int) -> jax.Array:
    """q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] -> [B, T, N, H]; `block` is the xla backend's, not used.

    Rows are padded to whole blocks. Padding attends to padding inside the kernel, so its outputs are zeroed after it,
    and with them its gradients. The scale goes into q, in q's dtype.
    """
    T = q.shape[1]
    size = block_size(T)
    pad = -T % size
    q *= q.shape[-1]**-0.5
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    segments = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    mask = splash.MultiHeadMask([splash.CausalMask((T + pad, T + pad))] * q.shape[1])
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=_block_sizes(size),
                                    residual_checkpoint_name='attention', interpret=not _on_tpu())
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)[:, :T]
    return jnp.where((segment_ids > 0)[:, :, None, None], out, 0)


def block_size(length: int) -> int:
    """The largest block that pads a row of `length` positions by less than a quarter, else the smallest block."""
    return next((size for size in BLOCKS if -length % size < length / 4), BLOCKS[-1])


def _on_tpu() -> bool:
    """Whether the mesh in force is of TPUs; the default backend would be wrong when compiling for another machine."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform == 'tpu'


def _block_sizes(size: int) -> splash.BlockSizes:
    """One backward kernel for all gradients: 5 products, not the 7 of two, but a partial dQ in q's dtype for every block of keys."""
    compute = min(size, 512)  # keys a step inside a block: bounds the scores that are alive at once
    return splash.BlockSizes(block_q=size, block_kv=size, block_kv_compute=compute, block_q_dkv=size, block_kv_dkv=size,
                             block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
