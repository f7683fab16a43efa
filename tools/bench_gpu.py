"""One GPU against its own ceilings: decoding and SFT steps of Qwen3-4B's shape, and attention alone.

python tools/bench_gpu.py [--part=ceilings|decode|train|attention|all] [--tiny]      (one NVIDIA H100 80 GB; about four minutes)

ceilings (always): a bf16 matrix product and a copy, which all ratios are of. decode: the engine with all slots busy; a step must read each
weight once and the cache that is filled. train: bf16 parameters, one document a row, all of it trained, AdamW, or Adafactor where that
does not fit; FLOPs are the model's, without remat. Lines begin with the seconds since the start; what fails or comes too late says so in
one, and the rest goes on. Set XLA_PYTHON_CLIENT_MEM_FRACTION=.95 outside. `--tiny` tries the script itself, on any device.
"""

import dataclasses
import functools
import gc
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from qedjax import cli
from qedjax.metrics import mfu
from qedjax.model.attention import attend_packed
from qedjax.model.config import ModelConfig
from qedjax.model.presets import qwen3_4b_2507
from qedjax.model.transformer import Transformer
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, abstract, create, make_mesh, make_rollout_mesh, spec
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import OptimizerConfig, make_optimizer
from qedjax.train.step import init_state, make_train_step, place_batch
from qedjax.types import SamplingParams, TrainBatch

PART = flags.DEFINE_enum('part', 'all', ['ceilings', 'decode', 'train', 'attention', 'all'], 'What to measure beside the ceilings.')
SECONDS = flags.DEFINE_float('seconds', 240, 'Time for everything; nothing is begun when its part has no time left.')
TINY = flags.DEFINE_bool('tiny', False, 'A tiny model and tiny lengths.')
LATEST = {'decode': 0.4, 'train': 0.85, 'attention': 1.2}  # shares of SECONDS after which a part begins nothing more; the last is short
STEPS = 16  # decode steps a call
START = time.perf_counter()
CEILING = {'FLOP/s': math.nan, 'B/s': math.nan}


def say(text: str) -> None:
    print(f'{time.perf_counter() - START:5.0f} s  {text}', flush=True)


def attempt(name: str, run: Callable[[], None], latest: float = math.inf) -> bool:
    """Runs a case at the edge of what the device can do: what goes wrong is one line, and keeps no arrays. False if memory ran out."""
    if time.perf_counter() - START > latest * SECONDS.value:
        say(f'{name}: skipped, too late')
        return True
    fits = True
    try:
        run()
    except Exception as error:
        fits, where = 'memory' not in str(error).lower(), traceback.extract_tb(error.__traceback__)[-1]
        say(f'{name}: failed, {type(error).__name__}: {" ".join(str(error).split())[:300]} ({where.name}:{where.lineno})')
    gc.collect()
    return fits


def seconds(run: Callable[[], object]) -> float:
    """Median time of up to 7 runs, or of as many as 8 s allow but at least 3, less the first third, which warms up."""
    times: list[float] = []
    while len(times) < 7 and (len(times) < 3 or sum(times) < 8):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(times) // 3 :]))


def ceilings() -> None:
    n, values, calls = (256, 2**16, 2) if TINY.value else (8192, 2**28, 10)
    product, copy = jax.jit(lambda x, y: x @ y), jax.jit(lambda x: -x)
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    CEILING['FLOP/s'] = 2 * n**3 * calls / seconds(lambda: [product(x, y) for _ in range(calls)])
    say(f'ceiling: {CEILING["FLOP/s"] / 1e12:.1f} TFLOP/s of bf16 products of {n}^3')
    z = jax.random.normal(jax.random.key(2), (values,), jnp.float32)
    CEILING['B/s'] = 8 * values * calls / seconds(lambda: [copy(z) for _ in range(calls)])
    say(f'ceiling: {CEILING["B/s"] / 1e9:.0f} GB/s, read plus written, of copies of {4 * values / 1e9:.2f} GB')


@functools.cache
def model_of(cfg: ModelConfig):
    """What makes a fresh model; the same object for the same config, so that it is compiled once."""
    return lambda: Transformer(cfg, jax.random.key(0))


@functools.cache
def state_of(cfg: ModelConfig, optimizer: str):
    """The same for a train state, behind its transformation."""
    tx = make_optimizer(OptimizerConfig(optimizer, learning_rate=1e-6, schedule='constant', warmup_fraction=0.0), 1000)
    return tx, lambda: init_state(model_of(cfg)(), tx)


def decode(name: str, cfg: ModelConfig, slots: int, mesh) -> None:
    """Counts calls in which every row drew all its ids. The cache has one size for all slots, so that prefill is compiled once."""
    prompt, answer = (8, 96) if TINY.value else (64, 256)
    config = EngineConfig(slots=slots, staged=0, max_length=2 * answer, cache_tokens=128 * answer, steps=STEPS, prefill_tokens=prompt,
                          prefill_rows=(1,))
    model, start = create(model_of(cfg), mesh), time.perf_counter()
    engine = Engine(model, make_rollout_mesh(), config, cfg.vocab_size)
    warm_up, rng, marks = time.perf_counter() - start, np.random.default_rng(0), []
    requests = [engine.submit(rng.integers(0, cfg.vocab_size, prompt).tolist(), SamplingParams(1.0, answer, seed=i)) for i in range(slots)]
    while engine.pending:
        engine.step()
        marks.append((time.perf_counter(), engine.stats.row_steps, sum(request.length for request in requests)))
    full = [(b[0] - a[0], b[2]) for a, b in itertools.pairwise(marks) if b[1] - a[1] == slots * STEPS][1:-1]  # ends may hold other work
    step = float(np.median([took for took, _ in full])) / STEPS
    filled = float(np.mean([length for _, length in full])) + slots * STEPS / 2  # on GPUs, a call runs before the one ahead of it is read
    weights = cfg.num_params - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.embed_dim)
    size = jnp.dtype(cfg.dtype).itemsize * (weights + 2 * filled * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim)
    say(f'{name}: {slots / step:,.0f} tokens/s, {step * 1e3:.2f} ms a step (median of {len(full)} calls), {size / 1e9:.2f} GB to read in '
        f'it: {size / step / CEILING["B/s"]:.1%} of the copy\'s GB/s; warm-up {warm_up:.1f} s, {engine.stats.compilations} compiled after')


