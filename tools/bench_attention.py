"""Times chunked attention (the xla backend) against dense attention of the same inputs, forward and backward, on this machine.

  python tools/bench_attention.py [--lengths=512,1024,2048,4096] [--blocks=64,128,256,512] [--packed=8]

Prints milliseconds of the dense run and, for each block, the ratio chunked / dense (below 1: chunked is faster), once for
rows of one document and once for rows of --packed documents. Dense is jax.nn.dot_product_attention with the full mask.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qedjax.model import attention_xla

LENGTHS = flags.DEFINE_list('lengths', ['512', '1024', '2048', '4096'], 'positions of a row')
BLOCKS = flags.DEFINE_list('blocks', ['64', '128', '256', '512'], 'positions of a block')
PACKED = flags.DEFINE_integer('packed', 8, 'documents of a packed row')
HEADS = flags.DEFINE_integer('heads', 8, 'query heads; half as many kv heads')
HEAD_DIM = flags.DEFINE_integer('head_dim', 64, 'head dimension')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'dtype of queries, keys and values')


def dense(q, k, v, segment_ids):
    """The peer: XLA's attention with a mask of T x T."""
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation='xla')


def milliseconds(attend, inputs, repeats=3):
    """Least time of a forward and backward pass, compilation left out."""
    def loss(q, k, v, segment_ids):
        return jnp.sum(attend(q, k, v, segment_ids).astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    jax.block_until_ready(step(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main(argv):
    del argv
    rng = np.random.default_rng(0)
    print(f'{jax.devices()[0].device_kind}, B=1 N={HEADS.value} K={HEADS.value // 2} H={HEAD_DIM.value} {DTYPE.value}')
    print(f'{"T":>6} {"documents":>9} {"dense ms":>9}' + ''.join(f'{"C=" + block:>8}' for block in BLOCKS.value))
    for length in map(int, LENGTHS.value):
        q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, HEAD_DIM.value)), DTYPE.value)
                   for heads in (HEADS.value, HEADS.value // 2, HEADS.value // 2))
        for documents in (1, PACKED.value):
            inputs = q, k, v, jnp.asarray(1 + np.arange(length)[None] * documents // length, jnp.int32)
            base = milliseconds(dense, inputs)
            ratios = [milliseconds(lambda *x, block=int(block): attention_xla.attend(*x, block), inputs) / base
                      for block in BLOCKS.value]
            print(f'{length:>6} {documents:>9} {base:>9.1f}' + ''.join(f'{ratio:>8.2f}' for ratio in ratios), flush=True)


if __name__ == '__main__':
    app.run(main)
