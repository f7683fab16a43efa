"""The recipe in small: a decoder of about a million parameters learns to prove derivations from a noisy teacher, on a laptop CPU.

Stages: make the data, SFT from scratch, RL with rubric rewards, RL from states of the reasoning cache on chains too long for one
answer, sample held-out proofs of all models, in one turn and in many, and grade them by their rubrics, export to Hugging Face and verify.
"""

import asyncio
import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from qedjax.checkpoint.hf import save_hf, verify_hf
from qedjax.checkpoint.load import HF_FILES, load_model, load_tokenizer, saved_config
from qedjax.data.chat import num_valid_ids, prompt_ids, stop_ids
from qedjax.data.derivations import Problem, long_rows, parse_problem, problems, sft_rows, teacher_proof
from qedjax.data.sources import Source
from qedjax.grading.derivations import grade, rubric
from qedjax.grading.grade import FULL
from qedjax.grading.rubric import render
from qedjax.llm.local import LocalEndpoint
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.reasoning_cache import curve as curves_of
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
from qedjax.types import Completion, SamplingParams

SHORT, LONG = (4, 8), (9, 14)  # steps of a problem: what the teacher proves in one answer, and what it proves in several
LINES = (2, 4)  # that the teacher writes at a time on long problems
MAX_TOKENS = 80  # of an answer: up to nine lines
DECODING = RCConfig(16, PhaseConfig(MAX_TOKENS, 1.0), PhaseConfig(8, 1.0),
                    prompts=RENDERINGS['derivations'])


RL = RLConfig(
    model=ModelConfig(dtype='float32', attention_block=256, remat='none'), grader='derivations', problems=ProblemsConfig(max_prompt=112),
    group_size=8, groups=16, steps=40, temperature=1.0, max_tokens=MAX_TOKENS, row_length=256, micro_rows=8, save_every=10,
    objective=ObjectiveConfig(zero_variance='refill'), engine=EngineConfig(slots=32, staged=32, prefill_tokens=2048),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule='constant', warmup_fraction=0.0, b2=0.98, clip_norm=0.3))
CHAINS = ChainsConfig(2, dataclasses.replace(DECODING, turns=2), replay=96, horizon=6)


@dataclasses.dataclass(unsafe_hash=True)
class QuickstartConfig:
    """Sizes of the demonstration.

    Attributes:
      documents, long_documents: teacher's proofs of short problems, and parts of proofs and summaries of long ones, to train on.
      slip: share of the teacher's lines whose arithmetic is wrong: what SFT imitates and RL can cure.
      problems, long_problems: held-out problems that are sampled and graded, in one turn and in many.
      turns: at which the long ones are graded.
      rl_problems, rc_problems: training problems that RL draws from (half of them long), and RL with the reasoning cache (all long).
      sft, rl, rc: the runs; their data, tokenizer, checkpoint and seed are set here.
      seed: of everything.
    """

    documents: int = 8_000
    long_documents: int = 9_000
    slip: float = 0.1
    problems: int = 128
    long_problems: int = 64
    turns: tuple[int, ...] = (1, 2, 4, 8, 16)
    rl_problems: int = 4096
    rc_problems: int = 96
    sft: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(
        model=ModelConfig(vocab_size=288, embed_dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
                          max_positions=1024, rope_theta=1e4, init_std=0.1, dtype='float32', attention_block=256, remat='none'),
        format='pair', row_length=256, batch_size=8, save_every=100,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_fraction=0.05, b2=0.98, weight_decay=0.01)))
    rl: RLConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(RL))
    rc: RLConfig = dataclasses.field(default_factory=lambda: dataclasses.replace(RL, steps=30, chains=CHAINS))
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """Graded samples: mean share of full marks with half a 95% interval, tokens, share cut by the budget."""

    mean: float
    interval: float
    tokens: float
    cut: float


