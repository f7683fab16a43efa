"""Supervised fine-tuning: packed rows in, checkpoints out. One loop, from flags to files.

Order of a start: check the config, read and pack the data, open the workdir, then make or restore the state and compile. All that can be
wrong with a flag, a path or a row is therefore said before anything is compiled.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging

from qedjax.checkpoint.load import copy_tokenizer, load_model, load_tokenizer, read_generation_config, refuse_inside, resolve_config
from qedjax.checkpoint.manager import Checkpointer
from qedjax.data.chat import dropped_reasoning, encode_row, num_valid_ids, stop_ids
from qedjax.data.loader import Loader
from qedjax.data.sources import CHAT, PAIR, Source, read_rows
from qedjax.metrics import MetricWriter, Progress, mfu, write_run_files
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.processes import Crew, Preempted, preemption
from qedjax.rollout.requests import MIN_TEMPERATURE
from qedjax.rollout.static import generate
from qedjax.sharding import MeshConfig, abstract, check_rows, create, make_mesh, move, without_context
from qedjax.train import optimizer as optimizers
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from qedjax.train.step import TrainState, compiler_options, init_state, make_eval_step, make_train_step, place_batch
from qedjax.types import Example, SamplingParams

FORMATS = {'chat': CHAT, 'pair': PAIR}


@dataclasses.dataclass(unsafe_hash=True)
class MonitorConfig:
    """Sampling at each evaluation, on the first held-out prompts: shows runaway lengths and loops long before a benchmark does.

    Attributes:
      prompts: how many; 0 is off.
      max_tokens, temperature: of each sample.
      ngram: length of the n-grams whose repetitions are counted.
    """

    prompts: int = 0
    max_tokens: int = 256
    temperature: float = 0.8
    ngram: int = 8


@dataclasses.dataclass(unsafe_hash=True)
class SFTConfig:
    """One SFT run.

    Attributes:
      init: Hugging Face or Orbax folder to start from; '' starts from random weights of `model`.
      tokenizer: folder of the tokenizer; '' is that of `init`.
      model: with `init`, sizes come from its config and only param_dtype, dtype, attention, attention_block and remat from here.
      train, evaluation: sources; an empty path is no evaluation.
      format: of their rows: 'chat' (messages) or 'pair' (prompt, completion and perhaps reasoning).
      turns: of a chat, train 'all' assistant turns (one sample each) or the 'last'.
      row_length: tokens a packed row; longer documents are dropped and counted.
      batch_size: rows a step. accumulation: micro-batches they are split into.
      steps: updates; 0 is `epochs` epochs.
      save_every, evaluate_every: steps; 0 is once an epoch. The last step is always saved and evaluated.
      keep: newest checkpoints kept, besides the one with the best evaluation loss; keep_every: steps whose multiples stay.
      max_skipped: steps in a row that may be skipped because they are not finite, before the run stops.
      seed: of the data order, of fresh weights and of all sampling.
    """

    init: str = ''
    tokenizer: str = ''
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: Source = dataclasses.field(default_factory=Source)
    evaluation: Source = dataclasses.field(default_factory=Source)
    format: str = 'chat'
    turns: str = 'all'
    row_length: int = 2048
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 0
    epochs: int = 1
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    save_every: int = 0
    evaluate_every: int = 0
    keep: int = 2
    keep_every: int = 0
    max_skipped: int = 10
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    seed: int = 0


def validate(cfg: SFTConfig) -> None:
    """Raises ValueError, in one sentence, for a run that cannot be started."""
    if not isinstance(cfg, SFTConfig):
        raise ValueError(f'the config is a {type(cfg).__name__}; SFT takes an SFTConfig, such as that of configs/smollm2_sft.py')
    optimizers.validate(cfg.optimizer)
    if not cfg.train.path:
        raise ValueError('no training data: set --config.train.path to a JSONL, Parquet or CSV file or to hub:ORG/NAME')
    if not cfg.init and not cfg.tokenizer:
        raise ValueError('a run from random weights needs a tokenizer: set --config.tokenizer to its folder')
    if cfg.accumulation < 1 or cfg.batch_size % cfg.accumulation:
        raise ValueError(f'batch_size={cfg.batch_size} rows cannot be split into accumulation={cfg.accumulation} equal micro-batches')
    if cfg.steps < 0 or (not cfg.steps and cfg.epochs < 1):
        raise ValueError(f'set steps or epochs to a positive number, not steps={cfg.steps}, epochs={cfg.epochs}')
    if cfg.turns not in ('all', 'last') or cfg.format not in FORMATS:
        raise ValueError(f"turns is {cfg.turns!r} and format {cfg.format!r}; choose 'all' or 'last', and 'chat' or 'pair'")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f'seed must be in [0, 2^32), not {cfg.seed}')
    for name, least in (('save_every', 0), ('evaluate_every', 0), ('keep', 1), ('keep_every', 0), ('max_skipped', 1)):
        if getattr(cfg, name) < least:
            raise ValueError(f'{name} must be at least {least}, not {getattr(cfg, name)}')
    monitor = cfg.monitor
    sound = monitor.temperature == 0 or MIN_TEMPERATURE <= monitor.temperature < math.inf
    if monitor.prompts and not (sound and min(monitor.prompts, monitor.max_tokens, monitor.ngram) > 0):
        raise ValueError(f'monitor needs positive prompts, max_tokens and ngram, and temperature 0 or >= {MIN_TEMPERATURE}: {monitor}')
    if monitor.prompts and not cfg.evaluation.path:
        raise ValueError('the monitor samples from held-out prompts: set --config.evaluation.path, or --config.monitor.prompts=0')


def train(cfg: SFTConfig, workdir: str, *, mode: str = 'resume', devices: list[jax.Device] | None = None) -> TrainState:
    """Runs (or resumes) one SFT run and returns its last state.

    Args:
      cfg: the run.
      workdir: receives checkpoints/, hf_files/ (tokenizer and configs), config.json, environment.json, metrics.jsonl, tensorboard/.
      mode: 'resume', 'fresh' or 'overwrite', as Checkpointer.
      devices: all by default.

    Raises ValueError for a config, data or checkpoint that does not fit; FloatingPointError after `max_skipped` bad steps in a row;
    Preempted after SIGTERM, with a checkpoint written.
    """
    validate(cfg)
    refuse_inside(workdir, init=cfg.init)
    run = Crew().made(lambda: _Run(cfg, pathlib.Path(workdir), devices))
    fingerprint = {'data': run.loader.fingerprint, 'model': dataclasses.asdict(run.model_config), 'steps': run.steps,
                   'optimizer': dataclasses.asdict(cfg.optimizer), 'seed': cfg.seed}
    with Checkpointer(run.workdir / 'checkpoints', fingerprint, mode=mode, keep=cfg.keep, keep_every=cfg.keep_every) as checkpoints:
        copy_tokenizer(cfg.tokenizer or cfg.init, run.workdir, anew=checkpoints.latest_complete() is None)
        write_run_files(run.workdir, dataclasses.replace(cfg, model=run.model_config))
        with jax.set_mesh(run.mesh):
            return run.loop(checkpoints)


class _Run:
    """What a run holds on to: everything here is made once, before the first step."""

    def __init__(self, cfg: SFTConfig, workdir: pathlib.Path, devices: list[jax.Device] | None):
        self.cfg, self.workdir = cfg, workdir
        self.mesh = make_mesh(cfg.mesh, devices)
        self.model_config = resolve_config(cfg.init, cfg.model)
        self.tokenizer = load_tokenizer(cfg.tokenizer or cfg.init)
        self.num_valid = num_valid_ids(self.tokenizer)
        if self.num_valid > self.model_config.vocab_size or cfg.row_length > self.model_config.max_positions:
            raise ValueError(f'the model has {self.model_config.vocab_size} rows and {self.model_config.max_positions} positions, but the '
                             f'tokenizer has {self.num_valid} ids and row_length is {cfg.row_length}')
        check_rows(self.mesh, cfg.batch_size // cfg.accumulation, cfg.row_length, 'batch_size / accumulation')
        self.loader = self._load(cfg.train)
        self.eval_loader = self._load(cfg.evaluation) if cfg.evaluation.path else None
        self.requests = self._requests(self.eval_loader) if self.eval_loader and cfg.monitor.prompts else []
        self.steps = cfg.steps or cfg.epochs * self.loader.steps_per_epoch
        self.tx = make_optimizer(cfg.optimizer, self.steps)
        loss = functools.partial(next_token_loss, num_valid=self.num_valid)
        self.train_step = make_train_step(loss, self.tx, cfg.optimizer.clip_norm, cfg.seed, compiler_options(self.mesh))
        self.eval_step = make_eval_step(loss)
        self.schedule = make_schedule(cfg.optimizer, self.steps)
        self.target = abstract(self._fresh, self.mesh)
        with jax.set_mesh(self.mesh):  # traced before the workdir is touched: a mesh that this model cannot use is named here
            jax.eval_shape(self.train_step, self.target, place_batch(self.loader.fetch(0), self.mesh, cfg.accumulation))

    def _fresh(self) -> TrainState:
        return init_state(Transformer(self.model_config, jax.random.key(self.cfg.seed)), self.tx)

    def _load(self, source: Source) -> Loader:
        rows, report = read_rows(source, FORMATS[self.cfg.format])
        examples = encode_rows(rows, self.tokenizer, self.cfg.turns, source)
        # cuDNN's kernel knows lengths but no segments: it gets one document a row.
        most = 1 if self.model_config.attention == 'cudnn' else None
        loader = Loader(examples, row_length=self.cfg.row_length, batch=self.cfg.batch_size, seed=self.cfg.seed, max_documents=most)
        logging.info('%s: %s; %s', source.path, report, loader.report)
        return loader

    def _requests(self, loader: Loader) -> list[tuple[tuple[int, ...], SamplingParams]]:
        """What the monitor samples: those of the first held-out prompts that leave room for an answer, all with one seed."""
        monitor, source = self.cfg.monitor, self.cfg.tokenizer or self.cfg.init
        stops = stop_ids(self.tokenizer, read_generation_config(source))
        params = SamplingParams(monitor.temperature, monitor.max_tokens, self.cfg.seed, stops)
        room = self.model_config.max_positions - monitor.max_tokens
        requests = [(prompt, params) for prompt in loader.prompts(monitor.prompts) if len(prompt) <= room]
        if not requests:
            raise ValueError(f'monitor.max_tokens={monitor.max_tokens} leaves no room for a held-out prompt in the '
                             f"model's {self.model_config.max_positions} positions; lower it")
        return requests

    def loop(self, checkpoints: Checkpointer) -> TrainState:
        state, start = self._start(checkpoints)
        if start == self.steps:
            logging.info('%s: all %d steps are done', self.workdir, start)
        progress = Progress('sft', self.steps)
        with MetricWriter(self.workdir, start) as writer, preemption() as preempted:
            if self.owed:
                self._evaluate(state, start, writer)
            pending = None  # metrics are read one step late, so that the host never waits for the step that it has just started
            for k, batch in enumerate(self.loader.iterate(start, self.steps), start):
                state, metrics = self.train_step(state, place_batch(batch, self.mesh, self.cfg.accumulation))
                if pending:
                    self._report(writer, progress, *pending)
                pending = k + 1, metrics
                end = preempted(k + 1) and k + 1 < self.steps
                if end or self._due(k + 1, self.cfg.evaluate_every) or self._due(k + 1, self.cfg.save_every):
                    self._report(writer, progress, *pending)
                    pending = None
                    self._pause(state, k + 1, checkpoints, writer, end)
                if end:
                    raise Preempted
        return state

    def _start(self, checkpoints: Checkpointer) -> tuple[TrainState, int]:
        self.owed = False  # whether the evaluation of the step to begin with is to be made up for
        if checkpoints.latest_complete() is not None:
            state, metadata, step = checkpoints.restore(self.target)
            self.owed = metadata.get('owed', False)
            return state, step
        if not self.cfg.init:
            return create(self._fresh, self.mesh), 0
        model = load_model(self.cfg.init, self.mesh, self.model_config)
        return jax.jit(init_state, static_argnums=1, donate_argnums=0)(model, self.tx), 0

    def _due(self, step: int, every: int) -> bool:
        return step == self.steps or step % (every or self.loader.steps_per_epoch) == 0

    def _report(self, writer: MetricWriter, progress: Progress, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rates = progress.update(step, self.cfg.batch_size * self.cfg.row_length, loss=values['loss'], grad_norm=values['grad_norm'])
        if rates:
            flops = self.model_config.flops_per_token(self.cfg.row_length) * rates['tokens_per_second'] / self.mesh.size
            share = mfu(flops, self.mesh.devices.flat[0])
            rates |= {'mfu': share} if share else {}
        updates = step - int(values['skipped'])  # a skipped step moves the data on, but not the schedule
        writer.write(step, values | rates | {'learning_rate': float(self.schedule(max(updates - 1, 0)))})
        if values['skipped_in_a_row'] >= self.cfg.max_skipped:
            raise FloatingPointError(f'loss or gradient was not finite in {self.cfg.max_skipped} steps in a row, up to step {step}; the '
                                     'checkpoints before them are sound: lower the learning rate or look at the data')

    def _pause(self, state: TrainState, step: int, checkpoints: Checkpointer, writer: MetricWriter, end: bool) -> None:
        """Evaluation, monitor and checkpoint, where due; if the run is to end, a checkpoint alone, and the others at the next start."""
        due = self.eval_loader is not None and self._due(step, self.cfg.evaluate_every)
        metric = self._evaluate(state, step, writer) if due and not end else None
        if end or self._due(step, self.cfg.save_every):
            metadata = {'model': dataclasses.asdict(self.model_config), 'position': step, 'owed': due and end}
            checkpoints.save(step, state, metadata, metric)

    def _evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> float:
        """Writes what the evaluation and the monitor found; the held-out loss."""
        assert self.eval_loader
        metrics = self.evaluate(state.model, self.eval_loader)
        if self.requests:
            metrics |= self.monitor(state.model)
        writer.write(step, metrics)
        logging.info('step %d: %s', step, {name: round(value, 4) for name, value in metrics.items()})
        return metrics['eval/loss']

    def evaluate(self, model: Transformer, loader: Loader) -> dict[str, float]:
        """Mean loss and entropy over all held-out tokens."""
        totals = None
        for batch in loader.iterate(0, loader.steps_per_epoch):
            sums = self.eval_step(model, place_batch(batch, self.mesh, self.cfg.accumulation))
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        totals = {name: float(value) for name, value in jax.device_get(totals).items()}
        weight = totals.pop('weight')
        return {f'eval/{name}': value / weight for name, value in totals.items()}

    def monitor(self, model: Transformer) -> dict[str, float]:
        """Mean length, share cut by the budget and share of repeated n-grams of samples from held-out prompts."""
        prompts, params = zip(*self.requests, strict=True)
        mesh = without_context(self.mesh)
        with jax.set_mesh(mesh):
            results = generate(move(model, mesh), prompts, params, num_valid=self.num_valid, samples=range(len(prompts)))
        return {
            'monitor/tokens': float(np.mean([len(ids) for ids, _, _ in results])),
            'monitor/truncated': float(np.mean([reason == 'length' for _, _, reason in results])),
            'monitor/repetition': float(np.mean([repetition(ids, self.cfg.monitor.ngram) for ids, _, _ in results])),
        }


def encode_rows(rows: list[dict], tokenizer, turns: str, source: Source) -> Iterator[Example]:
    """Examples of all rows. Rows that cannot be trained on are reported, and an error above source.max_bad_share."""
    bad, dropped = [], 0
    for number, row in enumerate(rows, 1):
        try:
            yield from encode_row(row, tokenizer, turns)
        except ValueError as error:
            bad.append(f'good row {number}: {error}')
            continue
        replies = [i for i, message in enumerate(row.get('messages', ())) if message['role'] == 'assistant']
        if turns == 'last' and len(replies) > 1:
            dropped += dropped_reasoning(tokenizer, row['messages'][: replies[-1]])
    if dropped:
        logging.warning('%s: the chat template leaves %d characters of earlier reasoning out; turns=all trains them', source.path, dropped)
    if bad:
        logging.warning('%s: %d of %d rows cannot be trained on, e.g. %s', source.path, len(bad), len(rows), '; '.join(bad[:3]))
    if len(bad) > source.max_bad_share * len(rows):
        raise ValueError(f'{source.path}: {len(bad)} of {len(rows)} rows cannot be trained on, e.g. {"; ".join(bad[:3])}; mend them or '
                         f'raise max_bad_share={source.max_bad_share}')


def repetition(ids: tuple[int, ...], n: int) -> float:
    """Share of n-grams that occurred before in the same sequence; 0 for sequences shorter than n."""
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
