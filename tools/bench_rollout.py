"""The rollout engine against transformers.generate and google-tunix's sampler: same weights, same requests, same slots.

python tools/bench_rollout.py [--tunix_python=VENV/bin/python] [--requests=64,512] [--workloads=80:256,400:2048] [--preset=qwen3_0_6b]

Request i wants exactly L_i ids, L log-normal (sigma 1) with the given mean and most, sampled at temperature 1; prompts have 8 to 64
ids. Peers with static batches take the requests in order, 16 at a time, and each batch runs until its longest row is done: what they draw
beyond a row's own length is not useful. Warm-up is not timed. transformers needs torch (`pip install -e '.[parity]'`); tunix wants older
libraries than we do, so it runs in its own environment: `python -m venv VENV; VENV/bin/pip install google-tunix==0.1.7 'jax<0.11'`.
"""

import json
import pathlib
import subprocess
import tempfile
import time

import jax
import numpy as np
from absl import flags

from qedjax import cli
from qedjax.checkpoint.hf import save_hf
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.types import SamplingParams

REQUESTS = flags.DEFINE_list('requests', ['64', '512'], 'Numbers of requests.')
WORKLOADS = flags.DEFINE_list('workloads', ['80:256', '400:2048'], 'mean:most of the completion lengths.')
SLOTS = flags.DEFINE_integer('slots', 16, 'Requests decoded at a time, by everyone.')
STEPS = flags.DEFINE_integer('steps', 16, 'Decode steps a call of the engine.')
PAGE = flags.DEFINE_integer('page_size', 64, 'Positions a page of the engine.')
PRESET = flags.DEFINE_enum('preset', 'tiny', ['tiny', 'qwen3_0_6b'], 'Shape of the model.')
TUNIX = flags.DEFINE_string('tunix_python', None, 'Python of an environment with google-tunix; left out if unset.')
PEERS = flags.DEFINE_list('peers', ['transformers', 'tunix'], 'Whom to compare with.')
MODELS = {
    'tiny': ModelConfig(vocab_size=512, embed_dim=256, mlp_dim=768, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32,
                        max_positions=4096, dtype='float32', remat='none'),
    'qwen3_0_6b': ModelConfig(vocab_size=151_936, embed_dim=1024, mlp_dim=3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
                              max_positions=4096, param_dtype='bfloat16', dtype='bfloat16', remat='none'),
}


def workload(count: int, mean: int, most: int, vocab: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and the length of each completion."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, count), 1, most).astype(int).tolist()
    return [rng.integers(3, vocab, rng.integers(8, 65)).tolist() for _ in range(count)], lengths


def measure_engine(model: Transformer, prompts, lengths, most: int) -> dict[str, float]:
    """Our numbers; first tokens are timed by their first appearance on the host."""
    config = EngineConfig(slots=SLOTS.value, staged=SLOTS.value, max_length=most + 64, page_size=PAGE.value, steps=STEPS.value,
                          cache_tokens=2 * SLOTS.value * (most + 64))
    start = time.perf_counter()
    engine = Engine(model, make_rollout_mesh(), config, model.cfg.vocab_size)
    warm_up = time.perf_counter() - start
    start, first, busy = time.perf_counter(), {}, None
    requests = [engine.submit(p, SamplingParams(1.0, n, seed=i)) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))]
    while engine.pending:
        engine.step()
        now = time.perf_counter() - start
        first |= {i: now for i, r in enumerate(requests) if r.ids and i not in first}
        if busy is None and engine.queued == 0:
            busy = engine.stats.row_steps / max(engine.stats.slot_steps, 1)
    seconds, stats = time.perf_counter() - start, engine.stats
    assert [len(r.ids) for r in requests] == lengths
    return {'tokens/s': sum(lengths) / seconds, 'utilisation': stats.row_steps / stats.slot_steps, 'while queued': busy or 0.0,
            'first, median s': float(np.median(list(first.values()))), 'first, p95 s': float(np.percentile(list(first.values()), 95)),
            'host share': stats.worked / seconds, 'seconds': seconds, 'warm-up s': warm_up}


def batches(prompts, lengths):
    """Static batches in order of arrival."""
    for start in range(0, len(prompts), SLOTS.value):
        yield prompts[start : start + SLOTS.value], lengths[start : start + SLOTS.value]


def static_result(first: list[float], lengths, seconds: float, slots: int) -> dict[str, float]:
    """Numbers of a static-batch sampler; `first` holds one time a batch."""
    steps = sum(slots * max(part) for _, part in batches(lengths, lengths))
    return {'tokens/s': sum(lengths) / seconds, 'utilisation': sum(lengths) / steps, 'first, median s': float(np.median(first)),
            'first, p95 s': float(np.percentile(first, 95)), 'seconds': seconds}


def measure_transformers(folder: str, prompts, lengths) -> dict[str, float]:
    """Left-padded static batches with its default cache."""
    import torch
    import transformers

    device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='auto').to(device).eval()
    model.generation_config.eos_token_id = None

    def run(part, count):
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=count,
                           min_new_tokens=count, pad_token_id=0)
            torch.cuda.synchronize() if device == 'cuda' else None

    run(prompts[: SLOTS.value], 8)
    start, first = time.perf_counter(), []
    for part, wanted in batches(prompts, lengths):
        run(part, max(wanted))
        first.append(time.perf_counter() - start)  # it hands over whole completions
    return static_result(first, lengths, time.perf_counter() - start, SLOTS.value)


def measure_tunix(folder: str, prompts, lengths, most: int) -> dict[str, float]:
    """Runs tools/bench_tunix.py in the other environment."""
    job = {'folder': folder, 'prompts': prompts, 'lengths': lengths, 'most': most, 'slots': SLOTS.value}
    with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
        json.dump(job, file)
        file.flush()
        script = pathlib.Path(__file__).with_name('bench_tunix.py')
        done = subprocess.run([TUNIX.value, str(script), file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'tunix failed: {done.stderr[-2000:]}')
    first, seconds, warm_up = json.loads(done.stdout.splitlines()[-1])
    return static_result(first, lengths, seconds, SLOTS.value) | {'warm-up s': warm_up}


def main(_) -> None:
    cfg = MODELS[PRESET.value]
    model = create(lambda: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {PRESET.value}: {cfg.num_params / 1e6:.1f} M parameters, {cfg.dtype}, '
          f'{SLOTS.value} slots')
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        for mean, most in (map(int, w.split(':')) for w in WORKLOADS.value):
            for count in map(int, REQUESTS.value):
                prompts, lengths = workload(count, mean, most, cfg.vocab_size)
                results = {'engine': measure_engine(model, prompts, lengths, most)}
                if 'transformers' in PEERS.value:
                    results['transformers'] = measure_transformers(folder, prompts, lengths)
                if 'tunix' in PEERS.value and TUNIX.value:
                    results['tunix'] = measure_tunix(folder, prompts, lengths, most)
                report(f'{count} requests, mean {mean}, most {most}: {sum(lengths)} ids', results)


def report(title: str, results: dict[str, dict[str, float]]) -> None:
    """One table."""
    print(f'\n{title}')
    columns = list(results['engine'])
    print(f'{"":>14}' + ''.join(f'{name:>16}' for name in columns))
    for who, row in results.items():
        print(f'{who:>14}' + ''.join(f'{row[name]:>16.3f}' if name in row else f'{"":>16}' for name in columns))
    peers = [row['tokens/s'] for who, row in results.items() if who != 'engine']
    if peers:
        print(f'engine / better peer: {results["engine"]["tokens/s"] / max(peers):.2f}', flush=True)


if __name__ == '__main__':
    cli.run(main)
