"""One peer of bench_rollout.py, in its own environment (nothing of this project is imported): google-tunix's sampler on a JSON job.

Prints [seconds until each batch was handed over, seconds in all, seconds of warm-up]. Its decode loop is compiled for every number of
steps, so batches are rounded up to eighths of the longest: eight programs, compiled before the clock starts.
"""

import json
import math
import pathlib
import sys
import time

import jax
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors


class Ids:
    """A tokenizer whose texts are ids; its EOS id is never drawn, so rows run for as long as they are told."""

    def encode(self, text, **_):
        return [int(i) for i in text.split()]

    def decode(self, ids, **_):
        return ' '.join(map(str, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return -5

    def pad_id(self):
        return 0


def main(path):
    job = json.loads(pathlib.Path(path).read_text())
    cfg = json.loads(pathlib.Path(job['folder'], 'config.json').read_text())
    config = qwen3.ModelConfig(
        num_layers=cfg['num_hidden_layers'], vocab_size=cfg['vocab_size'], embed_dim=cfg['hidden_size'],
        hidden_dim=cfg['intermediate_size'], num_heads=cfg['num_attention_heads'],
        head_dim=cfg['head_dim'], num_kv_heads=cfg['num_key_value_heads'], rope_theta=1_000_000,
        norm_eps=cfg['rms_norm_eps'], use_tied_embedding=cfg['tie_word_embeddings'])
    mesh = jax.make_mesh((1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = create_model_from_safe_tensors(job['folder'], config, mesh)
    prompt = 2 ** math.ceil(math.log2(max(map(len, job['prompts'])) + 1))  # with its BOS id, as the sampler pads it
    sampler = Sampler(model, Ids(), CacheConfig(job['most'] + prompt, config.num_layers, config.num_kv_heads, config.head_dim))

    def run(part, steps):
        sampler([' '.join(map(str, p)) for p in part], steps, prompt, temperature=1.0, top_p=1.0, top_k=None, seed=0)

    slots, eighth = job['slots'], job['most'] // 8
    parts = [(job['prompts'][i : i + slots], -(-max(job['lengths'][i : i + slots]) // eighth) * eighth)
             for i in range(0, len(job['prompts']), slots)]
    start = time.perf_counter()
    for shape in sorted({(len(part), steps) for part, steps in parts}):
        run(next(part for part, steps in parts if (len(part), steps) == shape), shape[1])
    warm_up, start, first = time.perf_counter() - start, time.perf_counter(), []
    for part, steps in parts:
        run(part, steps)
        first.append(time.perf_counter() - start)
    print(json.dumps([first, time.perf_counter() - start, warm_up]))


main(sys.argv[1])
