"""Where the time of RL goes: synchronous against in-flight learning, with answers of very unequal length and a judge that takes its time.

python tools/bench_rl.py [--steps=8 --latency=2 --max_tokens=512]

A random model of 3 million parameters answers through a real HTTP judge that takes `latency` seconds. Lengths are log-normal (sigma 1), by
forcing the end of an answer at a length that its seed decides, so both modes write answers of the same distribution. The first steps, which
compile, are not timed. Prints samples a second and the shares of decoding, learning and idle devices.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax
import numpy as np
from absl import flags

from qedjax import cli
from qedjax.checkpoint.hf import save_hf
from qedjax.data.sources import Source
from qedjax.grading.judge import JudgeConfig
from qedjax.llm.remote import RemoteConfig
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rl import actor, loop
from qedjax.rl.config import RLConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import ScriptedServer, tiny_tokenizer
from qedjax.train.optimizer import OptimizerConfig

STEPS = flags.DEFINE_integer('steps', 8, 'Timed steps of each mode.')
WARM_UP = flags.DEFINE_integer('warm_up', 2, 'Steps before the clock starts.')
LATENCY = flags.DEFINE_float('latency', 2.0, 'Seconds that the judge takes.')
MEAN = flags.DEFINE_integer('mean', 80, 'Mean length of answers.')
MAX_TOKENS = flags.DEFINE_integer('max_tokens', 512, 'Longest answer.')
LAG = flags.DEFINE_integer('max_lag', 4, 'Versions that in-flight learning allows.')
GROUPS, SIZE = 8, 8


class LongTailed(actor.Actor):
    """Asks for answers of log-normal length."""

    async def rollout(self, problem, params):
        rng = np.random.default_rng((params.seed, params.sample))
        length = int(np.clip(rng.lognormal(np.log(MEAN.value) - 0.5, 1.0), 1, MAX_TOKENS.value))
        return await super().rollout(problem, dataclasses.replace(params, max_tokens=length, stop_ids=()))


def config(folder: pathlib.Path, base_url: str, max_lag: int) -> RLConfig:
    """The run of one mode."""
    row = 64 + MAX_TOKENS.value
    return RLConfig(
        init=str(folder / 'model'), model=ModelConfig(dtype='float32', attention_block=128, remat='none'),
        train=Source(str(folder / 'problems.jsonl')), problems=ProblemsConfig(max_prompt=64), group_size=SIZE, groups=GROUPS,
        steps=WARM_UP.value + STEPS.value, temperature=1.0, max_tokens=MAX_TOKENS.value, max_lag=max_lag,
        in_flight=3 * GROUPS if max_lag else 0, judge=JudgeConfig(RemoteConfig(base_url, 'judge', concurrency=256)),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule='constant', warmup_fraction=0.0), mesh=MeshConfig(data=-1, fsdp=1),
        row_length=row, micro_rows=4, save_every=10**6, engine=EngineConfig(slots=16, staged=16, steps=16, prefill_tokens=512))


def main(_) -> None:
    actor.Actor, loop.Actor = LongTailed, LongTailed
    cfg = ModelConfig(vocab_size=288, embed_dim=256, mlp_dim=768, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32,
                      max_positions=4096, dtype='float32', remat='none')
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_hf(create(lambda: Transformer(cfg, jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1])), folder / 'model')
        tiny_tokenizer('none').save_pretrained(folder / 'model')
        rows = [json.dumps({'problem': f'problem {i}', 'rubric': 'any'}) for i in range(256)]
        (folder / 'problems.jsonl').write_text('\n'.join(rows) + '\n')
        rates = {}
        for mode, lag in (('synchronous', 0), ('in flight', LAG.value)):
            with ScriptedServer(lambda number, _: (LATENCY.value, f'<score>{number % 8}</score>')) as server:
                loop.train(config(folder, server.base_url, lag), str(folder / mode.replace(' ', '_')))
            lines = (folder / mode.replace(' ', '_') / 'metrics.jsonl').read_text().splitlines()
            rates[mode] = report(mode, [json.loads(line) for line in lines][WARM_UP.value :])
        print(f'in flight / synchronous: {rates["in flight"] / rates["synchronous"]:.2f}')


def report(mode: str, steps: list[dict]) -> float:
    """Prints one line, and returns samples a second."""
    seconds = sum(step['seconds'] for step in steps)
    rate = GROUPS * SIZE * len(steps) / seconds
    shares = {part: sum(step[f'share/{part}'] * step['seconds'] for step in steps) / seconds for part in ('decode', 'learn', 'idle')}
    stale = sum(step['dropped/stale'] for step in steps)
    print(f'{mode:>12}: {rate:.2f} samples/s, ' + ', '.join(f'{part} {share:.1%}' for part, share in shares.items())
          + f', lag at most {max(step["lag_max"] for step in steps):.0f}, {stale:.0f} stale groups', flush=True)
    return rate


if __name__ == '__main__':
    cli.run(main)
