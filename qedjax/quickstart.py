"""The whole recipe in small: a decoder of about a million parameters learns to prove derivations from a noisy teacher, on a laptop CPU.

Stages: make the data, SFT from scratch, RL with rubric rewards, RL from states of the reasoning cache, held-out scores of the three
models against turns, export to Hugging Face and verification. An answer's budget is two lines, and the problems have six to eight: one
answer cannot prove them, a chain of eight turns can, and RL sees the first four. Each stage has something to learn that the one before
it cannot teach: the teacher slips in arithmetic (RL cures that), and when it continues from a summary it skips a line or starts again
(RL from states cures that).
"""

import asyncio
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging

from qedjax.checkpoint.hf import save_hf, verify_hf
from qedjax.checkpoint.load import HF_FILES, load_model, load_tokenizer, saved_config
from qedjax.data.chat import num_valid_ids, stop_ids
from qedjax.data.derivations import Problem, chain_rows, parse_problem, problems
from qedjax.data.sources import Source
from qedjax.grading.derivations import grade, rubric
from qedjax.grading.grade import FULL
from qedjax.grading.rubric import render
from qedjax.llm.local import LocalEndpoint
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.reasoning_cache import curve as curves_of
from qedjax.reasoning_cache.curve import Point
from qedjax.reasoning_cache.decoder import Decoder, PhaseConfig, RCConfig, Writer, decode
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import State, Trace, begin
from qedjax.rl import loop
from qedjax.rl.chains import ChainsConfig
from qedjax.rl.config import RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, make_mesh, rollout_mesh_of_all
from qedjax.testing import tiny_tokenizer
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import SFTConfig, train

TAUGHT, ASKED = (2, 8), (6, 8)  # steps of a problem: of the teacher's, and of those that RL trains on and that are graded
BUDGET = 18  # tokens (bytes) of an answer: two lines, or `From b=9` and one more
DECODING = RCConfig(4, PhaseConfig(BUDGET, 1.0), PhaseConfig(5, 1.0), prompts=RENDERINGS['derivations'])
MODELS = {'SFT': 'sft', 'RL': 'rl', 'RC-RL': 'rc'}


def _sft() -> SFTConfig:
    return SFTConfig(
        model=ModelConfig(vocab_size=288, embed_dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
                          max_positions=1024, rope_theta=1e4, init_std=0.1, dtype='float32', attention_block=256, remat='none'),
        format='pair', row_length=256, batch_size=2, save_every=500,
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.05, b2=0.98, weight_decay=0.01))


def _rl() -> RLConfig:
    return RLConfig(
        model=ModelConfig(dtype='float32', attention_block=256, remat='none'), grader='derivations', problems=ProblemsConfig(max_prompt=64),
        group_size=8, groups=16, steps=30, temperature=1.0, max_tokens=BUDGET, row_length=256, micro_rows=8, save_every=10,
        objective=ObjectiveConfig(zero_variance='keep'), engine=EngineConfig(slots=32, staged=32, prefill_tokens=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule='constant', warmup_fraction=0.0, b2=0.98, clip_norm=0.3))


@dataclasses.dataclass(unsafe_hash=True)
class QuickstartConfig:
    """Sizes of the demonstration.

    Attributes:
      documents: of the teacher, to train on: proofs, continuations of proofs, summaries.
      slip: share of the teacher's lines whose arithmetic is wrong.
      wrong: share of the teacher's summaries that are wrong.
      rl_problems: training problems that both kinds of RL draw from.
      problems: held-out problems, of each of which a chain is graded after each of `turns`.
      sft, rl, rc: the runs; their data, tokenizer, checkpoint and seed are set here.
      seed: of everything.
    """

    documents: int = 30_000
    slip: float = 0.1
    wrong: float = 0.03
    rl_problems: int = 4096
    problems: int = 256
    turns: tuple[int, ...] = (1, 2, 4, 8, 16)
    sft: SFTConfig = dataclasses.field(default_factory=_sft)
    rl: RLConfig = dataclasses.field(default_factory=_rl)
    rc: RLConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(_rl(), steps=25, chains=ChainsConfig(2, DECODING)))
    seed: int = 0


