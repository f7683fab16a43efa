"""Compiles the very programs of a run for a TPU slice that is not there: the train step, and the engine's prefill and decode.

Needs the libtpu wheel (`pip install -e '.[aot]'`) and no TPU.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qedjax.model.cache import PagedCache
from qedjax.model.config import ModelConfig
from qedjax.model.transformer import Transformer
from qedjax.plan import costs, hlo
from qedjax.plan.chips import Slice
from qedjax.plan.collectives import Collective, collectives
from qedjax.rl.config import RLConfig
from qedjax.rl.losses import rl_loss
from qedjax.rollout import decode, engine
from qedjax.rollout.engine_config import EngineConfig, pages_a_shard, prefill_shapes, table_width
from qedjax.sharding import abstract, spec
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import make_optimizer
from qedjax.train.sft import SFTConfig
from qedjax.train.step import compiler_options, init_state, make_train_step, summed_programs
from qedjax.types import RLBatch, TrainBatch

# libtpu would otherwise look for hardware and for a metadata server, lock out other processes, and write to stderr.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_MIN_LOG_LEVEL': '3',
               'TPU_STDERR_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


class OutOfMemory(ValueError):
    """A program that the compiler could not fit into HBM, of which it wanted `used` bytes, or into on-chip memory (`used` is 0)."""

    def __init__(self, name: str, message: str):
        sizes = re.findall(r'([\d.]+)([KMGT])\b', message)[:2]  # 'Used 17.2G of 15.75G hbm', '... (147.03G) exceeds available HBM (95.74G)'
        space = re.search(r'memory space (\w+)', message)
        hbm = not space or space.group(1) == 'hbm'
        self.used = float(sizes[0][0]) * 1024 ** ' KMGT'.index(sizes[0][1]) if sizes and hbm else 0.0
        super().__init__(f'{name} does not fit: it needs {" of ".join("".join(size) for size in sizes)} '
                         f'{"HBM" if hbm else space and space.group(1)}' if sizes else
                         f'{name} does not fit: {message.splitlines()[0][:200]}')


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, per device.

    Attributes:
      name: what it does.
      arguments, temporary, aliased, results: bytes, as the compiler's memory analysis tells.
      flops, hbm: of one call, see costs.
      sent: its collectives.
      text: of the optimised module.
    """

    name: str
    arguments: int
    temporary: int
    aliased: int
    results: int
    flops: float
    hbm: float
    sent: tuple[Collective, ...]
    text: str = dataclasses.field(repr=False, default='')

    @property
    def extra(self) -> int:
        """Bytes beside the arguments: temporaries, and results that are not written over arguments."""
        return self.temporary + max(self.results - self.aliased, 0)

    def link_seconds(self, slice: Slice) -> float:
        """Least time of its collectives, each on the links that it can use."""
        chip = slice.chip
        return sum(c.sent / (chip.link_bandwidth * slice.share(c.group)) for c in self.sent if c.group > 1)


def can_compile(slice: Slice) -> bool:
    """Whether this machine can compile for these accelerators."""
    return bool(slice.chip.aot) and importlib.util.find_spec('libtpu') is not None


def topology_devices(name: str) -> list:
    """Devices of a TPU slice that is not there. Raises ValueError for one that libtpu does not know."""
    from jax.experimental import topologies  # loads libtpu

    os.environ.update(ENVIRONMENT)
    try:
        return topologies.get_topology_desc(name, platform='tpu').devices
    except Exception as error:  # of several types, by version
        raise ValueError(f'libtpu has no topology {name!r}: {str(error).splitlines()[0][:160]}') from error


