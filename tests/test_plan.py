"""Plans: the chip table, the analytic estimates, and the command."""

import dataclasses
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from qedjax.clusters import slices
from qedjax.model.config import ModelConfig
from qedjax.model.presets import qwen3_4b
from qedjax.model.transformer import Transformer
from qedjax.plan import costs, hlo, memory, programs, work
from qedjax.plan.chips import CHIPS, parse_topology
from qedjax.plan.report import report
from qedjax.plan.runs import plan
from qedjax.rl.batch import Sample, pack
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import random_batch, tiny_config
from qedjax.train.losses import next_token_loss
from qedjax.train.optimizer import OptimizerConfig, make_optimizer
from qedjax.train.step import init_state

ROOT = pathlib.Path(__file__).parents[1]


def test_every_chip_has_a_peak_and_a_balance_that_can_be():
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 1000  # FLOPs a byte
        assert chip.hbm >= 16e9 > chip.link_bandwidth / 100


@pytest.mark.parametrize(('text', 'devices', 'hosts'), [('v5p:4x4x4', 64, 16), ('v5e:16x16', 256, 64), ('v7x:2x2x1', 8, 1),
                                                        ('h100:8', 8, 1), ('H200:16', 16, 2), ('v5e:1x1', 1, 1), ('v6e:2x4', 8, 1),
                                                        ('v5e:4x4', 16, 4)])
def test_topologies(text, devices, hosts):
    slice = parse_topology(text)
    assert (slice.devices, slice.hosts, slice.name) == (devices, hosts, text.lower())


@pytest.mark.parametrize('text', ['v4:2x2x1', 'v4:4x4x4', 'v5e:1x1', 'v5e:2x4', 'v5e:16x16', 'v5p:2x2x2', 'v5p:4x4x4', 'v6e:2x4'])
def test_plans_and_launchers_count_the_same_chips_and_hosts(text):
    planned, launched = parse_topology(text), slices.parse(text)
    assert (planned.chips, planned.hosts) == (launched.chips, launched.hosts)


@pytest.mark.parametrize(('text', 'reason'), [('v9:2x2', 'no chip'), ('v5p', 'no size'), ('v5p:4x4', 'has 2 sides'), ('h100:0', 'no size')])
def test_bad_topologies_are_one_sentence(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_topology(text)
    assert '\n' not in str(error.value)


def test_a_collective_uses_the_links_of_the_sides_that_it_fills():
    slice = parse_topology('v5p:4x4x4')
    assert [slice.share(group) for group in (2, 4, 16, 64)] == [1 / 3, 1 / 3, 2 / 3, 1]
    assert parse_topology('h100:8').share(2) == 1


SIZES = {'data': 1, 'fsdp': 4, 'context': 2, 'tensor': 1}


def config(name, **changes):
    return dataclasses.replace(importlib.import_module(f'configs.{name}').get_config(), **changes)


def test_state_is_what_is_made():
    """Bytes of a device's part, on a mesh of no devices and on a real one."""
    cfg, optimizer = tiny_config(), OptimizerConfig()
    state = memory.abstract_state(cfg, optimizer, SIZES)
    tx, mesh = make_optimizer(optimizer, 1), make_mesh(MeshConfig(fsdp=4, context=2))
    real = create(lambda: init_state(Transformer(cfg, jax.random.key(0)), tx), mesh)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    assert memory.bytes_a_device(state) == held
    assert memory.gradient_bytes(cfg, SIZES) == pytest.approx(memory.bytes_a_device(state.model), rel=0.2)


def test_large_replicated_arrays_are_named():
    whole = memory.abstract_state(qwen3_4b(), OptimizerConfig(), {'data': 4, 'fsdp': 1, 'context': 1, 'tensor': 1})
    assert ('.model.embed.value', 4 * 151_936 * 2560) in memory.replicated(whole)
    assert not memory.replicated(memory.abstract_state(qwen3_4b(), OptimizerConfig(), SIZES))


@pytest.mark.parametrize('remat', ['full', 'attention', 'none'])
def test_the_estimate_of_flops_is_what_a_compiled_gradient_does(remat):
    """On one device; attention is one dense block, which is little of the whole."""
    cfg = tiny_config(remat=remat, vocab_size=512, embed_dim=64, mlp_dim=256, attention_block=64)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: Transformer(cfg, jax.random.key(0)))
        batch = jax.tree.map(jnp.asarray, random_batch(0, 4, 64))
        gradient = jax.jit(jax.grad(lambda m, b: next_token_loss(m, b)[0]))
        done = costs.flops(hlo.parse(gradient.lower(model, batch).compile().as_text()))
    assert done == pytest.approx(work.executed_flops(cfg, 4, 64), rel=0.25)


