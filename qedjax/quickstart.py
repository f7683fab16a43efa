"""The recipe in small: a decoder of about a million parameters learns to prove derivations from a noisy teacher, on a laptop CPU.

Stages: make the data, SFT from scratch, RL with rubric rewards, sample held-out proofs of both models and grade them by their rubrics,
export to Hugging Face and verify.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from qedjax.checkpoint.hf import save_hf, verify_hf
from qedjax.checkpoint.load import HF_FILES, load_model, load_tokenizer, saved_config
from qedjax.data.chat import num_valid_ids, prompt_ids, stop_ids
from qedjax.data.derivations import Problem, problems, sft_rows, teacher_proof
from qedjax.data.sources import Source
from qedjax.grading.derivations import grade, rubric
from qedjax.grading.grade import FULL
from qedjax.grading.rubric import render
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.rl import loop
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

# Held-out problems by number of steps; the longer ones do not fit one answer's budget.
TRAINED, LONGER = '4-8 steps, as trained', '12-16 steps, longer'
KINDS = {TRAINED: (4, 8), LONGER: (12, 16)}


@dataclasses.dataclass(unsafe_hash=True)
class QuickstartConfig:
    """Sizes of the demonstration.

    Attributes:
      documents: teacher's proofs to train on.
      slip: share of the teacher's lines whose arithmetic is wrong: what SFT imitates and RL can cure.
      problems: held-out problems of each length that are sampled and graded.
      max_tokens: budget of one answer.
      rl_problems: training problems that RL draws from.
      sft, rl: the runs; their data, tokenizer, checkpoint and seed are set here.
      seed: of everything.
    """

    documents: int = 10_000
    slip: float = 0.1
    problems: int = 128
    max_tokens: int = 112
    rl_problems: int = 4096
    sft: SFTConfig = dataclasses.field(default_factory=lambda: SFTConfig(
        model=ModelConfig(vocab_size=288, embed_dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
                          max_positions=1024, rope_theta=1e4, init_std=0.1, dtype='float32', attention_block=256, remat='none'),
        format='pair', row_length=256, batch_size=8, save_every=100,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_fraction=0.05, b2=0.98, weight_decay=0.01)))
    rl: RLConfig = dataclasses.field(default_factory=lambda: RLConfig(
        model=ModelConfig(dtype='float32', attention_block=256, remat='none'), grader='derivations', problems=ProblemsConfig(max_prompt=64),
        group_size=8, groups=16, steps=40, temperature=1.0, row_length=256, micro_rows=8, save_every=10,
        objective=ObjectiveConfig(zero_variance='refill'), engine=EngineConfig(slots=32, staged=32, prefill_tokens=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule='constant', warmup_fraction=0.0, b2=0.98, clip_norm=0.3)))
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Score:
    """Graded samples of one kind of problems: mean share of full marks with half a 95% interval, tokens, share cut by the budget."""

    mean: float
    interval: float
    tokens: float
    cut: float


def run(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> dict[str, dict[str, Score]]:
    """Runs every stage in `workdir`, prints the table, and returns its scores by model and kind of problem.

    An interrupted run goes on with its last checkpoint. Raises ValueError if the workdir holds a finished one.
    """
    workdir, started = pathlib.Path(workdir), time.monotonic()
    data, sft, rl, export = (workdir / name for name in ('data', 'sft', 'rl', 'export'))
    if export.exists():
        raise ValueError(f'{workdir} holds a finished quickstart; delete it or name another --workdir')
    if cfg.problems < 2:
        raise ValueError(f'problems={cfg.problems} are too few for an interval; grade at least 2')
    logging.info('1/5 data: %d proofs by a teacher that slips in %.0f%% of its lines', cfg.documents, 100 * cfg.slip)
    write_data(cfg, data)
    logging.info('2/5 SFT from random weights')
    train(dataclasses.replace(cfg.sft, tokenizer=str(data / 'tokenizer'), train=Source(str(data / 'train.jsonl')),
                              evaluation=Source(str(data / 'held_out.jsonl')), seed=cfg.seed), str(sft))
    logging.info('3/5 RL with rubric rewards')
    loop.train(rl_config(cfg, workdir), str(rl))
    logging.info('4/5 sampling and grading held-out problems')
    scores = compare(cfg, {'SFT': sft, 'RL': rl}, workdir / 'samples.jsonl')
    logging.info('5/5 export to Hugging Face and verification')
    model = load_model(rl, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(rl))
    save_hf(model, export, files=rl / HF_FILES)
    tensors = verify_hf(model, export)
    print(table(scores))
    print(f'{tensors} tensors of {export} equal the checkpoint; samples are in {workdir / "samples.jsonl"}; '
          f'{time.monotonic() - started:.0f} s in all')
    return scores


def compare(cfg: QuickstartConfig, models: Mapping[str, pathlib.Path], samples: pathlib.Path) -> dict[str, dict[str, Score]]:
    """Scores of the teacher and of each model (name -> workdir) on held-out problems; all samples of the models are written too."""
    samples.unlink(missing_ok=True)  # of a run that was interrupted here
    scores: dict[str, dict[str, Score]] = {'teacher': {}}
    for kind in KINDS:
        rng, chosen = np.random.default_rng(cfg.seed), held_out(cfg, kind)
        scores['teacher'][kind] = score(chosen, [Completion(teacher_proof(p, rng, cfg.slip), (), (), 'stop') for p in chosen])
    for name, workdir in models.items():
        model = load_model(workdir, make_mesh(MeshConfig(data=-1, fsdp=1)), saved_config(workdir))
        sampler = sample_proofs(model, load_tokenizer(workdir), cfg.max_tokens, cfg.seed)
        scores[name] = {}
        for kind in KINDS:
            chosen = held_out(cfg, kind)
            scores[name][kind] = score(chosen, completions := sampler(chosen))
            write_samples(samples, name, chosen, completions)
    return scores


def held_out(cfg: QuickstartConfig, kind: str) -> list[Problem]:
    """The held-out problems of a kind."""
    return problems(cfg.seed, 'held_out', cfg.problems, *KINDS[kind])


def rl_config(cfg: QuickstartConfig, workdir: str | pathlib.Path) -> RLConfig:
    """The RL run of a quickstart in `workdir`, whose data and SFT must be there."""
    workdir = pathlib.Path(workdir)
    return dataclasses.replace(cfg.rl, init=str(workdir / 'sft'), train=Source(str(workdir / 'data' / 'problems.jsonl')),
                               max_tokens=cfg.max_tokens, seed=cfg.seed)


def write_data(cfg: QuickstartConfig, folder: pathlib.Path) -> None:
    """The tokenizer, the teacher's proofs of training problems, perfect proofs of held-out ones, and problems for RL."""
    tiny_tokenizer('none').save_pretrained(folder / 'tokenizer')
    low, high = KINDS[TRAINED]
    proofs = [{'prompt': p.text, 'completion': p.proof} for p in problems(cfg.seed, 'held_out', 256, low, high)]
    chains = [{'problem': p.text, 'rubric': render(rubric(p))} for p in problems(cfg.seed + 1, 'train', cfg.rl_problems, low, high)]
    for name, rows in (('train', sft_rows(cfg.seed, cfg.documents, low, high, cfg.slip)), ('held_out', proofs), ('problems', chains)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def sample_proofs(model: Transformer, tokenizer, max_tokens: int, seed: int) -> Callable[[Sequence[Problem]], list[Completion]]:
    """A function from problems to one sampled proof each, at temperature 1."""
    params, mesh = SamplingParams(1.0, max_tokens, seed, stop_ids(tokenizer)), rollout_mesh_of_all(1)
    shards = mesh.shape['data']
    config = EngineConfig(slots=-(-32 // shards) * shards, staged=-(-32 // shards) * shards, prefill_tokens=2048)
    engine = Engine(model, mesh, config, num_valid_ids(tokenizer), tokenizer)

    def sampler(chosen: Sequence[Problem]) -> list[Completion]:
        prompts = [prompt_ids(tokenizer, [{'role': 'user', 'content': problem.text}]) for problem in chosen]
        return engine.generate(prompts, [dataclasses.replace(params, sample=i) for i in range(len(prompts))])

    return sampler


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


def table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """The scores as text: a line for each model and kind of problem."""
    lines = [f'{"model":<10}{"held-out problems":<26}{"score of 7":>16}{"tokens":>9}{"cut":>7}']
    for name, kinds in scores.items():
        lines += [f'{name:<10}{kind:<26}{FULL * s.mean:>8.2f} +- {FULL * s.interval:.2f}{s.tokens:>9.0f}{s.cut:>7.0%}'
                  for kind, s in kinds.items()]
    return '\n'.join(lines)