def train(name: str, cfg: ModelConfig, length: int, mesh) -> None:
    for optimizer in ('adamw', 'adafactor'):
        tried = f'{name}, {optimizer}'
        if attempt(tried, functools.partial(train_with, tried, cfg, length, optimizer, mesh), LATEST['train']):
            return


def train_with(name: str, cfg: ModelConfig, length: int, optimizer: str, mesh) -> None:
    """Compiles from shapes, before anything takes memory; then steps on a fresh state, if all fits."""
    (tx, make), start = state_of(cfg, optimizer), time.perf_counter()
    ids, ones = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, length + 1), np.int32), np.ones((1, length), np.int32)
    rows = ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones.cumsum(1, np.int32) - 1, ones
    batch, target = place_batch(TrainBatch(*map(jnp.asarray, rows)), mesh, 1), abstract(make, mesh)
    step = make_train_step(next_token_loss, tx, 1.0, 0).lower(target, batch).compile()
    took, m = time.perf_counter() - start, step.memory_analysis()
    needed = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    say(f'{name}: compiled in {took:.1f} s; {needed / 1e9:.1f} GB, of them {m.temp_size_in_bytes / 1e9:.1f} temporary')
    if needed > limit():
        raise MemoryError(f'more than the {limit() / 1e9:.1f} GB of memory')
    made = create(state_of(dataclasses.replace(cfg, attention='xla', remat='full'), optimizer)[1], mesh)  # one program for all cases
    state, metrics = jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(made)), {}
    del made

    def run():
        nonlocal state, metrics
        state, metrics = step(state, batch)
        return metrics

    rate = length / seconds(run)
    flops = cfg.flops_per_token(length) * rate
    share = mfu(flops)
    say(f'{name}: {rate:,.0f} tokens/s, {length / rate * 1e3:.0f} ms a step; {flops / 1e12:.1f} TFLOP/s: '
        f'{flops / CEILING["FLOP/s"]:.1%} of the product\'s, {"?" if share is None else f"{share:.1%}"} of the data sheet\'s; '
        f'loss {metrics["loss"]:.2f}, {metrics["skipped"]} steps skipped')


def attention(name: str, cfg: ModelConfig, T: int, mesh) -> None:
    heads = cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads, cfg.num_heads
    inputs = [jax.random.normal(jax.random.key(i), (1, T, n, cfg.head_dim), jnp.bfloat16) for i, n in enumerate(heads)]

    @jax.jit
    def run(q, k, v, d_out):
        out, backward = jax.vjp(lambda q, k, v: attend_packed(q, k, v, jnp.ones((1, T), jnp.int32), cfg), q, k, v)
        return out, *backward(jax.reshard(d_out, spec('batch', 'sequence', 'heads', None)))

    took = seconds(lambda: run(*inputs))
    flops = 6 * T**2 * cfg.num_heads * cfg.head_dim / took  # as flops_per_token counts: causal, nothing recomputed
    say(f'{name}: {took * 1e3:.2f} ms forward and backward; {flops / 1e12:.1f} TFLOP/s: {flops / CEILING["FLOP/s"]:.1%} of the product\'s')


def limit() -> float:
    return (jax.devices()[0].memory_stats() or {}).get('bytes_limit', math.inf)


def cases(cfg: ModelConfig) -> Iterator[tuple]:
    """(part, name, function, its arguments) in the order of running."""
    short, middle, long = (64, 96, 128) if TINY.value else (4096, 16_384, 32_768)
    for slots in (1, 2, 4) if TINY.value else (8, 32, 64):
        yield 'decode', f'{slots} slots', decode, (cfg, slots)
    for backend, length, remat in (('cudnn', short, 'full'), ('cudnn', middle, 'full'), ('cudnn', long, 'full'), ('xla', short, 'full'),
                                   ('cudnn', short, 'dots')):
        case = dataclasses.replace(cfg, attention=backend, remat=remat)
        yield 'train', f'1 x {length:,}, {backend}, remat {remat}', train, (case, length)
    for length, backend in itertools.product((short, middle), ('cudnn', 'xla')):
        yield 'attention', f'1 x {length:,}, {backend}', attention, (dataclasses.replace(cfg, attention=backend), length)


def main(_) -> None:
    cfg = dataclasses.replace(qwen3_4b_2507(), param_dtype='bfloat16', dtype='bfloat16')
    if TINY.value:
        cfg = dataclasses.replace(cfg, vocab_size=512, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
                                  attention_block=32)
    say(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {limit() / 1e9:.1f} GB; {cfg.num_params / 1e6:,.1f} M parameters')
    attempt('ceilings', ceilings)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for part, name, function, arguments in cases(cfg):
        if PART.value not in (part, 'all'):
            continue
        if 'cudnn' in name and jax.default_backend() != 'gpu':
            say(f'{part}, {name}: skipped, it needs an NVIDIA GPU')
            continue
        with jax.set_mesh(mesh):
            attempt(f'{part}, {name}', functools.partial(function, f'{part}, {name}', *arguments, mesh), LATEST[part])


if __name__ == '__main__':
    cli.run(main)
