"""What only a GPU can show: the cudnn backend and the engine agree with the xla backend and with the trainer there; then their speed.

python tools/check_gpu.py      (one NVIDIA GPU; about two minutes)
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from qedjax import cli
from qedjax.model.attention import attend_packed
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.train.lm_head import token_stats
from qedjax.types import SamplingParams

SMALL = ModelConfig(vocab_size=1024, embed_dim=512, mlp_dim=1024, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64,
                    param_dtype='bfloat16', dtype='bfloat16', remat='none', max_positions=2048)


def relative(actual, expected) -> float:
    """Largest difference over the largest expected value."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check_cudnn() -> None:
    """Outputs and gradients of one document a row, with padding, against the xla backend; then the time of both."""
    B, T, N, K, H = 2, 2048, 16, 8, 128
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.bfloat16) for heads in (N, K, K)]
    segments = jnp.asarray(np.arange(T)[None] < np.array([[T], [T - 300]]), jnp.int32)
    results, times = {}, {}
    for backend in ('xla', 'cudnn'):
        cfg = ModelConfig(attention=backend)

        @jax.jit
        def run(q, k, v, cfg=cfg):
            def loss(q, k, v):
                out = attend_packed(q, k, v, segments, cfg)
                return jnp.sum(jnp.square(out.astype(jnp.float32))), out

            gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
            return out, *gradients

        results[backend] = jax.block_until_ready(run(*inputs))
        start = time.perf_counter()
        for _ in range(10):
            last = run(*inputs)
        jax.block_until_ready(last)
        times[backend] = (time.perf_counter() - start) / 10 * 1e3
    errors = [relative(c, x) for c, x in zip(results['cudnn'], results['xla'], strict=True)]
    print(f'cudnn against xla, out dq dk dv: {[f"{e:.1e}" for e in errors]}; ms forward and backward of {B}x{T}: {times}')
    assert max(errors) < 2e-2, errors


def check_engine() -> None:
    """Log-probs of sampled ids against the trainer's, in both dtypes."""
    for dtype, tolerance in (('float32', 2e-3), ('bfloat16', 5e-2)):  # products of float32 are TF32 on these devices
        cfg = dataclasses.replace(SMALL, dtype=dtype, param_dtype=dtype)
        model = create(lambda cfg=cfg: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
        engine = Engine(model, make_rollout_mesh(), EngineConfig(max_length=512), 1000)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 1000, n).tolist() for n in rng.integers(2, 200, 40)]
        start = time.perf_counter()
        completions = engine.generate(prompts, [SamplingParams(0.8, 256, seed=i) for i in range(40)])
        seconds = time.perf_counter() - start

        @jax.jit
        def replay(model, ids):
            x = model(ids, jnp.arange(512)[None], jnp.ones_like(ids))
            return token_stats(x, model.head, jnp.roll(ids, -1, axis=1), num_valid=1000, temperature=0.8).logprob

        worst = 0.0
        with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
            for c in completions:
                ids = np.zeros((1, 512), np.int32)
                ids[0, : len(c.prompt_ids) + 256] = c.prompt_ids + c.ids
                want = np.asarray(replay(model, ids))[0, len(c.prompt_ids) - 1 :][:256]
                worst = max(worst, float(np.abs(want - c.logprobs).max()))
        print(f'engine against trainer, {dtype}: {worst:.1e}; {40 * 256 / seconds:.0f} tokens/s, {engine.stats.compilations} compilations')
        assert worst < tolerance


def main(_) -> None:
    print(jax.devices(), jax.__version__)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        check_cudnn()
    check_engine()


if __name__ == '__main__':
    cli.run(main)
