"""The recipe's programs in their full size, compiled for the slices that its configs name: what they hold, keep in place, and send."""

import math
import re

import pytest

from configs import qed_nano_rl, qed_nano_sft
from qedjax.plan import hlo, memory, programs, work
from qedjax.plan.chips import parse_topology
from qedjax.plan.runs import ROOM, engine_of, lengths, model_of, vocabulary
from qedjax.sharding import TRAIN_AXES, make_mesh, make_rollout_mesh, mesh_sizes

pytestmark = pytest.mark.tpu_aot

LENGTH = 49_920  # the longest answer and the longest prompt


@pytest.fixture(autouse=True)
def libtpu():
    pytest.importorskip('libtpu', reason='needs the libtpu wheel')


@pytest.mark.parametrize(('hardware', 'topology', 'executed', 'hidden'), [('v5p-64', 'v5p:4x4x4', 1.15, 0.0),
                                                                          ('v5e-256', 'v5e:16x16', 1.25, 0.3)])
def test_the_sft_step(hardware, topology, executed, hidden):
    cfg, slice = qed_nano_sft.get_config(hardware), parse_topology(topology)
    cfg.row_length = LENGTH
    model, rows = cfg.model, cfg.batch_size // cfg.accumulation
    sizes = dict(zip(TRAIN_AXES, mesh_sizes(cfg.mesh, slice.devices), strict=True))
    program = programs.sft_programs(cfg, model, make_mesh(cfg.mesh, programs.topology_devices(slice.aot)), model.vocab_size)['step']
    assert_nothing_long_is_square(hlo.parse(program.text), lengths(sizes, rows, LENGTH), vocabulary(model, sizes))
    state = memory.bytes_a_device(memory.abstract_state(model, cfg.optimizer, sizes))
    assert program.aliased >= 0.99 * state  # the train state is written in place
    assert program.arguments + program.extra < ROOM * slice.chip.hbm
    least = work.micro_batch(model, sizes, slice, rows, LENGTH)
    assert program.flops < executed * least.model_flops * cfg.accumulation
    assert sum(c.sent for c in program.sent) < 1.2 * sum(least.sent.values()) * cfg.accumulation
    assert max(c.bytes for c in program.sent if c.kind == 'all-gather') < memory.REPLICATED  # no device ever has a larger array whole
    assert sum(c.sent for c in program.sent if c.hidden) >= hidden * sum(c.sent for c in program.sent)


def test_the_rollout_engine():
    """Of one host of the slice: decoding and both ends of prefilling, over a cache that is never copied."""
    cfg, slice = qed_nano_rl.get_config('v5p-64'), parse_topology('v5p:4x4x4')
    rollout, config, shards = engine_of(cfg, model_of(cfg)[0], slice)
    mesh = make_rollout_mesh(shards, cfg.tensor, programs.topology_devices(slice.host.aot))
    cache = programs.cache_bytes(rollout, config, shards, cfg.tensor)
    for name, compiled in programs.compile_engine(mesh, rollout, config, rollout.vocab_size).items():
        program = programs.measure(name, compiled)
        assert program.aliased >= cache, name
        assert program.extra < 0.02 * cache
        shape = [int(n) for n in re.findall(r'\d+', name)]  # of prefilling: rows x length
        positions = {math.prod(shape)} if shape else {config.max_length}
        assert_nothing_long_is_square(hlo.parse(program.text), positions, {rollout.vocab_size, rollout.vocab_size // cfg.tensor})


def assert_nothing_long_is_square(module, positions, vocabulary):
    """Neither T x V nor T x T."""
    assert not hlo.spanning(module, positions, vocabulary)
    assert not hlo.spanning(module, positions, positions)
