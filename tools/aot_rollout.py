"""Compiles the engine's prefill and decode of a 4B model for a TPU slice that is not there, and prints what they need.

python tools/aot_rollout.py --topology=v5p:2x2x1 [--tensor=4 --slots=64 --cache_tokens=1048576 --max_length=53248]

Needs the libtpu wheel (`pip install -e '.[aot]'`). One engine serves one process, so a topology here is one host's chips.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from qedjax import cli
from qedjax.model.cache import PagedCache
from qedjax.model.config import ModelConfig
from qedjax.model.presets import qwen3_4b
from qedjax.model.transformer import Transformer
from qedjax.rollout import decode, engine
from qedjax.rollout.engine_config import EngineConfig, pages_a_shard, prefill_shapes, table_width
from qedjax.sharding import abstract, make_rollout_mesh, spec

TOPOLOGY = flags.DEFINE_string('topology', 'v5p:2x2x1', 'TPU topology of one host.')
TENSOR = flags.DEFINE_integer('tensor', 4, 'Chips that share the heads; the others share the slots.')
SLOTS = flags.DEFINE_integer('slots', 64, 'Requests decoded at a time.')
MAX_LENGTH = flags.DEFINE_integer('max_length', 53_248, 'Positions of a request.')
CACHE_TOKENS = flags.DEFINE_integer('cache_tokens', 2**20, 'Positions that the cache holds.')

# libtpu would otherwise look for hardware and for a metadata server, lock out other processes, and write to stderr.
ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_MIN_LOG_LEVEL': '3',
               'TPU_STDERR_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


def topology_mesh(topology: str, tensor: int) -> Mesh:
    """Rollout mesh over the chips of a topology."""
    from jax.experimental import topologies  # loads libtpu

    os.environ.update(ENVIRONMENT)
    devices = topologies.get_topology_desc(topology, platform='tpu').devices
    return make_rollout_mesh(len(devices) // tensor, tensor, devices)


def compile_engine(mesh: Mesh, cfg: ModelConfig, config: EngineConfig, num_valid: int) -> dict[str, jax.stages.Compiled]:
    """The decode loop, and the prefill of one prompt and of many, compiled for the mesh."""
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
        programs['decode'] = decode.decode.lower(
            model, cache, pool, pool, shape(np.zeros(members, bool)), slots=config.slots // shards, steps=config.steps,
            num_valid=num_valid, top=config.top_logprobs, entropy=config.entropy).compile()
        for rows, length in (max(prefill_shapes(config)), max(prefill_shapes(config), key=lambda shape: shape[1])):
            ids = jax.ShapeDtypeStruct((shards * rows, length), jnp.int32)
            table = jax.ShapeDtypeStruct((shards * rows, width), jnp.int32)
            programs[f'prefill {rows}x{length}'] = decode.prefill.lower(model, cache, ids, ids, table).compile()
    return programs


def cache_bytes(mesh: Mesh, cfg: ModelConfig, config: EngineConfig) -> int:
    """Size of the cache on a chip."""
    tokens = (1 + pages_a_shard(config, cfg, mesh.shape['data'])) * config.page_size
    heads = 2 * cfg.num_kv_heads // mesh.shape['tensor']
    return cfg.num_layers * tokens * heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize


def describe(compiled: jax.stages.Compiled, cache_bytes: int) -> str:
    """One line on a program's memory a chip, and whether the cache goes in and comes out as one buffer that is never copied."""
    memory = compiled.memory_analysis()
    aliased = memory.alias_size_in_bytes >= cache_bytes > memory.temp_size_in_bytes
    return (f'arguments {memory.argument_size_in_bytes / 2**30:.2f} GiB, temporary {memory.temp_size_in_bytes / 2**30:.3f} GiB a chip; '
            f'the cache of {cache_bytes / 2**30:.2f} GiB is {"written in place" if aliased else "COPIED"}')


def main(_) -> None:
    mesh = topology_mesh(TOPOLOGY.value, TENSOR.value)
    cfg = dataclasses.replace(qwen3_4b(), param_dtype='bfloat16', paged_attention='ragged', remat='none', max_positions=MAX_LENGTH.value)
    config = EngineConfig(slots=SLOTS.value, staged=SLOTS.value, max_length=MAX_LENGTH.value, cache_tokens=CACHE_TOKENS.value)
    for name, compiled in compile_engine(mesh, cfg, config, 151_669).items():
        print(f'{TOPOLOGY.value} {name:>14}: {describe(compiled, cache_bytes(mesh, cfg, config))}', flush=True)


if __name__ == '__main__':
    cli.run(main)
