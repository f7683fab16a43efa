"""The reasoning cache on a toy: derivations that a teacher proves a few lines at a time, continues badly and sometimes summarises wrongly.

Stages: make the data, SFT from scratch, RL with rubric rewards, RL from states of the reasoning cache, and the curve of held-out scores
against turns of the three models. docs/reasoning_cache.md says what came of it.
"""

import asyncio
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from qedjax.checkpoint.load import load_model, load_tokenizer, saved_config
from qedjax.data.chat import num_valid_ids, stop_ids
from qedjax.data.derivations import Problem, long_rows, parse_problem, problems, sft_rows
from qedjax.data.sources import Source
from qedjax.grading.derivations import grade, rubric
from qedjax.grading.grade import FULL
from qedjax.grading.rubric import render
from qedjax.llm.local import LocalEndpoint
from qedjax.model.transformer import Transformer
from qedjax.quickstart import QuickstartConfig
from qedjax.reasoning_cache import curve as curves_of
from qedjax.reasoning_cache.curve import Point
from qedjax.reasoning_cache.decoder import Decoder, PhaseConfig, RCConfig, Writer, decode
from qedjax.reasoning_cache.prompts import RENDERINGS
from qedjax.reasoning_cache.state import State, Trace, begin
from qedjax.rl import loop
from qedjax.rl.chains import ChainsConfig
from qedjax.rl.config import RLConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, make_mesh, rollout_mesh_of_all
from qedjax.testing import tiny_tokenizer
from qedjax.train.sft import SFTConfig, train

SHORT, LONG = (4, 8), (9, 14)  # steps of a problem: what the teacher proves in one answer, and what it proves in several
LINES = (2, 4)  # that the teacher writes at a time on long problems
MAX_TOKENS = 80  # of an answer: up to nine lines
DECODING = RCConfig(2, PhaseConfig(MAX_TOKENS, 1.0), PhaseConfig(8, 1.0), prompts=RENDERINGS['derivations'])
MODELS = {'SFT': 'sft', 'RL': 'rl', 'RC-RL': 'rc'}


@dataclasses.dataclass(unsafe_hash=True)
class ToyConfig:
    """Sizes of the toy.

    Attributes:
      documents, long_documents: teacher's proofs of short problems, and parts of proofs and summaries of long ones, to train on.
      slip: share of the teacher's lines whose arithmetic is wrong.
      problems: held-out long problems that are graded after each of `turns`.
      rl_problems, rc_problems: training problems that RL draws from (half of them long), and RL with the reasoning cache (all long).
      sft, rl, rc: the runs; their data, tokenizer, checkpoint and seed are set here.
      seed: of everything.
    """

    documents: int = 8_000
    long_documents: int = 9_000
    slip: float = 0.1
    problems: int = 64
    turns: tuple[int, ...] = (1, 2, 4, 8, 16)
    rl_problems: int = 4096
    rc_problems: int = 96
    sft: SFTConfig = dataclasses.field(default_factory=lambda: QuickstartConfig().sft)
    rl: RLConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(
        QuickstartConfig().rl, problems=ProblemsConfig(max_prompt=112), max_tokens=MAX_TOKENS))
    rc: RLConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(
        QuickstartConfig().rl, problems=ProblemsConfig(max_prompt=112), max_tokens=MAX_TOKENS, steps=30,
        chains=ChainsConfig(2, DECODING, replay=96, horizon=6)))
    seed: int = 0


def run(cfg: ToyConfig, workdir: str | pathlib.Path) -> dict[str, list[Point]]:
    """Runs every stage in `workdir`, prints and plots the curves, and returns them by model. An interrupted run goes on."""
    workdir = pathlib.Path(workdir)
    data = workdir / 'data'
    write_data(cfg, data)
    train(dataclasses.replace(cfg.sft, tokenizer=str(data / 'tokenizer'), train=Source(str(data / 'train.jsonl')),
                              evaluation=Source(str(data / 'held_out.jsonl')), seed=cfg.seed), str(workdir / 'sft'))
    loop.train(dataclasses.replace(cfg.rl, init=str(workdir / 'sft'), train=Source(str(data / 'problems.jsonl')), seed=cfg.seed),
               str(workdir / 'rl'))
    loop.train(rc_config(cfg, workdir), str(workdir / 'rc'))
    curves = compare(cfg, {name: workdir / stage for name, stage in MODELS.items()})
    curves_of.plot(curves, workdir / 'turns.png', FULL)
    print(f'{cfg.problems} held-out problems of {LONG[0]}-{LONG[1]} steps, score of {FULL} after so many turns; plot in '
          f'{workdir / "turns.png"}\n{curves_of.table(curves, FULL)}')
    return curves


def rc_config(cfg: ToyConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run with the reasoning cache of a toy in `workdir`, whose RL must be there."""
    workdir = pathlib.Path(workdir)
    return dataclasses.replace(cfg.rc, init=str(workdir / 'rl'), train=Source(str(workdir / 'data' / 'long_problems.jsonl')), seed=cfg.seed)


def write_data(cfg: ToyConfig, folder: pathlib.Path) -> None:
    """The tokenizer, the teacher's documents, perfect proofs of held-out problems, and problems for both kinds of RL."""
    tiny_tokenizer('none').save_pretrained(folder / 'tokenizer')
    proofs = [{'prompt': p.text, 'completion': p.proof} for p in problems(cfg.seed, 'held_out', 256, *SHORT)]
    half, seed = cfg.rl_problems // 2, cfg.seed + 1
    short, long, chains = (problems(seed + i, 'train', n, *steps) for i, (n, steps) in enumerate(
        ((half, SHORT), (half, LONG), (cfg.rc_problems, LONG))))
    files = {
        'train': sft_rows(cfg.seed, cfg.documents, *SHORT, cfg.slip) + long_rows(cfg.seed, cfg.long_documents, *LONG, LINES, slip=cfg.slip),
        'held_out': proofs, 'problems': list(map(_row, [*short, *long])), 'long_problems': list(map(_row, chains))}
    for name, rows in files.items():
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def _row(problem: Problem) -> dict[str, str]:
    return {'problem': problem.text, 'rubric': render(rubric(problem))}


def compare(cfg: ToyConfig, models: Mapping[str, pathlib.Path]) -> dict[str, list[Point]]:
    """The curve of each model (name -> workdir) on held-out problems."""
    chosen, curves = problems(cfg.seed, 'held_out', cfg.problems, *LONG), {}
    for name, workdir in models.items():
        logging.info('%s: chains of up to %d turns', name, max(cfg.turns))
        model = load_model(workdir, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(workdir))
        traces = decode_chains(model, load_tokenizer(workdir), chosen, max(cfg.turns), cfg.seed)
        curves[name] = curves_of.curve(traces, cfg.turns, lambda problem, answer: grade(parse_problem(problem), answer).reward)
    return curves


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
