"""cuDNN's fused attention on NVIDIA GPUs, for rows of one document each.

The public API knows a length per row but no segments. Whoever packs several documents into a row for it would train on
attention across documents, so such a row comes back as NaN, which no run survives unnoticed: SFT packs one document a
row when this backend is chosen. Packed rows on GPUs are for the xla backend.

remat='attention' keeps the output, but not the kernel's own residuals: the backward pass runs the kernel once more.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

DTYPES = (jnp.bfloat16, jnp.float16)
LARGEST_HEAD_DIM = 128


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int) -> jax.Array:
    """q [B, T, N, H], k, v [B, T, K, H], segment_ids [B, T] in {0, 1} with zeros last -> [B, T, N, H].

    `block` is the xla backend's and is not used. Raises ValueError off GPUs, for float32, and for head dimensions that
    the kernel has not.
    """
    if (platform := _platform()) not in ('gpu', 'cuda'):
        raise ValueError(f"attention 'cudnn' needs an NVIDIA GPU, but the mesh is of {platform} devices; "
                         "set model.attention to 'xla'")
    if q.dtype not in DTYPES:
        raise ValueError(f"attention 'cudnn' computes in bfloat16 or float16, not {q.dtype}; "
                         "set model.dtype to 'bfloat16'")
    if q.shape[-1] > LARGEST_HEAD_DIM or q.shape[-1] % 8:
        raise ValueError(f"attention 'cudnn' needs a head_dim that is a multiple of 8 up to {LARGEST_HEAD_DIM}, "
                         f"not {q.shape[-1]}; set model.attention to 'xla'")
    used = segment_ids > 0
    lengths = used.sum(-1, dtype=jnp.int32)
    # Beyond a row's length the kernel may leave anything, forward and backward: select zeros on both sides of it.
    q, k, v = (jnp.where(used[:, :, None, None], x, 0) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn',
                                       query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    one_document = (segment_ids == (jnp.arange(q.shape[1]) < lengths[:, None])).all(-1)
    out = jnp.where(used[:, :, None, None], out, 0)
    return checkpoint_name(jnp.where(one_document[:, None, None, None], out, jnp.nan), 'attention')


def _platform() -> str:
    return jax.sharding.get_abstract_mesh().abstract_device.platform
