"""Plans of SFT and RL runs: what each device holds, what a step costs, and how long the whole run takes.

With `compiled` programs the figures are read from them; without, they are estimates from the model's shape.
"""

import dataclasses
import functools
import math
import pathlib

from qedjax.checkpoint.load import load_tokenizer, resolve_config
from qedjax.data.chat import num_valid_ids
from qedjax.model.config import ModelConfig, validate
from qedjax.plan import hlo, memory, programs, work
from qedjax.plan.chips import SMEM, Slice
from qedjax.plan.collectives import sent_by_kind
from qedjax.plan.programs import Program
from qedjax.plan.work import Decoding, Work
from qedjax.rl import config as rl_config
from qedjax.rl.config import RLConfig
from qedjax.rollout import engine_config
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import TRAIN_AXES, check_rows, make_mesh, make_rollout_mesh, mesh_sizes, off_torus
from qedjax.train import sft
from qedjax.train.sft import SFTConfig

ROOM = 0.9  # of HBM that a plan may fill: XLA and the runtime keep some, and memory fragments


@dataclasses.dataclass
class Plan:
    """All that a report tells.

    Attributes:
      slice, model, sizes: where, what, and on which mesh.
      compiled: whether libtpu compiled the programs.
      held: bytes a device holds all the time, by what.
      passing: bytes besides, by program; the largest counts.
      step: work of the update of one step; least: what the layout needs for it.
      steps: of the run.
      tokens: that a step trains.
      rollout: of an RL run.
      used: bytes that the compiler came to, where it gave up.
      blocked: why a program cannot be, whatever HBM there is; '' if none is known.
      checks: sentences on what was looked for in the compiled programs; notes: what a reader must know.
    """

    slice: Slice
    model: ModelConfig
    sizes: dict[str, int]
    compiled: bool
    held: dict[str, float]
    passing: dict[str, float]
    step: Work
    least: Work
    steps: int
    tokens: float
    rollout: 'Rollout | None' = None
    checks: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    used: float = 0.0
    blocked: str = ''

    @property
    def fits(self) -> bool:
        return not self.blocked and self.peak <= ROOM * self.slice.chip.hbm

    @property
    def peak(self) -> float:
        return max(sum(self.held.values()) + max(self.passing.values(), default=0.0), self.used)

    @property
    def learn_seconds(self) -> float:
        """Of the update, if compute, HBM and links overlap wholly."""
        return max(self.step.seconds(self.slice).values())

    @property
    def step_seconds(self) -> float:
        return self.learn_seconds + (self.rollout.seconds if self.rollout else 0.0)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampling of a step, one engine a host.

    Attributes:
      engines, decoding: how many, and what each does.
      cache_tokens, fitting_tokens: positions of the cache as configured and as fit, all engines together.
      in_flight: answers of full length that the smaller of the two holds.
      seconds: to sample a step's answers with every row busy.
      answer: tokens of an answer that this counts with.
    """

    engines: int
    decoding: Decoding
    cache_tokens: float
    fitting_tokens: float
    in_flight: float
    seconds: float
    answer: int


def plan(cfg: SFTConfig | RLConfig, slice: Slice, *, compile: bool = True, answer: int = 0) -> Plan:
    """The plan of a run on a slice.

    Args:
      cfg: of the run.
      slice: the accelerators.
      compile: ask libtpu, if it is installed and knows the slice.
      answer: tokens of an answer on average; 0 is max_tokens, the worst case.

    Raises ValueError, in one sentence, for a config that cannot run there.
    """
    if not isinstance(cfg, SFTConfig | RLConfig):
        raise ValueError(f'the config is a {type(cfg).__name__}; plans are made of SFTConfig and RLConfig')
    if not 0 <= answer <= getattr(cfg, 'max_tokens', 0):
        raise ValueError(f'answer={answer} must be between 0 and max_tokens={getattr(cfg, "max_tokens", 0)}')
    sizes = dict(zip(TRAIN_AXES, mesh_sizes(cfg.mesh, slice.devices), strict=True))
    model, num_valid, notes = model_of(cfg)
    validate(model)
    if not slice.holds(list(sizes.values())):
        raise off_torus(sizes)
    shards = sizes['tensor'] * sizes['context']
    if model.num_heads % shards:
        raise ValueError(f'num_heads={model.num_heads} cannot be split over tensor x context = {shards} devices')
    compile = compile and programs.can_compile(slice)
    if not slice.chip.torus:
        model = dataclasses.replace(model, attention='cudnn' if model.attention == 'splash' else model.attention)
        notes.append(f'attention counted as {model.attention}; links are NVLinks: what goes between hosts takes longer')
    if not compile:
        notes.append('estimated from the model\'s shape: ' + ('libtpu is missing, or compiling was switched off' if slice.chip.aot else
                                                              f'{slice.chip.name} cannot be compiled for from here'))
    def make(compile: bool) -> Plan:
        if isinstance(cfg, SFTConfig):
            return _plan_sft(cfg, slice, sizes, model, num_valid, compile, list(notes))
        return _plan_rl(cfg, slice, sizes, model, num_valid, compile, answer, list(notes))

    try:
        return make(compile)
    except programs.OutOfMemory as error:
        made = make(compile=False)
        made.used = error.used
        made.blocked = made.blocked or ('' if error.used else str(error))
        made.notes.append(f'{error}; all other figures are estimates')
        return made


def model_of(cfg: SFTConfig | RLConfig) -> tuple[ModelConfig, int, list[str]]:
    """The model as it is trained and its decodable ids: those of `init` if it is here, else those that the config tells."""
    if cfg.init and pathlib.Path(cfg.init).is_dir():
        return resolve_config(cfg.init, cfg.model), _decodable(cfg.init), []
    model = dataclasses.replace(cfg.model, max_positions=max(cfg.model.max_positions, cfg.row_length))
    return model, model.vocab_size, [f'{cfg.init or "init"} is not here: sizes are those of config.model '
                                     f'({model.num_params / 1e9:.2f} billion parameters)']


@functools.lru_cache(maxsize=1)
def _decodable(init: str) -> int:
    return num_valid_ids(load_tokenizer(init))


def _plan_sft(cfg: SFTConfig, slice: Slice, sizes, model, num_valid, compile, notes) -> Plan:
    """One program, which holds the state and all micro-batches of a step."""
    sft.validate(cfg)
    rows = cfg.batch_size // cfg.accumulation
    check_rows(memory.abstract_mesh(sizes), rows, cfg.row_length, 'batch_size / accumulation')
    state = memory.abstract_state(model, cfg.optimizer, sizes)
    held = _state_bytes(state)
    least = work.micro_batch(model, sizes, slice, rows, cfg.row_length).times(cfg.accumulation).plus(work.update(model, sizes))
    found: dict[str, Program] = {}
    if compile:
        found = programs.sft_programs(cfg, model, make_mesh(cfg.mesh, programs.topology_devices(slice.aot)), num_valid)
        step, passing = found['step'], {'train step': float(found['step'].extra)}
        done = _done(step, slice, least.model_flops)
    else:
        gradients = memory.gradient_bytes(model, sizes) * (1 if cfg.accumulation == 1 else 2)  # with the sums of those before
        done, passing = least, {'train step (estimated)': gradients + memory.activation_bytes(model, sizes, rows, cfg.row_length)}
    steps = cfg.steps or 0
    if not steps:
        notes.append('the number of steps follows from the data: set --config.steps to see days')
    checks = _checks(found, state, model, sizes, rows, cfg.row_length)
    return Plan(slice, model, sizes, compile, held, passing, done, least, steps, cfg.batch_size * cfg.row_length, None, checks, notes)


def _plan_rl(cfg: RLConfig, slice: Slice, sizes, model, num_valid, compile, answer, notes) -> Plan:
    """Learner and engine share the devices: whichever works, the other's arrays stay."""
    rl_config.validate(cfg)
    check_rows(memory.abstract_mesh(sizes), cfg.micro_rows, cfg.row_length, 'micro_rows')
    answer = answer or cfg.max_tokens
    answers = cfg.groups * cfg.group_size
    longest = cfg.problems.max_prompt + answer
    documents = 1 if model.attention == 'cudnn' else max(cfg.row_length // longest, 1)  # a row: cuDNN's kernel takes one
    micros = math.ceil(answers / documents / cfg.micro_rows)
    state = memory.abstract_state(model, cfg.optimizer, sizes)
    micro, update = work.micro_batch(model, sizes, slice, cfg.micro_rows, cfg.row_length), work.update(model, sizes)
    least = micro.times(micros).plus(update)
    rollout_model, config, shards = engine_of(cfg, model, slice)
    cache = programs.cache_bytes(rollout_model, config, shards, cfg.tensor)
    held = _state_bytes(state) | {'rollout weights': rollout_model.num_params * 2 / cfg.tensor, 'KV cache': float(cache)}
    plan = Plan(slice, model, sizes, compile, held, {}, least, least, cfg.steps, answers * longest, notes=notes)
    found: dict[str, Program] = {}
    if compile:
        found = programs.rl_programs(cfg, model, make_mesh(cfg.mesh, programs.topology_devices(slice.aot)), num_valid)
        plan.step = _done(found['add'], slice, micro.model_flops).times(micros).plus(_done(found['apply'], slice, 0.0))
        plan.passing = _passing(found, held)
    else:
        plan.passing['train step (estimated)'] = 2 * memory.gradient_bytes(model, sizes) + memory.activation_bytes(
            model, sizes, cfg.micro_rows, cfg.row_length)
    plan.checks = _checks(found, state, model, sizes, cfg.micro_rows, cfg.row_length)
    fitting = _fitting(plan, rollout_model, config, cfg.tensor) * shards
    table = memory.table_bytes(config.slots // shards, engine_config.table_width(config, rollout_model))
    if compile:
        plan.passing |= _compile_engine(cfg, plan, rollout_model, config, shards, fitting, num_valid)
    elif rollout_model.paged_attention == 'ragged' and table > SMEM:
        plan.blocked = (f'decode does not fit: the page table of slots={config.slots} takes {table:,} of the {SMEM:,} bytes of SMEM; lower '
                        '--config.engine.slots or raise --config.engine.page_size')
        notes.append(plan.blocked)
    plan.rollout = _rollout(cfg, plan, rollout_model, config, shards, fitting, answer)
    notes.append(f'a step: {answers} answers of {answer:,} tokens in {micros} micro-batches of {cfg.micro_rows} rows')
    return plan


def _fitting(plan: Plan, model: ModelConfig, config: EngineConfig, tensor: int) -> int:
    """Positions of whole pages that fit a data shard beside all else."""
    free = ROOM * plan.slice.chip.hbm - (plan.peak - plan.held['KV cache'])
    pages = free / memory.kv_bytes(model, tensor) // config.page_size - 2  # nobody's page, and one for a shared last page
    return max(int(pages), 0) * config.page_size


def _compile_engine(cfg: RLConfig, plan: Plan, model: ModelConfig, config: EngineConfig, shards: int, fitting: int, num_valid: int
                    ) -> dict[str, float]:
    """What the engine's programs need beside what is held, compiled with the configured cache or, if that is too large, what fits."""
    configured = engine_config.pages_a_shard(config, model, shards) * config.page_size * shards
    if fitting < configured:
        plan.notes.append(f'the cache of {configured:,} positions an engine does not fit: set --config.engine.cache_tokens={fitting}')
        config = dataclasses.replace(config, cache_tokens=fitting)
    if fitting < model.max_positions:
        return {}
    mesh = make_rollout_mesh(shards, cfg.tensor, programs.topology_devices(plan.slice.host.aot))
    try:
        compiled = programs.compile_engine(mesh, model, config, num_valid)
    except programs.OutOfMemory as error:
        plan.notes.append(f'{error}; lower --config.engine.slots={config.slots}')
        plan.blocked = str(error)
        return {}
    cache = programs.cache_bytes(model, config, shards, cfg.tensor)
    found = {name: programs.measure(name, program) for name, program in compiled.items()}
    return _passing(found, plan.held | {'KV cache': float(cache)})


def engine_of(cfg: RLConfig, model: ModelConfig, slice: Slice) -> tuple[ModelConfig, EngineConfig, int]:
    """Model and sizes of the engine of one host, and its data shards."""
    devices = slice.host.devices
    if devices % cfg.tensor:
        raise ValueError(f'tensor={cfg.tensor} must divide the {devices} devices of a host')
    shards = devices // cfg.tensor
    rollout = dataclasses.replace(model, param_dtype=model.dtype, remat='none')
    config = dataclasses.replace(cfg.engine, max_length=cfg.engine.max_length or cfg.row_length)
    engine_config.validate(config, shards, rollout)
    return rollout, config, shards


def flying(cfg: RLConfig) -> int:
    """Answers that are sampled at a time, if the engines can."""
    return cfg.group_size * (max(cfg.in_flight * max(cfg.chains.states, 1), cfg.groups) if cfg.max_lag else cfg.groups)


def _rollout(cfg: RLConfig, plan: Plan, model: ModelConfig, config: EngineConfig, shards: int, fitting: int,
             answer: int) -> Rollout:
    """Sampling of a step's answers with as many rows as slots, cache and answers allow."""
    engines, full = plan.slice.hosts, cfg.problems.max_prompt + answer
    cached = engine_config.pages_a_shard(config, model, shards) * config.page_size * shards * engines
    fitting *= engines
    context, answers = cfg.problems.max_prompt + answer / 2, cfg.groups * cfg.group_size
    if cfg.chains.states:  # the turns of chains are sampled besides
        answers += cfg.groups // cfg.chains.states * (cfg.chains.decoding.turns - (not cfg.chains.replay))
    rows = min(config.slots / shards, min(cached, fitting) / (shards * engines) / context, flying(cfg) / (shards * engines))
    decoding = work.decoding(model, plan.slice, shards, cfg.tensor, rows, context)
    seconds = answers * answer / (decoding.rate * engines) if decoding.rate else math.inf
    return Rollout(engines, decoding, cached, fitting, min(cached, fitting) / full, seconds, answer)


def _state_bytes(state) -> dict[str, float]:
    return {'parameters': float(memory.bytes_a_device(state.model)), 'optimizer': float(memory.bytes_a_device(state.opt_state))}


def _done(program: Program, slice: Slice, model_flops: float) -> Work:
    hidden = sum(c.sent for c in program.sent if c.hidden)
    return Work(model_flops, program.flops, program.hbm, sent_by_kind(program.sent), program.link_seconds(slice), hidden)


def _passing(found: dict[str, Program], held: dict[str, float]) -> dict[str, float]:
    """What each program needs beside what is held all the time: its own arguments are parts of that, or gradients, rows and tables."""
    own = {'add': held['parameters'], 'apply': held['parameters'] + held['optimizer']}
    engine = held['rollout weights'] + held['KV cache']
    return {program.name: program.extra + max(program.arguments - own.get(key, engine), 0.0) for key, program in found.items()}


def _checks(found: dict[str, Program], state, model: ModelConfig, sizes: dict[str, int], rows: int, length: int) -> list[str]:
    """What was looked for in the train step, and what was found."""
    whole = memory.replicated(state)
    checks = ['replicated arrays above 64 MB: ' + (', '.join(f'{name} ({size / 1e6:.0f} MB)' for name, size in whole) or 'none')]
    program = found.get('step') or found.get('add')
    if program:
        module = hlo.parse(program.text)
        for name, other in (('T x V', vocabulary(model, sizes)), ('T x T', lengths(sizes, rows, length))):
            bad = hlo.spanning(module, lengths(sizes, rows, length), other)
            checks.append(f'buffers of {name}: ' + (', '.join(sorted({f'{a.dtype}{list(a.dims)}' for a in bad})) or 'none'))
        if loops := hlo.uncounted_loops(module):
            checks.append(f'loops that run as often as the data say, counted once: {len(loops)}')
        held = memory.bytes_a_device(state) if 'step' in found else memory.gradient_bytes(model, sizes)
        what = 'train state' if 'step' in found else 'gradient sums'
        checks.append(f'{what} written in place: ' + ('yes' if program.aliased >= 0.99 * held else
                                                      f'NO, only {program.aliased / 2**30:.2f} of {held / 2**30:.2f} GiB'))
    return checks


def lengths(sizes: dict[str, int], rows: int, length: int) -> set[int]:
    """Sizes that the positions of a micro-batch can have on a device."""
    local = rows // (sizes['data'] * sizes['fsdp'])
    return {n * m for n in (length, length // sizes['context']) for m in (1, local)}


def vocabulary(model: ModelConfig, sizes: dict[str, int]) -> set[int]:
    """Sizes that the vocabulary can have on a device."""
    return {model.vocab_size, model.vocab_size // sizes['tensor']}
