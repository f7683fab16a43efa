"""The RL loop: engine and learner share the devices by turns, and the grader is never waited for while there is other work.

    engine   | chunk | chunk | ... |         | chunk | ...        requests stay in flight across updates (max_lag > 0)
    learner  |       |       |     | update  |       |
    grader   |   answers as they come, over the network           |

In several processes each has an engine and a grader of its own, and the update is made together; see rl/collector.py.
With max_lag = 0 a step begins its groups together, waits for all of them and is reproducible bit by bit.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from absl import logging

from qedjax import prompts
from qedjax.checkpoint.load import copy_tokenizer, load_model, load_tokenizer, read_generation_config, refuse_inside, resolve_config
from qedjax.checkpoint.manager import Checkpointer
from qedjax.data.chat import num_valid_ids, stop_ids
from qedjax.grading.grader import Grader, make_grader
from qedjax.llm.local import LocalEndpoint
from qedjax.metrics import MetricWriter, Progress, keep_rows, write_run_files
from qedjax.model.config import ModelConfig
from qedjax.processes import FAILURES, Crew, at_work
from qedjax.rl import chains as chain_settings
from qedjax.rl.actor import Actor
from qedjax.rl.chains import Chains
from qedjax.rl.collector import Collector
from qedjax.rl.config import RLConfig, validate
from qedjax.rl.learner import Learner, describe
from qedjax.rl.problems import Problem, read_problems
from qedjax.rl.together import all_at_once
from qedjax.rollout import engine_config
from qedjax.rollout.engine import Engine
from qedjax.rollout.requests import check_request
from qedjax.sharding import abstract, check_rows, make_mesh, rollout_mesh_of_all
from qedjax.train.step import TrainState
from qedjax.types import Group, SamplingParams

SAMPLES = 'samples.jsonl'
Result = TypeVar('Result')


def train(cfg: RLConfig, workdir: str, *, mode: str = 'resume', devices: list[jax.Device] | None = None,
          grader: Grader | None = None) -> TrainState:
    """Runs (or resumes) one RL run and returns its last state.

    Args:
      cfg: the run.
      workdir: receives checkpoints/, hf_files/, config.json, environment.json, metrics.jsonl, tensorboard/, samples.jsonl.
      mode: 'resume', 'fresh' or 'overwrite', as Checkpointer.
      devices: to train on; all by default.
      grader: instead of the config's.

    Raises ValueError for a config, data or checkpoint that does not fit; EndpointError when the grader cannot serve any more and
    RuntimeError when no group can be trained (the checkpoint of the last step is written first); FloatingPointError after `max_skipped`
    bad steps in a row; Preempted after SIGTERM, with a checkpoint of the last step written: what was being sampled is sampled again.
    """
    validate(cfg)
    refuse_inside(workdir, init=cfg.init, reference=cfg.reference)
    with at_work() as crew:
        run = crew.made(lambda: _Run(cfg, pathlib.Path(workdir), devices, grader))
        identity = fingerprint(cfg, run.model_config, run.problems)
        with Checkpointer(run.workdir / 'checkpoints', identity, mode=mode, keep=cfg.keep) as checkpoints:
            copy_tokenizer(cfg.init, run.workdir, anew=checkpoints.latest_complete() is None)
            write_run_files(run.workdir, dataclasses.replace(cfg, model=run.model_config))
            return asyncio.run(run.main(checkpoints, crew))


def fingerprint(cfg: RLConfig, model: ModelConfig, problems: Sequence[Problem]) -> dict[str, Any]:
    """What makes a run this run: all that its parameters depend on, but for what may change between two starts.

    That is where and how fast it runs: devices, kernels, remat, sizes of the engine, the judge's address and patience, what is saved and
    evaluated, and the number of steps unless the learning rate depends on it.
    """
    judge, optimizer = cfg.judge, cfg.optimizer
    digest = hashlib.sha256(repr([(problem.prompt_ids, problem.row) for problem in problems]).encode()).hexdigest()[:16]
    speed = dict.fromkeys(('attention', 'attention_block', 'paged_attention', 'remat'))
    return {
        'problems': digest, 'order': cfg.problems.order, 'model': dataclasses.asdict(model) | speed,
        'objective': dataclasses.asdict(cfg.objective), 'optimizer': dataclasses.asdict(optimizer),
        'steps': cfg.steps * (optimizer.schedule != 'constant' or optimizer.warmup_fraction > 0),
        'groups': [cfg.groups, cfg.group_size],
        'chains': dataclasses.asdict(cfg.chains) | {'summariser': cfg.chains.summariser.model} if cfg.chains.states else None,
        'sampling': [cfg.temperature, cfg.max_tokens], 'max_lag': cfg.max_lag, 'seed': cfg.seed,
        'reference': (cfg.reference or cfg.init) if cfg.objective.kl_coef else '',
        'grader': [cfg.grader, judge.prompt, judge.remote.model, judge.remote.effort, judge.samples, judge.combine, judge.tries,
                   judge.temperature, judge.max_tokens, judge.longest] if cfg.grader == 'judge' else [cfg.grader]}


class _Run:
    """What a run holds on to; everything that can be refused is refused while this is made, before weights are read."""

    def __init__(self, cfg: RLConfig, workdir: pathlib.Path, devices: list[jax.Device] | None, grader: Grader | None):
        self.cfg, self.workdir = cfg, workdir
        self.mesh = make_mesh(cfg.mesh, devices)
        check_rows(self.mesh, cfg.micro_rows, cfg.row_length, 'micro_rows')
        self.model_config = resolve_config(cfg.init, cfg.model)
        self.tokenizer = load_tokenizer(cfg.init)
        self.num_valid = num_valid_ids(self.tokenizer)
        self.reference_config = resolve_config(cfg.reference or cfg.init, dataclasses.replace(cfg.model, param_dtype=cfg.model.dtype))
        if self.reference_config.vocab_size < self.num_valid:
            raise ValueError(f'the reference model {cfg.reference} has fewer rows than the {self.num_valid} ids of the tokenizer')
        self.stops = stop_ids(self.tokenizer, read_generation_config(cfg.init))
        # Each process grades what it sampled, and keeps the judge's reports apart: the cache is a file that hosts cannot share.
        own = workdir / f'process_{jax.process_index()}' if jax.process_index() else workdir
        self.grader = grader or make_grader(cfg.grader, cfg.judge, str(own))
        self.settings = cfg.problems
        if cfg.chains.states:  # then a problem alone is the first state of a chain, and put as such
            self.settings = dataclasses.replace(cfg.problems, prompt=prompts.load(cfg.chains.decoding.prompts.first),
                                                thinking=cfg.chains.decoding.prompts.thinking)
        self.problems = read_problems(cfg.train, self.settings, self.tokenizer, self.grader.check)
        self.held_out = self._held_out() if cfg.evaluation.source.path else []
        self.rollout_mesh = rollout_mesh_of_all(cfg.tensor, devices)
        self.engine_config, self.rollout_config = self._sizes()
        self.learner = Learner(cfg, self.model_config, self.mesh, self.num_valid)
        self.learner.trace(self.model_config)

    def _held_out(self) -> list[Problem]:
        """The problems of the evaluation: of any difficulty, or the score would not be that of the set."""
        every = dataclasses.replace(self.settings, least=-1.0, most=1.0)
        problems = read_problems(self.cfg.evaluation.source, every, self.tokenizer, self.grader.check)
        return problems[: self.cfg.evaluation.problems or None]

    def _sizes(self) -> tuple[engine_config.EngineConfig, Any]:
        """The engine's sizes and the config of its copy of the model, checked against the longest prompt with a whole answer."""
        cfg, shards = self.cfg, self.rollout_mesh.shape['data']
        longest = max(max(len(problem.prompt_ids) for problem in [*self.problems, *self.held_out]) + cfg.max_tokens, self._longest_turn())
        config = dataclasses.replace(cfg.engine, max_length=cfg.engine.max_length or longest)
        if longest > min(config.max_length, self.model_config.max_positions):
            raise ValueError(f'the longest prompt with max_tokens={cfg.max_tokens} comes to {longest} positions, but the engine takes '
                             f'{config.max_length} and the model {self.model_config.max_positions}; lower max_tokens')
        rollout = dataclasses.replace(self.model_config, param_dtype=self.model_config.dtype, remat='none')
        engine_config.validate(config, shards, rollout)
        limits = engine_config.limits_of(config, rollout, self.num_valid, shards)
        prompt = max((problem.prompt_ids for problem in [*self.problems, *self.held_out]), key=len)
        for params in (self._params(), self._evaluation_params()):
            check_request(prompt, params, limits, 'the longest prompt')
        return config, rollout

    def _longest_turn(self) -> int:
        """Positions that a turn of a chain may take; a group's answer to the longest state must fit a row. 0 without chains."""
        cfg, decoding = self.cfg, self.cfg.chains.decoding
        if not cfg.chains.states:
            return 0
        problem = max(self.problems, key=lambda problem: len(problem.prompt_ids)).row['problem']
        reason, summary = chain_settings.longest(cfg.chains, problem, self.tokenizer)
        if reason + cfg.max_tokens > cfg.row_length:
            raise ValueError(f'a state of up to {reason} tokens and max_tokens={cfg.max_tokens} do not fit row_length={cfg.row_length}; '
                             'raise it, or lower chains.decoding.summarise.max_tokens')
        return max(reason + max(cfg.max_tokens, decoding.reason.max_tokens),
                   0 if cfg.chains.summariser.base_url else summary + decoding.summarise.max_tokens)

    def _params(self) -> SamplingParams:
        return SamplingParams(self.cfg.temperature, self.cfg.max_tokens, stop_ids=self.stops)

    def _evaluation_params(self) -> SamplingParams:
        settings = self.cfg.evaluation
        return dataclasses.replace(self._params(), temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)

    async def main(self, checkpoints: Checkpointer, crew: Crew) -> TrainState:
        """The whole run, inside an event loop."""
        cfg, self.checkpoints, self.crew = self.cfg, checkpoints, crew
        state, position, start = self._start()
        if cfg.objective.kl_coef:
            self.learner.reference = load_model(cfg.reference or cfg.init, self.mesh, self.reference_config)
        self.engine = Engine(state.model, self.rollout_mesh, self.engine_config, self.num_valid, self.tokenizer, cfg=self.rollout_config)
        self.engine.version = start
        async with LocalEndpoint(self.engine, self.stops) as self.endpoint:
            self.crew.hold = self.endpoint.held
            self.actor = Actor(self.endpoint, self.grader, self.tokenizer, self._params(), cfg.group_size, cfg.seed)
            self.chains = None
            if cfg.chains.states:
                self.chains = Chains(cfg.chains, self.endpoint, self.tokenizer, self.stops, cfg.seed, self.problems, self.crew)
                if 'chains' in position:
                    self.chains.load(position.pop('chains'))
            self.collector = Collector(cfg, self.endpoint, self.actor, self.problems, self.chains, self.crew, **position)
            try:
                return await self._steps(state, start)
            finally:
                await self.collector.close()
                if self.chains:
                    await self.chains.close()
                await self.grader.close()

    def _start(self) -> tuple[TrainState, dict[str, Any], int]:
        """The state, the position in the draws, and the step to begin with; whether its evaluation is owed."""
        self.owed = True  # that of the untrained policy
        if self.checkpoints.latest_complete() is not None:
            state, metadata, step = self.checkpoints.restore(abstract(lambda: self.learner.fresh(self.model_config), self.mesh))
            self.owed = metadata.get('owed', False)
            return state, metadata['position'], step
        return self.learner.init(load_model(self.cfg.init, self.mesh, self.model_config)), {}, 0

    async def _steps(self, state: TrainState, start: int) -> TrainState:
        cfg, samples = self.cfg, self.workdir / SAMPLES
        progress, every = Progress('rl', cfg.steps), cfg.evaluation.every
        if jax.process_index():
            samples = pathlib.Path(os.devnull)  # the first process writes the answers of all
        else:
            keep_rows(samples, start)
        with MetricWriter(self.workdir, start or -1) as writer, samples.open('a', encoding='utf-8') as file:
            if self.owed:
                await self._evaluate(writer, start)
            for step in range(start, cfg.steps):
                state = await self._step(state, step, writer, progress, file)
                done, last = step + 1, step + 1 == cfg.steps
                evaluated = last or (every and done % every == 0)
                score = await self._safely(self._evaluate(writer, done), done, state, owed=True) if evaluated else None
                if last or done % cfg.save_every == 0:
                    await self._save(done, state, score)
        return state

    async def _safely(self, work: Awaitable[Result], step: int, state: TrainState, owed: bool = False) -> Result:
        """What `work` comes to. If the grader fails it or SIGTERM ends it, what was learnt until then is saved first.

        `owed`: that work was the evaluation of this step, which the next start makes up for.
        """
        try:
            return await work
        except FAILURES:
            await self._save(step, state, owed=owed)
            raise

    async def _step(self, state: TrainState, step: int, writer: MetricWriter, progress: Progress, file: TextIO) -> TrainState:
        """Collects groups, makes one update, and hands the engine its weights."""
        cfg, clock = self.cfg, _Clock(self.engine)
        groups = await self._safely(self.collector.collect(step), step, state)
        clock.lap('collect')
        async with self.endpoint.held():
            state, metrics = await asyncio.to_thread(self.learner.step, state, groups)
        await self.endpoint.set_weights(state.model, step + 1)
        clock.lap('learn')
        dropped = {f'dropped/{name}': count for name, count in vars(self.collector.counts).items()}
        reports = await self.crew.exchange(self.grader.report())
        grader = {f'grader/{name}': sum(report[name] for report in reports) for name in reports[0]}
        metrics |= describe(groups, cfg, step) | dropped | grader | clock.shares()
        write_samples(file, step + 1, groups)
        tokens = sum(len(r.completion.ids) for group in groups for r in group.rollouts)
        writer.write(step + 1, metrics | progress.update(step + 1, tokens, reward=metrics['reward']))
        if metrics.get('skipped_in_a_row', 0) >= cfg.max_skipped:
            raise FloatingPointError(f'loss or gradient was not finite in {cfg.max_skipped} steps in a row, up to step {step + 1}; the '
                                     'checkpoints before them are sound: lower the learning rate or look at the samples')
        return state

    async def _save(self, step: int, state: TrainState, score: float | None = None, owed: bool = False) -> None:
        """Writes a checkpoint, in a thread: answers of the judge go on coming in."""
        if step and step != self.checkpoints.latest_complete():
            metadata = {'model': dataclasses.asdict(self.model_config), 'position': await self.collector.agree(), 'owed': owed}
            async with self.crew.held():  # processes wait for each other on their devices when they begin to save
                await asyncio.to_thread(self.checkpoints.save, step, state, metadata, None if score is None else -score)
            await asyncio.to_thread(self.checkpoints.wait)

    async def _evaluate(self, writer: MetricWriter, step: int) -> float | None:
        """Mean reward on the held-out problems, reported with half a 95% interval over problems; None without such problems."""
        if not self.held_out:
            return None
        actor = dataclasses.replace(self.actor, params=self._evaluation_params(), size=self.cfg.evaluation.samples,
                                    seed=self.cfg.seed ^ 0x5EED)

        async def answer(held_out: Sequence[tuple[int, Problem]]) -> Sequence[Group]:
            works = [actor.group(problem, i) for i, problem in held_out]
            return await all_at_once(self.endpoint, works, len(works) * actor.size)

        groups = await self.crew.divided(list(enumerate(self.held_out)), answer)
        metrics = evaluation_metrics(groups)
        writer.write(step, metrics)
        logging.info('step %d: %s', step, {name: round(value, 4) for name, value in metrics.items()})
        return metrics['eval/reward']