def build(name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program. Raises OutOfMemory if it does not fit."""
    try:
        with warnings.catch_warnings():  # JAX's cache on disk takes such programs in but cannot read them: they are compiled anew
            warnings.filterwarnings('ignore', message='Error reading persistent compilation cache')
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise OutOfMemory(name, str(error)) from error


def measure(name: str, compiled: jax.stages.Compiled) -> Program:
    """What a compiled program needs, computes and sends."""
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text()
    assert text is not None
    module = hlo.parse(text)
    return Program(name, memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes,
                   memory.output_size_in_bytes, costs.flops(module), costs.hbm_bytes(module), tuple(collectives(module)), text)


def sft_programs(cfg: SFTConfig, model: ModelConfig, mesh: Mesh, num_valid: int) -> dict[str, Program]:
    """The train step of SFT."""
    tx = make_optimizer(cfg.optimizer, cfg.steps or 1)
    state = abstract(lambda: init_state(Transformer(model, jax.random.key(0)), tx), mesh)
    loss = functools.partial(next_token_loss, num_valid=num_valid)
    step = make_train_step(loss, tx, cfg.optimizer.clip_norm, cfg.seed, compiler_options(mesh))
    shape = cfg.accumulation, cfg.batch_size // cfg.accumulation, cfg.row_length
    with jax.set_mesh(mesh):
        return {'step': measure('train step', build('the train step', step.lower(state, _rows(TrainBatch, mesh, shape))))}


def rl_programs(cfg: RLConfig, model: ModelConfig, mesh: Mesh, num_valid: int) -> dict[str, Program]:
    """The programs of the RL step: the gradient of a micro-batch, and the update."""
    tx = make_optimizer(cfg.optimizer, cfg.steps)
    loss = functools.partial(rl_loss, cfg=cfg.objective, temperature=cfg.temperature, num_valid=num_valid)
    zero, add, apply = summed_programs(loss, tx, cfg.optimizer.clip_norm, cfg.seed, compiler_options(mesh))
    state = abstract(lambda: init_state(Transformer(model, jax.random.key(0)), tx), mesh)
    rows = _rows(RLBatch, mesh, (cfg.micro_rows, cfg.row_length))
    sums = abstract(lambda: jax.eval_shape(zero, state.model, rows), mesh)
    with jax.set_mesh(mesh):
        lowered = {'gradient of a micro-batch': add.lower(state.model, sums, rows), 'update': apply.lower(state, sums)}
    return {key: measure(name, build(f'the {name}', lowered[name])) for key, name in zip(('add', 'apply'), lowered, strict=True)}


def _rows(kind: type, mesh: Mesh, shape: tuple[int, ...]):
    """Shapes of packed rows, as place_batch lays them out."""
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec(*[None] * (len(shape) - 2), 'batch', 'sequence'))
    integers = {'tokens', 'targets', 'positions', 'segment_ids'}
    return kind(**{field.name: jax.ShapeDtypeStruct(shape, jnp.int32 if field.name in integers else jnp.float32, sharding=sharding)
                   for field in dataclasses.fields(kind)})


def compile_engine(mesh: Mesh, cfg: ModelConfig, config: EngineConfig, num_valid: int) -> dict[str, jax.stages.Compiled]:
    """The decode loop, and the prefill of many short prompts and of a long one, compiled for a rollout mesh."""
    shards = mesh.shape['data']
    width, pages = table_width(config, cfg), pages_a_shard(config, cfg, shards)
    model = abstract(lambda: Transformer(cfg, jax.random.key(0)), mesh)
    cache = abstract(lambda: PagedCache.create(cfg, pages, config.page_size), mesh)

    def shape(array):
        with jax.set_mesh(mesh):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec('batch', *[None] * (array.ndim - 1))))

    members = shards, (config.slots + config.staged) // shards
    pool = jax.tree.map(shape, engine.blank_pool(members, width, config))
    programs = {}
    with jax.set_mesh(mesh):
        programs['decode'] = build('decode', decode.decode.lower(
            model, cache, pool, pool, shape(np.zeros(members, bool)), slots=config.slots // shards, steps=config.steps,
            num_valid=num_valid, top=config.top_logprobs, entropy=config.entropy))
        for rows, length in (max(prefill_shapes(config)), max(prefill_shapes(config), key=lambda shape: shape[1])):
            ids = jax.ShapeDtypeStruct((shards * rows, length), jnp.int32)
            table = jax.ShapeDtypeStruct((shards * rows, width), jnp.int32)
            programs[f'prefill {rows}x{length}'] = build('prefill', decode.prefill.lower(model, cache, ids, ids, table))
    return programs


def cache_bytes(cfg: ModelConfig, config: EngineConfig, shards: int, tensor: int) -> int:
    """Size of the engine's cache on a device."""
    tokens = (1 + pages_a_shard(config, cfg, shards)) * config.page_size
    heads = math.ceil(2 * cfg.num_kv_heads / tensor)
    return cfg.num_layers * tokens * heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
