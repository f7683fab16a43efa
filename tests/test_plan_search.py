"""The search for a layout: what it tries, how it ranks, and what it says."""

import dataclasses
import types

import jax
import pytest
from jax.experimental import mesh_utils
from test_plan import command, config

from qedjax.plan import memory, programs, search
from qedjax.plan.chips import SMEM, parse_topology
from qedjax.plan.report import report
from qedjax.plan.runs import plan
from qedjax.sharding import mesh_sizes


def small(**changes):
    """Two narrow layers and short rows: a slice of four chips holds them."""
    cfg = config('qed_nano_sft', row_length=2048, batch_size=4, **changes)
    cfg.model = dataclasses.replace(cfg.model, num_layers=2, embed_dim=512, mlp_dim=1024, num_heads=8, vocab_size=8192)
    return cfg


@pytest.mark.parametrize(('topology', 'sizes'), [
    ('v5p:4x4x4', (16, 4, 1)), ('v5p:4x4x4', (4, 4, 4)), ('v5p:4x4x4', (8, 8, 1)), ('v5p:4x4x4', (64, 1, 1)), ('v6e:8x8', (8, 8, 1)),
    ('v6e:8x8', (16, 4, 1)), ('v5e:16x16', (16, 16, 1)), ('v5e:16x16', (64, 4, 1)), ('v5e:2x4', (2, 2, 2)), ('v5p:2x4x8', (4, 8, 2)),
    ('v5p:2x2x4', (2, 2, 4)), ('v5p:2x2x4', (4, 4, 1))])
def test_a_torus_holds_what_jax_lays_on_it(topology, sizes):
    slice = parse_topology(topology)
    x, y, z = (*slice.sides, 1)[:3]
    devices = [types.SimpleNamespace(platform='tpu', device_kind=slice.chip.kind, coords=(i, j, k), core_on_chip=0, process_index=0)
               for k in range(z) for j in range(y) for i in range(x)]
    try:
        mesh_utils.create_device_mesh(sizes, devices)
        laid = True
    except NotImplementedError:
        laid = False
    assert slice.holds(sizes) == laid


def test_gpus_of_several_hosts_share_no_row():
    ranked = search.search(config('qed_nano_sft', batch_size=64), parse_topology('h100:64'))
    assert max(one.plan.sizes['context'] * one.plan.sizes['tensor'] for one in ranked) == 8


@pytest.mark.parametrize(('name', 'topology'), [('qed_nano_sft', 'v5e:16x16'), ('qed_nano_rl', 'v6e:8x8'), ('qed_nano_rc', 'h100:8')])
def test_what_is_found_fits_and_is_ranked_by_the_time_of_a_step(name, topology):
    slice = parse_topology(topology)
    ranked = search.search(config(name), slice)
    assert all(one.plan.fits and slice.holds(mesh_sizes(one.cfg.mesh, slice.devices)) for one in ranked)
    times = [float(f'{one.plan.step_seconds:.4g}') for one in ranked]
    assert times == sorted(times)
    best = ranked[0]
    assert best.plan == plan(best.cfg, slice, compile=False)
    if best.plan.rollout:
        assert best.plan.rollout.cache_tokens <= best.plan.rollout.fitting_tokens
        assert best.cfg.engine.cache_tokens >= best.cfg.row_length


def test_the_flags_of_the_best_make_its_plan():
    """What the command prints as the best is what the plan of these flags says."""
    arguments = ['--config=configs/qed_nano_rl.py', '--topology=v5p:4x4x4', '--nocompile']
    found = command(*arguments, '--search')
    assert found.returncode == 0, found.stderr
    flags = next(line for line in found.stdout.splitlines() if line.startswith('the best: ')).removeprefix('the best: ').split()
    planned = command(*arguments, *flags)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.split('- planned in')[0] in found.stdout


@pytest.mark.parametrize(('name', 'topology', 'changes', 'reason'), [
    ('qed_nano_sft', 'v5e:2x2', {}, 'nothing fits v5e:2x2: of .* layouts the smallest, .* needs .* of 16 GiB'),
    ('qed_nano_rl', 'v5e:2x2', {}, 'nothing fits v5e:2x2'), ('qed_nano_sft', 'v5p:3x3x3', {}, 'cannot (be split|be shared|share) '),
    ('qed_nano_sft', 'v5e:4x4', {'format': 'odd'}, 'odd')])
def test_a_slice_that_is_too_small_is_one_sentence(name, topology, changes, reason):
    with pytest.raises(ValueError, match=reason) as error:
        search.search(config(name, **changes), parse_topology(topology))
    assert '\n' not in str(error.value)


def test_smem_bounds_the_slots():
    """What libtpu took and refused, and that a plan says so."""
    assert max(memory.table_bytes(*size) for size in ((504, 390), (288, 780), (1008, 195), (16, 16_255))) <= SMEM
    assert min(memory.table_bytes(*size) for size in ((508, 390), (292, 780), (1016, 195), (8, 32_639))) > SMEM
    cfg = config('qed_nano_rl')
    cfg.engine = dataclasses.replace(cfg.engine, slots=512)
    made = plan(cfg, parse_topology('v5p:4x4x4'), compile=False)
    assert not made.fits
    assert 'the page table of slots=512' in report(made, '')


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for libtpu; its entries are what it says by remat policy, a program by default."""
    said = {}

    def compile(cfg, *_):
        if cfg.model.remat in said:
            raise said[cfg.model.remat]
        return {'step': programs.Program('train step', 0, 2**30, 0, 0, 1e12, 1e9, (), 'HloModule m\nENTRY %e (p: f32[]) -> f32[] {\n'
                                         '  ROOT %p = f32[] parameter(0)\n}')}

    monkeypatch.setattr(programs, 'can_compile', lambda slice: True)
    monkeypatch.setattr(programs, 'sft_programs', compile)
    monkeypatch.setattr(programs, 'topology_devices', lambda name: jax.devices()[:4])
    return said


def test_what_the_compiler_refuses_is_named_and_passed_over(compiler):
    compiler['none'] = programs.OutOfMemory('the train step', 'Ran out of memory in memory space smem. Used 1.01M of 1.00M smem.')
    compiler['dots'] = NotImplementedError('no such kernel')
    text = '\n'.join(search.tell(small(), parse_topology('v5e:2x2'), 'small'))
    assert 'remat none, 4 x 1 rows: the train step does not fit: it needs 1.01M of 1.00M smem' in text
    assert 'remat dots, 4 x 1 rows: libtpu refuses it: no such kernel' in text
    assert 'confirmed by libtpu' in text
    assert 'compiled by libtpu' in text.split('the best:')[1]


def test_what_the_compiler_needed_over_its_estimate_is_expected_of_the_others(compiler):
    compiler['none'] = programs.OutOfMemory('the train step', 'Ran out of memory in memory space hbm. Used 900.0G of 15.75G hbm.')
    told = []
    with pytest.raises(ValueError, match='none of the layouts that were compiled fits v5e:2x2'):
        told += search.tell(small(), parse_topology('v5e:2x2'), 'small')
    slice = parse_topology('v5e:2x2')
    found = list(search.confirm(search.search(small(), slice), slice, 0))
    assert [reason for _, reason in found] == ['needs 900.0 of 16 GiB a device']


@pytest.mark.tpu_aot
def test_libtpu_confirms_the_best():
    pytest.importorskip('libtpu', reason='needs the libtpu wheel')
    text = '\n'.join(search.tell(small(), parse_topology('v5e:2x2'), 'small'))
    assert 'confirmed by libtpu: ' in text
    assert 'compiled by libtpu' in text.split('the best:')[1]