def test_executed_flops_follow_the_policy():
    model = 4096 * qwen3_4b().flops_per_token(4096)
    per_model = {remat: work.executed_flops(dataclasses.replace(qwen3_4b(), remat=remat), 1, 4096) / model
                 for remat in ('none', 'dots', 'attention', 'full')}
    assert 1 <= per_model['none'] == per_model['dots'] < per_model['attention'] < per_model['full'] < 1.4


@pytest.mark.parametrize('name', ['qed_nano_sft', 'qed_nano_rl', 'qed_nano_rc'])
@pytest.mark.parametrize('topology', ['v5p:4x4x4', 'h100:64'])
def test_the_recipe_is_planned_without_a_compiler(name, topology):
    made = plan(config(name), parse_topology(topology), compile=False)
    text = report(made, name)
    assert 'estimated' in text
    assert made.peak == pytest.approx(sum(made.held.values()) + max(made.passing.values()))
    assert made.held['parameters'] == pytest.approx(4 * made.model.num_params / made.sizes['fsdp'], rel=0.01)
    assert 1 < made.step.flops / made.step.model_flops < 1.7
    assert made.learn_seconds >= made.step.flops / made.slice.chip.flops
    assert ('DOES NOT FIT' in text) == (made.peak > 0.9 * made.slice.chip.hbm)


def test_what_a_longer_answer_costs():
    short, long = (plan(config('qed_nano_rl'), parse_topology('v5p:4x4x4'), compile=False, answer=n) for n in (8192, 32_768))
    assert short.rollout.seconds < long.rollout.seconds / 4
    assert short.rollout.in_flight > long.rollout.in_flight
    assert short.learn_seconds < long.learn_seconds / 2


@pytest.mark.parametrize(('attention', 'documents'), [('cudnn', 1), ('splash', None)])
def test_the_micro_batches_of_a_step_are_those_that_are_packed(attention, documents):
    cfg = config('qed_nano_rl', groups=2, group_size=32, micro_rows=4, max_tokens=3000, row_length=10_000, mesh=MeshConfig(fsdp=4))
    cfg.model = dataclasses.replace(cfg.model, attention=attention)
    sample = Sample((0,) * 768, (0,) * 3000, (0.0,) * 3000, 0.0, 1.0)
    micros = len(pack([sample] * 64, 10_000, 4, documents))
    made = plan(cfg, parse_topology('h100:4'), compile=False) if documents else plan(cfg, parse_topology('v5p:2x2x1'), compile=False)
    assert any(f'in {micros} micro-batches' in note for note in made.notes)


def test_a_mesh_that_a_torus_cannot_hold_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError('Failed to find assignment')

    monkeypatch.setattr(jax, 'make_mesh', refuse)
    with pytest.raises(ValueError, match='product of some of its sides'):
        make_mesh(MeshConfig(fsdp=4, context=2))


@pytest.mark.parametrize(('message', 'used'), [
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded by 1.5G.', 17.25 * 2**30),
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, HLO temporaries (147.00G) exceeds available HBM (95.74G).', 147 * 2**30),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space smem. Used 1.01M of 1.00M smem.', 0),
    ('RESOURCE_EXHAUSTED: something else', 0)])
def test_a_program_that_does_not_fit_is_still_planned(monkeypatch, message, used):
    def compile(*_):
        raise programs.OutOfMemory('the train step', message)

    monkeypatch.setattr(programs, 'can_compile', lambda slice: True)
    monkeypatch.setattr(programs, 'sft_programs', compile)
    monkeypatch.setattr(programs, 'topology_devices', lambda name: jax.devices())
    made = plan(config('qed_nano_sft', mesh=MeshConfig(fsdp=8), batch_size=8), parse_topology('v5e:2x4'))
    assert made.used == used
    assert made.peak >= used
    assert not made.compiled
    assert any('the train step does not fit' in note for note in made.notes)