def evaluation_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What is reported of graded answers to held-out problems."""
    scores = [[r.reward for r in group.rollouts if r.reward is not None] for group in groups]
    means, rollouts = [np.mean(s) for s in scores if s], [r for group in groups for r in group.rollouts]
    return {
        'eval/reward': float(np.mean(means)) if means else float('nan'),
        'eval/interval': float(1.96 * np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float('nan'),
        'eval/ungraded': float(np.mean([r.reward is None for r in rollouts])),
        'eval/tokens': float(np.mean([len(r.completion.ids) for r in rollouts])),
        'eval/truncated': float(np.mean([r.completion.finish_reason == 'length' for r in rollouts])),
    }


class _Clock:
    """Where the seconds of a step go: into decoding, learning, and waiting with idle devices."""

    def __init__(self, engine: Engine):
        self._engine, self._start, self._busy, self._laps = engine, time.perf_counter(), self._work(engine), dict[str, float]()

    def lap(self, name: str) -> None:
        """Ends a part of the step."""
        self._laps[name] = time.perf_counter() - self._start - sum(self._laps.values())

    def shares(self) -> dict[str, float]:
        """Seconds of the step and their shares."""
        seconds = sum(self._laps.values())
        # The engine counts a chunk when it ends: one that began before the step must not make a share of more than its time.
        decode = min(self._work(self._engine) - self._busy, self._laps['collect'])
        return {'seconds': seconds, 'share/decode': decode / seconds, 'share/learn': self._laps['learn'] / seconds,
                'share/idle': (self._laps['collect'] - decode) / seconds}

    @staticmethod
    def _work(engine: Engine) -> float:
        return engine.stats.worked + engine.stats.waited


def write_samples(file: TextIO, step: int, groups: Sequence[Group]) -> None:
    """Appends every answer of a step, for people to read."""
    for group in groups:
        for i, r in enumerate(group.rollouts):
            state = {} if group.turn is None else {'turn': group.turn, 'summary': group.summary}
            row = {'step': step, 'draw': group.draw, 'sample': i, 'problem': group.problem, 'answer': r.answer, 'reward': r.reward,
                   'feedback': r.feedback, 'text': r.completion.text, 'finish_reason': r.completion.finish_reason,
                   'tokens': len(r.completion.ids), 'versions': r.completion.versions} | state
            file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()
