"""Compiles the engine's prefill and decode of a 4B model for a TPU slice that is not there, and prints what they need.

python tools/aot_rollout.py --topology=v5p:2x2x1 [--tensor=4 --slots=64 --cache_tokens=1048576 --max_length=53248]

Needs the libtpu wheel (`pip install -e '.[aot]'`). One engine serves one process, so a topology here is one host's chips.
"""

import dataclasses

import jax
from absl import flags
from jax.sharding import Mesh

from qedjax import cli
from qedjax.model.presets import qwen3_4b
from qedjax.plan.programs import cache_bytes, compile_engine, topology_devices
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import make_rollout_mesh

TOPOLOGY = flags.DEFINE_string('topology', 'v5p:2x2x1', 'TPU topology of one host.')
TENSOR = flags.DEFINE_integer('tensor', 4, 'Chips that share the heads; the others share the slots.')
SLOTS = flags.DEFINE_integer('slots', 64, 'Requests decoded at a time.')
MAX_LENGTH = flags.DEFINE_integer('max_length', 53_248, 'Positions of a request.')
CACHE_TOKENS = flags.DEFINE_integer('cache_tokens', 2**20, 'Positions that the cache holds.')


def topology_mesh(topology: str, tensor: int) -> Mesh:
    """Rollout mesh over the chips of a topology."""
    devices = topology_devices(topology)
    return make_rollout_mesh(len(devices) // tensor, tensor, devices)


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
        size = cache_bytes(cfg, config, mesh.shape['data'], mesh.shape['tensor'])
        print(f'{TOPOLOGY.value} {name:>14}: {describe(compiled, size)}', flush=True)


if __name__ == '__main__':
    cli.run(main)