@pytest.mark.parametrize(('name', 'topology', 'changes', 'reason'), [
    ('qed_nano_sft', 'v5p:2x2x2', {}, 'needs 64 devices'), ('qed_nano_sft', 'v5p:4x4x4', {'batch_size': 8}, 'cannot be shared evenly'),
    ('qed_nano_sft', 'v5p:4x4x4', {'optimizer': OptimizerConfig(name='adam')}, 'choose one of'),
    ('qed_nano_rl', 'v5p:4x4x4', {'tensor': 3}, 'must divide the 4 devices'),
    ('qed_nano_rl', 'v5p:4x4x4', {'mesh': MeshConfig(fsdp=32, context=2), 'micro_rows': 32}, 'cannot be laid on this TPU slice'),
    ('qed_nano_sft', 'v5p:4x4x4', {'model': ModelConfig(remat='some')}, 'remat'),
    ('qed_nano_rl', 'v5p:4x4x4', {'model': ModelConfig(embed_dim=2570)}, 'cannot share evenly')])
def test_runs_that_cannot_be_are_refused(name, topology, changes, reason):
    with pytest.raises(ValueError, match=reason):
        plan(config(name, **changes), parse_topology(topology), compile=False)


def test_the_rl_step_is_made_of_the_programs_that_are_planned():
    """They compile for any devices; here for eight of CPU."""
    cfg = config('qed_nano_rl', model=tiny_config(), row_length=128, micro_rows=4, max_tokens=64,
                 engine=EngineConfig(slots=4, staged=4, max_length=128, steps=4, prefill_tokens=64, prefill_rows=(4, 1)))
    found = programs.rl_programs(cfg, cfg.model, make_mesh(MeshConfig(fsdp=4, context=2)), 300)
    assert found['add'].aliased >= memory.gradient_bytes(cfg.model, SIZES)
    assert found['add'].flops > 0
    assert {c.kind for c in found['add'].sent} >= {'all-gather', 'all-to-all'}
    assert found['apply'].aliased >= memory.bytes_a_device(memory.abstract_state(cfg.model, cfg.optimizer, SIZES)) * 0.99
    engine = programs.compile_engine(make_rollout_mesh(1, 2), cfg.model, cfg.engine, 300)
    size = programs.cache_bytes(cfg.model, cfg.engine, 1, 2)
    assert size <= programs.measure('decode', engine['decode']).aliased <= 1.2 * size + 10_000


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--config=configs/qed_nano_sft.py', '--topology=v5p'], "error: topology 'v5p' has no size"),
    (['--topology=v5p:4x4x4'], 'error: no --config'),
    (['--config=configs/qed_nano_rl.py', '--topology=v5p:4x4x4', '--answer=60000'], 'error: answer=60000 must be')])
def test_bad_flags_are_one_sentence(arguments, sentence):
    done = command(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert 'Traceback' not in done.stderr


def test_the_command_prints_a_table():
    done = command('--config=configs/qed_nano_rl.py', '--topology=h100:64', '--answer=30000')
    assert done.returncode == 0, done.stderr
    assert 'h100 cannot be compiled for' in done.stdout
    for word in ('optimizer', 'KV cache', 'peak', 'MFU', 'all-to-all', 'full answers in flight', 'chip-hours'):
        assert word in done.stdout


def command(*arguments):
    return subprocess.run([sys.executable, 'tools/plan.py', *arguments], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          capture_output=True, text=True, check=False)


@pytest.mark.tpu_aot
def test_the_sft_step_is_planned_for_real_chips():
    """Two layers of narrow width, the recipe's vocabulary: state in place, no T x V and no T x T, collectives near their least."""
    pytest.importorskip('libtpu', reason='needs the libtpu wheel')
    cfg = config('qed_nano_sft', row_length=5120, batch_size=2, mesh=MeshConfig(fsdp=2, context=2))
    cfg.model = dataclasses.replace(cfg.model, num_layers=2, embed_dim=1024, mlp_dim=3072, num_heads=16)
    made = plan(cfg, parse_topology('v5e:2x2'))
    assert made.compiled
    assert made.checks == ['replicated arrays above 64 MB: none', 'buffers of T x V: none', 'buffers of T x T: none',
                           'train state written in place: yes']
    assert made.step.flops == pytest.approx(made.least.flops, rel=0.15)
    assert made.peak < 0.9 * made.slice.chip.hbm
    assert set(made.step.sent) <= {'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute'}
    assert sum(made.step.sent.values()) < 2 * sum(made.least.sent.values())  # of so small a model the head is the larger part
    assert made.step.hidden > 0
    assert 'compiled by libtpu' in report(made, 'test')