def run(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> tuple[dict[str, Score], dict[str, list[curves_of.Point]]]:
    """Runs every stage in `workdir`, prints the tables, and returns scores of short problems and curves of long ones, by model.

    An interrupted run goes on with its last checkpoint. Raises ValueError if the workdir holds a finished one.
    """
    workdir, started = pathlib.Path(workdir), time.monotonic()
    data, export = workdir / 'data', workdir / 'export'
    if export.exists():
        raise ValueError(f'{workdir} holds a finished quickstart; delete it or name another --workdir')
    if min(cfg.problems, cfg.long_problems) < 2:
        raise ValueError(f'problems={cfg.problems}, long_problems={cfg.long_problems} are too few for an interval; grade at least 2')
    logging.info('1/6 data: %d documents by a teacher that slips', cfg.documents + cfg.long_documents)
    write_data(cfg, data)
    logging.info('2/6 SFT from random weights')
    train(dataclasses.replace(cfg.sft, tokenizer=str(data / 'tokenizer'), train=Source(str(data / 'train.jsonl')),
                              evaluation=Source(str(data / 'held_out.jsonl')), seed=cfg.seed), str(workdir / 'sft'))
    logging.info('3/6 RL with rubric rewards')
    loop.train(rl_config(cfg, workdir), str(workdir / 'rl'))
    logging.info('4/6 RL from states of the reasoning cache')
    loop.train(rc_config(cfg, workdir), str(workdir / 'rc'))
    logging.info('5/6 sampling and grading held-out problems, in one turn and in up to %d', max(cfg.turns))
    scores, curves = compare(cfg, {'SFT': workdir / 'sft', 'RL': workdir / 'rl', 'RC-RL': workdir / 'rc'}, workdir / 'samples.jsonl')
    curves_of.plot(curves, workdir / 'turns.png', FULL)
    logging.info('6/6 export to Hugging Face and verification')
    model = load_model(workdir / 'rc', make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(workdir / 'rc'))
    save_hf(model, export, files=workdir / 'rc' / HF_FILES)
    tensors = verify_hf(model, export)
    print(f'{table(scores)}\n\n{cfg.long_problems} held-out problems of {LONG[0]}-{LONG[1]} steps, score of {FULL} after so many turns\n'
          f'{curves_of.table(curves, FULL)}')
    print(f'{tensors} tensors of {export} equal the checkpoint; samples are in {workdir / "samples.jsonl"}, the plot in '
          f'{workdir / "turns.png"}; {time.monotonic() - started:.0f} s in all')
    return scores, curves


def compare(cfg: QuickstartConfig, models: Mapping[str, pathlib.Path],
            samples: pathlib.Path) -> tuple[dict[str, Score], dict[str, list[curves_of.Point]]]:
    """Scores of the teacher and of each model (name -> workdir) on held-out problems; all samples of short ones are written too."""
    samples.unlink(missing_ok=True)  # of a run that was interrupted here
    short, long = (problems(cfg.seed, 'held_out', n, *steps) for n, steps in ((cfg.problems, SHORT), (cfg.long_problems, LONG)))
    rng = np.random.default_rng(cfg.seed)
    scores = {'teacher': score(short, [Completion(teacher_proof(p, rng, cfg.slip), (), (), 'stop') for p in short])}
    curves = {}
    for name, workdir in models.items():
        model = load_model(workdir, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(workdir))
        tokenizer = load_tokenizer(workdir)
        engine = make_engine(model, tokenizer)
        scores[name] = score(short, completions := sample_proofs(engine, tokenizer, short, cfg.seed))
        write_samples(samples, name, short, completions)
        curves[name] = curves_of.curve(decode_chains(engine, tokenizer, long, max(cfg.turns), cfg.seed), cfg.turns,
                                       lambda problem, answer: grade(parse_problem(problem), answer).reward)
    return scores, curves


def rl_config(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run of a quickstart in `workdir`, whose data and SFT must be there."""
    workdir = pathlib.Path(workdir)
    return dataclasses.replace(cfg.rl, init=str(workdir / 'sft'), train=Source(str(workdir / 'data' / 'problems.jsonl')),
                               seed=cfg.seed)


def rc_config(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run with the reasoning cache of a quickstart in `workdir`, whose RL must be there."""
    workdir = pathlib.Path(workdir)
    return dataclasses.replace(cfg.rc, init=str(workdir / 'rl'), train=Source(str(workdir / 'data' / 'long_problems.jsonl')), seed=cfg.seed)


def write_data(cfg: QuickstartConfig, folder: pathlib.Path) -> None:
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


def make_engine(model: Transformer, tokenizer) -> Engine:
    """An engine on all devices."""
    mesh = rollout_mesh_of_all(1)
    slots = -(-32 // mesh.shape['data']) * mesh.shape['data']
    config = EngineConfig(slots=slots, staged=slots, prefill_tokens=2048, max_length=256)
    return Engine(model, mesh, config, num_valid_ids(tokenizer), tokenizer)


def sample_proofs(engine: Engine, tokenizer, chosen: Sequence[Problem], seed: int) -> list[Completion]:
    """One sampled proof of each problem, at temperature 1."""
    prompts = [prompt_ids(tokenizer, [{'role': 'user', 'content': problem.text}]) for problem in chosen]
    params = SamplingParams(1.0, MAX_TOKENS, seed, stop_ids(tokenizer))
    return engine.generate(prompts, [dataclasses.replace(params, sample=i) for i in range(len(prompts))])


async def finished(_: str, answer: str) -> bool:
    """Whether a proof has come to its end, right or wrong: there is nothing to go on with."""
    return answer.rstrip().rpartition('\n')[2].startswith('Answer: ')


def decode_chains(engine: Engine, tokenizer, chosen: Sequence[Problem], turns: int, seed: int) -> list[Trace]:
    """A chain of turns on each problem; it ends when its proof does."""
    async def main() -> list[Trace]:
        async with LocalEndpoint(engine) as endpoint:
            writer = Writer(endpoint, tokenizer, stop_ids(tokenizer))
            decoder = Decoder(dataclasses.replace(DECODING, turns=turns), writer, writer, check=finished)
            seeds = np.random.SeedSequence(seed).generate_state(len(chosen)).tolist()
            return await decode(decoder, [(i, begin(State(p.text)), s) for i, (p, s) in enumerate(zip(chosen, seeds, strict=True))])

    return asyncio.run(main())


def score(chosen: Sequence[Problem], completions: Sequence[Completion]) -> Score:
    """Mean rubric score of one completion a problem."""
    rewards = [grade(problem, completion.text).reward for problem, completion in zip(chosen, completions, strict=True)]
    lengths = [len(completion.ids) or len(completion.text) for completion in completions]
    cut = [completion.finish_reason == 'length' for completion in completions]
    interval = 1.96 * np.std(rewards, ddof=1) / np.sqrt(len(rewards))
    return Score(float(np.mean(rewards)), float(interval), float(np.mean(lengths)), float(np.mean(cut)))


def write_samples(path: pathlib.Path, model: str, chosen: Sequence[Problem], completions: Sequence[Completion]) -> None:
    """Appends model, problem, rubric, proof, grade and feedback of each sample, for people to read."""
    with path.open('a') as file:
        for problem, completion in zip(chosen, completions, strict=True):
            graded = grade(problem, completion.text)
            row = {'model': model, 'problem': problem.text, 'rubric': render(rubric(problem)), 'proof': completion.text,
                   'score': graded.score, 'feedback': graded.feedback, 'finish_reason': completion.finish_reason}
            file.write(json.dumps(row) + '\n')


def table(scores: Mapping[str, Score]) -> str:
    """The scores as text: a line for each model."""
    lines = [f'{f"held-out problems of {SHORT[0]}-{SHORT[1]} steps, one turn":<44}{f"score of {FULL}":>16}{"tokens":>9}{"cut":>7}']
    lines += [f'{name:<44}{FULL * s.mean:>8.2f} +- {FULL * s.interval:.2f}{s.tokens:>9.0f}{s.cut:>7.0%}' for name, s in scores.items()]
    return '\n'.join(lines)