def run(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> dict[str, list[Point]]:
    """Runs every stage in `workdir`, prints and plots the curves, and returns them by model.

    An interrupted run goes on with its last checkpoint. Raises ValueError if the workdir holds a finished one.
    """
    workdir, started = pathlib.Path(workdir), time.monotonic()
    data, rc, export = (workdir / name for name in ('data', 'rc', 'export'))
    if export.exists():
        raise ValueError(f'{workdir} holds a finished quickstart; delete it or name another --workdir')
    if cfg.problems < 2:
        raise ValueError(f'problems={cfg.problems} are too few for an interval; grade at least 2')
    logging.info('1/6 data: %d documents of a teacher that slips in %.0f%% of its lines', cfg.documents, 100 * cfg.slip)
    write_data(cfg, data)
    logging.info('2/6 SFT from random weights')
    sft = dataclasses.replace(cfg.sft, tokenizer=str(data / 'tokenizer'), train=Source(str(data / 'train.jsonl')),
                              evaluation=Source(str(data / 'held_out.jsonl')), seed=cfg.seed)
    # Small steps teach this model most, so there may be fewer rows than devices.
    train(sft, str(workdir / 'sft'), devices=jax.devices()[: math.gcd(jax.device_count(), sft.batch_size)])
    logging.info('3/6 RL with rubric rewards')
    loop.train(rl_config(cfg, workdir), str(workdir / 'rl'))
    logging.info('4/6 RL from states of the reasoning cache')
    loop.train(rc_config(cfg, workdir), str(rc))
    logging.info('5/6 chains of turns on held-out problems')
    curves = compare(cfg, {name: workdir / stage for name, stage in MODELS.items()}, workdir / 'samples.jsonl')
    curves_of.plot(curves, workdir / 'turns.png', FULL)
    logging.info('6/6 export to Hugging Face and verification')
    model = load_model(rc, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(rc))
    save_hf(model, export, files=rc / HF_FILES)
    tensors = verify_hf(model, export)
    print(f'{cfg.problems} held-out problems of {ASKED[0]}-{ASKED[1]} steps, score of {FULL} after so many turns of {BUDGET} tokens\n'
          f'{curves_of.table(curves, FULL)}\n'
          f'plot in {workdir / "turns.png"}, samples in {workdir / "samples.jsonl"}; {tensors} tensors of {export} equal the checkpoint; '
          f'{time.monotonic() - started:.0f} s in all')
    return curves


def rl_config(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run of a quickstart in `workdir`, whose data and SFT must be there."""
    return _from(cfg.rl, 'sft', cfg.seed, workdir)


def rc_config(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run with the reasoning cache of a quickstart in `workdir`, whose data and RL must be there."""
    return _from(cfg.rc, 'rl', cfg.seed, workdir)


def _from(rl: RLConfig, stage: str, seed: int, workdir: str | pathlib.Path) -> RLConfig:
    workdir = pathlib.Path(workdir)
    return dataclasses.replace(rl, init=str(workdir / stage), train=Source(str(workdir / 'data' / 'problems.jsonl')), seed=seed)


def write_data(cfg: QuickstartConfig, folder: pathlib.Path) -> None:
    """The tokenizer, the teacher's documents, perfect proofs of held-out problems, and problems for RL."""
    tiny_tokenizer('none').save_pretrained(folder / 'tokenizer')
    _write(folder / 'train.jsonl', chain_rows(cfg.seed, cfg.documents, *TAUGHT, BUDGET, slip=cfg.slip, wrong=cfg.wrong))
    _write(folder / 'held_out.jsonl', ({'prompt': p.text, 'completion': p.proof} for p in problems(cfg.seed, 'held_out', 256, *TAUGHT)))
    _write(folder / 'problems.jsonl', ({'problem': p.text, 'rubric': render(rubric(p))}
                                       for p in problems(cfg.seed + 1, 'train', cfg.rl_problems, *ASKED)))


def _write(path: pathlib.Path, rows: Iterable[Mapping]) -> None:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def compare(cfg: QuickstartConfig, models: Mapping[str, pathlib.Path], samples: pathlib.Path) -> dict[str, list[Point]]:
    """The curve of each model (name -> workdir) on held-out problems; all chains are written, for people to read."""
    chosen, curves, rows = problems(cfg.seed, 'held_out', cfg.problems, *ASKED), {}, []
    for name, workdir in models.items():
        logging.info('%s: chains of up to %d turns', name, max(cfg.turns))
        model = load_model(workdir, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(workdir))
        traces = decode_chains(model, load_tokenizer(workdir), chosen, max(cfg.turns), cfg.seed)
        curves[name] = curves_of.curve(traces, cfg.turns, lambda problem, answer: grade(parse_problem(problem), answer).reward)
        rows += [{'model': name} | sample(problem, trace) for problem, trace in zip(chosen, traces, strict=True)]
    _write(samples, rows)
    return curves


def sample(problem: Problem, trace: Trace) -> dict:
    """Rubric, calls, last answer, its score and feedback of a chain."""
    answer, turn = trace.answer
    graded = grade(problem, answer)
    calls = [[call.phase, call.completion.text] for call in trace.calls]
    return {'problem': problem.text, 'rubric': render(rubric(problem)), 'calls': calls, 'answer': answer, 'turn': turn,
            'score': graded.score, 'feedback': graded.feedback}


def decode_chains(model: Transformer, tokenizer, chosen: Sequence[Problem], turns: int, seed: int) -> list[Trace]:
    """A chain of turns on each problem; it ends when its proof does."""
    mesh = rollout_mesh_of_all(1)
    slots = -(-32 // mesh.shape['data']) * mesh.shape['data']
    config = EngineConfig(slots=slots, staged=slots, prefill_tokens=2048, max_length=256)
    engine = Engine(model, mesh, config, num_valid_ids(tokenizer), tokenizer)

    async def main() -> list[Trace]:
        async with LocalEndpoint(engine) as endpoint:
            writer = Writer(endpoint, tokenizer, stop_ids(tokenizer))
            decoder = Decoder(dataclasses.replace(DECODING, turns=turns), writer, writer, check=finished)
            seeds = np.random.SeedSequence(seed).generate_state(len(chosen)).tolist()
            return await decode(decoder, [(i, begin(State(p.text)), s) for i, (p, s) in enumerate(zip(chosen, seeds, strict=True))])

    return asyncio.run(main())


async def finished(_: str, answer: str) -> bool:
    """Whether a proof has come to its end, right or wrong: there is nothing to go on with."""
    return answer.rstrip().rpartition('\n')[2].startswith('Answer: ')
