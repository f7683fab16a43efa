"""Checkpoints: exact restore on any mesh, damage named and skipped, failed saves loud, nothing good ever deleted."""

import dataclasses
import gc
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qedjax.checkpoint import manager
from qedjax.checkpoint.manager import Checkpointer, CheckpointError
from qedjax.sharding import MeshConfig, make_mesh, spec


class Tiny(nnx.Module):
    def __init__(self, key):
        self.weight = nnx.Param(jax.random.normal(key, (16, 8), jnp.bfloat16, out_sharding=spec('embed', 'mlp')))
        self.scale = nnx.Param(jnp.array([0.0, -0.0, jnp.nan, jnp.inf, 1e-45, 1.0, 2.0, 3.0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    model: Tiny
    opt: optax.OptState
    step: int


def init(seed=0):
    model = Tiny(jax.random.key(seed))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.float32))
    return State(model, tx.init(model), step=0)


def make(seed=0, step=7):
    """A state with something in every leaf, and what it is restored onto."""
    state = jax.jit(init, static_argnums=0)(seed)
    state = jax.tree.map(lambda leaf: leaf + 1 if leaf.dtype == jnp.int32 else leaf, state)
    return dataclasses.replace(state, step=step), abstract()


def abstract():
    return dataclasses.replace(jax.eval_shape(init), step=0)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def digests(folder):
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in pathlib.Path(folder).rglob('*') if path.is_file()}


def save_steps(directory, steps, tree, **options):
    with Checkpointer(directory, {}, **options) as ckpt:
        for step in steps:
            ckpt.save(step, tree, {})


# Restoring


def test_restore_is_bit_exact(tmp_path, mesh):
    state, target = make()
    with Checkpointer(tmp_path / 'run', {'seed': 1}) as ckpt:
        ckpt.save(3, state, {'position': 12, 'names': ['a', 'é']})
        tree, metadata, step = ckpt.restore(target)
    assert (step, metadata['position'], metadata['names']) == (3, 12, ['a', 'é'])
    assert jax.tree.structure(tree) == jax.tree.structure(state)
    assert bits(tree) == bits(state)
    assert tree.step == 7
    assert isinstance(tree.step, int)
    assert tree.model.weight[...].sharding == state.model.weight[...].sharding


def test_restore_on_other_meshes(tmp_path):
    """8 devices, then 4 with another layout, then 1: each saves what the one before restored."""
    meshes = [make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), jax.devices()[:fsdp * tensor])
              for fsdp, tensor in ((8, 1), (2, 2), (1, 1), (2, 4))]
    with jax.set_mesh(meshes[0]):
        state, _ = make()
        save_steps(tmp_path, [1], state)
    for step, mesh in enumerate(meshes[1:], start=2):
        with jax.set_mesh(mesh), Checkpointer(tmp_path, {}) as ckpt:
            tree, _, _ = ckpt.restore(abstract())
            assert bits(tree) == bits(state)
            assert tree.model.weight[...].sharding.mesh == mesh
            assert tree.model.weight[...].sharding.spec == spec('embed', 'mlp')
            ckpt.save(step, tree, {})


def test_arrays_may_change_once_save_returns(tmp_path, mesh):
    device, host = jnp.arange(1 << 20), np.arange(1 << 20)
    with Checkpointer(tmp_path, {}) as ckpt:
        ckpt.save(1, {'device': device, 'host': host}, {})
        jax.jit(lambda x: x * 0, donate_argnums=0)(device).block_until_ready()
        host[:] = 0
    tree = manager.restore_tree(tmp_path / '1', {'device': jax.ShapeDtypeStruct((1 << 20,), jnp.int32), 'host': host})
    np.testing.assert_array_equal(tree['device'], np.arange(1 << 20))
    np.testing.assert_array_equal(tree['host'], np.arange(1 << 20))


def test_mismatches_are_refused_by_name(tmp_path, mesh):
    save_steps(tmp_path, [1], {'model': {'a': jnp.ones((2, 3)), 'b': jnp.ones(4, jnp.bfloat16)}, 'step': 1})
    good = {'model': {'a': jnp.ones((2, 3)), 'b': jnp.ones(4, jnp.bfloat16)}, 'step': 0}
    cases = {
        "'model/a' has shape (2, 3)": {**good, 'model': {**good['model'], 'a': jnp.ones((3, 2))}},
        "'model/b' is bfloat16": {**good, 'model': {**good['model'], 'b': jnp.ones(4)}},
        "no array 'model/c'": {**good, 'model': {**good['model'], 'c': jnp.ones(4)}},
        "holds 'model/b'": {**good, 'model': {'a': good['model']['a']}},
        "holds 'model/a' (3 such": {'other': jnp.ones(1)},
    }
    for message, target in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            manager.restore_tree(tmp_path / '1', target)
        assert str(tmp_path / '1') in str(error.value)


def test_model_alone_in_another_dtype(tmp_path, mesh):
    state, _ = make()
    manager.save_tree(tmp_path / 'bare', {'model': state.model}, {'config': {'family': 'qwen3'}})
    save_steps(tmp_path / 'checkpoints', [5], state)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), abstract().model)
    for folder, found in ((tmp_path / 'bare', 'bare'), (tmp_path, '5'), (tmp_path / 'checkpoints', '5')):
        path = manager.find_checkpoint(folder)
        assert path.name == found
        model = manager.restore_subtree(path, target)
        assert isinstance(model.weight[...], np.ndarray)
        np.testing.assert_array_equal(model.weight[...], np.asarray(state.model.weight[...], np.float32))
    assert manager.read_manifest(tmp_path / 'bare')['metadata'] == {'config': {'family': 'qwen3'}}
    with pytest.raises(ValueError, match='already exists'):
        manager.save_tree(tmp_path / 'bare', {'model': state.model}, {})


def test_cut_arrays_and_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, '_CHUNK_BYTES', 1 << 10)
    tree = {'cut': jnp.arange(5000.0).reshape(50, 100), 'zeros': jnp.zeros((50, 100)), 'scalar': jnp.float32(2)}
    manager.save_tree(tmp_path / 'cut', tree, {})
    assert len(list((tmp_path / 'cut/cut').iterdir())) > 10
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    for sharding in (None, jax.NamedSharding(mesh, jax.P('fsdp'))):
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding if leaf.ndim else None)
                  for name, leaf in tree.items()}
        assert bits(manager.restore_tree(tmp_path / 'cut', target)) == bits(tree)


# Damage (B65, B72)


DAMAGES = {
    'empty': lambda path: (shutil.rmtree(path), path.mkdir()),
    'junk': lambda path: (shutil.rmtree(path), path.mkdir(), (path / 'notes.txt').write_text('x')),
    'a file': lambda path: (shutil.rmtree(path), path.write_text('x')),
    'no manifest': lambda path: (path / 'manifest.json').unlink(),
    'bad manifest': lambda path: (path / 'manifest.json').write_text('{"files": '),
    'file removed': lambda path: next((path / 'd').iterdir()).unlink(),
    'file cut': lambda path: os.truncate(next((path / 'd').iterdir()), 10),
    'metadata removed': lambda path: (path / '_METADATA').unlink(),
}
REASONS = {'empty': 'no manifest.json', 'junk': 'no manifest.json', 'a file': 'not a folder',
           'no manifest': 'no manifest.json', 'bad manifest': 'not readable', 'file removed': 'is missing',
           'file cut': 'has 10 bytes instead of', 'metadata removed': '_METADATA is missing'}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_step_is_named_skipped_and_replaced(tmp_path, damage, caplog):
    good, other = {'x': jnp.arange(8)}, {'x': jnp.arange(8) + 1}
    save_steps(tmp_path, [1, 2], good)
    DAMAGES[damage](tmp_path / '2')
    with Checkpointer(tmp_path, {}) as ckpt:
        assert f'{tmp_path}/2: skipped' in caplog.text
        assert REASONS[damage] in caplog.text
        assert ckpt.latest_complete() == 1
        assert bits(ckpt.restore(good)[0]) == bits(good)
        assert (tmp_path / '2').exists()
        with pytest.raises(ValueError, match=REASONS[damage]):
            ckpt.restore(good, step=2)
        ckpt.save(2, other, {})
    assert bits(manager.restore_tree(tmp_path / '2', good)) == bits(other)


def test_leftovers(tmp_path, caplog):
    """A tmp folder goes only after a newer step is safe; what we did not write stays."""
    tree = {'x': jnp.arange(8)}
    save_steps(tmp_path, [1], tree)
    shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
    (tmp_path / 'notes').mkdir()
    (tmp_path / '12').mkdir()
    with Checkpointer(tmp_path, {}) as ckpt:
        assert ckpt.latest_complete() == 1
        assert '2.orbax-checkpoint-tmp: skipped (a save that never finished)' in caplog.text
        assert 'notes: skipped (not a step)' in caplog.text
        assert (tmp_path / '2.orbax-checkpoint-tmp').exists()
        ckpt.save(2, tree, {})
    assert sorted(os.listdir(tmp_path)) == ['1', '12', '2', 'notes']


@pytest.mark.parametrize('copy', ['copytree', 'tar', 'symlink', 'read-only'])
def test_copies_restore_and_are_not_written(tmp_path, copy):
    tree = {'x': jnp.arange(8), 'y': jnp.ones((4, 4), jnp.bfloat16)}
    save_steps(tmp_path / 'run', [1], tree)
    source, target = tmp_path / 'run/1', tmp_path / 'copy'
    if copy == 'tar':
        with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
            tar.add(source, arcname='copy')
        with tarfile.open(tmp_path / 'a.tar') as tar:
            tar.extractall(tmp_path, filter='data')
    elif copy == 'symlink':
        target.symlink_to(source)
    else:
        shutil.copytree(source, target)
    before = digests(target)
    if copy == 'read-only':
        for path in (target, *target.rglob('*')):
            path.chmod(0o555 if path.is_dir() else 0o444)
    assert bits(manager.restore_tree(target, tree)) == bits(tree)
    assert digests(target) == before
    if copy == 'read-only':
        for path in (target, *target.rglob('*')):
            path.chmod(0o755)


def test_copy_without_small_files_is_refused(tmp_path):
    save_steps(tmp_path / 'run', [1], {'x': jnp.arange(4096)})
    (tmp_path / 'copy').mkdir()
    for file in filter(pathlib.Path.is_file, (tmp_path / 'run/1').rglob('*')):
        if file.stat().st_size > 1000 or file.name == 'manifest.json':
            target = tmp_path / 'copy/1' / file.relative_to(tmp_path / 'run/1')
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    before = digests(tmp_path / 'copy')
    with pytest.raises(ValueError, match=r'no complete checkpoint in .*1: file .* is missing'):
        manager.find_checkpoint(tmp_path / 'copy')
    with Checkpointer(tmp_path / 'copy', {}) as ckpt, pytest.raises(ValueError, match='is missing'):
        ckpt.restore({'x': jnp.arange(4096)})
    assert digests(tmp_path / 'copy') == before


KILLED = '''
import os, signal, sys
import jax.numpy as jnp
from qedjax.checkpoint.manager import Checkpointer
ckpt = Checkpointer(sys.argv[1], {})
first = (ckpt.latest_complete() or 0) + 1
if first > 1:
    assert (ckpt.restore({'x': jnp.zeros(1 << 21)})[0]['x'] == first - 1).all()
print('step', first, flush=True)
for step in range(first, first + 500):
    ckpt.save(step, {'x': jnp.full(1 << 21, step, jnp.float32)}, {})
    if sys.argv[2] == 'now' and step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
'''


def run(code, *args):
    env = {**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_as_save_returns(tmp_path, mesh):
    process = run(KILLED, tmp_path, 'now')
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path))[0] == '1'
    target = {'x': jax.ShapeDtypeStruct((1 << 21,), jnp.float32)}
    with Checkpointer(tmp_path, {}) as ckpt:
        assert ckpt.latest_complete() == 1
        ckpt.save(2, ckpt.restore(target)[0], {})
    assert sorted(os.listdir(tmp_path)) == ['1', '2']


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    rng, first = random.Random(0), []
    for _ in range(6):
        process = run(KILLED, tmp_path, 'later')
        line = process.stdout.readline()
        assert line.startswith('step'), process.communicate()[1]
        first.append(int(line.split()[1]))
        time.sleep(rng.uniform(0.05, 1.0))
        process.kill()
        process.communicate()
    assert first == sorted(first)
    assert first[-1] > first[0]


# Failing saves (B68)

# Orbax abandons the other writes of a save that fails, and Python reports those when they are collected.
abandoned = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def writes(directory, steps):
    with Checkpointer(directory, {}, keep=1) as ckpt:
        for step in steps:
            ckpt.save(step, {'x': jnp.full(1 << 18, step, jnp.float32)}, {})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    made = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip('needs to mount a tmpfs')
    yield folder
    gc.collect()
    subprocess.run(['umount', '-l', folder], check=True)


@abandoned
def test_disk_full(small_disk):
    run_folder = small_disk / 'run'
    writes(run_folder, [1])
    (small_disk / 'ballast').write_bytes(bytes(1500 << 10))
    before = digests(run_folder)
    with pytest.raises(CheckpointError) as error:
        writes(run_folder, [2])
    assert f'could not write {run_folder}/2 (0.0' in str(error.value)
    assert 'GB free' in str(error.value)
    assert digests(run_folder) == before
    with Checkpointer(run_folder, {}, keep=1) as ckpt:
        tree = {'x': jnp.ones(1 << 18)}
        ckpt.save(2, tree, {})
        with pytest.raises(CheckpointError, match='/2 '):  # surfaces at the next save
            ckpt.save(3, tree, {})
        (small_disk / 'ballast').unlink()
        ckpt.save(3, tree, {})
    assert os.listdir(run_folder) == ['3']


@abandoned
def test_read_only_disk(small_disk):
    writes(small_disk / 'run', [1])
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    with pytest.raises(CheckpointError, match=r'run/2 \(0\.00. GB free\): .*[Rr]ead-only'):
        writes(small_disk / 'run', [2])
    with pytest.raises(CheckpointError, match=r'could not write .*/other'):
        writes(small_disk / 'other', [1])
    assert bits(manager.restore_tree(small_disk / 'run/1', {'x': jnp.ones(1 << 18)})) == bits({'x': jnp.ones(1 << 18)})


def test_deleted_directory(tmp_path):
    with Checkpointer(tmp_path / 'run', {}) as ckpt:
        ckpt.save(1, {'x': jnp.ones(8)}, {})
        ckpt.wait()
        shutil.rmtree(tmp_path / 'run')
        with pytest.raises(CheckpointError, match=f'{tmp_path}/run was deleted'):
            ckpt.save(2, {'x': jnp.ones(8)}, {})


def test_failure_of_the_last_save_fails_the_script(tmp_path):
    code = '''
import resource, sys
import jax.numpy as jnp
from qedjax.checkpoint.manager import Checkpointer
with Checkpointer(sys.argv[1], {}, keep=1) as ckpt:
    ckpt.save(1, {'x': jnp.ones(1 << 18)}, {})
    ckpt.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    ckpt.save(2, {'x': jnp.ones(1 << 18)}, {})
'''
    process = run(code, tmp_path)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f'CheckpointError: could not write {tmp_path}/2 (' in errors
    assert os.listdir(tmp_path) == ['1']
    assert manager.problem(tmp_path / '1') is None


# Several processes


@pytest.mark.multiprocess
def test_two_processes_save_and_restore(tmp_path):
    """Each of two processes writes its shards; the step is complete for both, and restores here, on one process."""
    code = '''
import sys
import jax, jax.numpy as jnp, numpy as np
port, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.config.update('jax_num_cpu_devices', 2)
jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=process)
from qedjax.checkpoint.manager import Checkpointer
sharding = jax.NamedSharding(jax.make_mesh((4,), ('fsdp',)), jax.P('fsdp'))
tree = {'x': jax.make_array_from_callback((8, 8), sharding, lambda index: np.arange(64.0).reshape(8, 8)[index])}
for step in (1, 2, 3):
    with Checkpointer(folder, {}, keep=1) as ckpt:
        if step > 1:
            tree, metadata, found = ckpt.restore(tree)
            assert (found, metadata['n']) == (step - 1, step - 1), found
        ckpt.save(step, tree, {'n': step})
try:
    Checkpointer(f'{folder}/own' if process else folder, {})
except AssertionError as error:
    assert 'must be on a shared disk' in str(error), error
else:
    raise SystemExit('a disk that is not shared went unnoticed')
'''
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = [run(code, port, process, tmp_path) for process in range(2)]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == ['3', 'own']
    tree = manager.restore_tree(tmp_path / '3', {'x': jax.ShapeDtypeStruct((8, 8), jnp.float32)})
    np.testing.assert_array_equal(tree['x'], np.arange(64).reshape(8, 8))


# Retention and runs (B69)


def test_retention(tmp_path):
    with Checkpointer(tmp_path, {}, keep=2, keep_every=40) as ckpt:
        for step, loss in zip(range(10, 110, 10), [5, 3, 1, 2, float('nan'), 2, 4, 1.5, 3, 6], strict=True):
            ckpt.save(step, {'x': jnp.ones(2)}, {}, metric=loss)
            assert ckpt.directory.joinpath(str(step - 10)).exists() or step == 10  # never the newest one on disk
    assert sorted(map(int, os.listdir(tmp_path))) == [30, 40, 80, 90, 100]
    with Checkpointer(tmp_path, {}, best='max', keep=1) as ckpt:
        assert ckpt.best_step() == 100
        ckpt.save(110, {'x': jnp.ones(2)}, {}, metric=None)
    assert sorted(map(int, os.listdir(tmp_path))) == [100, 110]


def test_runs_are_not_mixed(tmp_path):
    tree = {'x': jnp.ones(2)}
    old = {'config': {'lr': 1e-3, 'layers': 2, 'axes': (1, 2)}, 'tokenizer': 'abc'}
    with Checkpointer(tmp_path, old, mode='fresh') as ckpt:
        ckpt.save(500, tree, {})
        ckpt.save(600, tree, {})
    with pytest.raises(ValueError, match='already holds steps 500, 600; resume that run'):
        Checkpointer(tmp_path, old, mode='fresh')
    for key, value in (('layers', 4), ('extra', 1), ('axes', (1, 3))):
        with pytest.raises(ValueError, match=rf'/600 belongs to another run: fingerprint\.config\.{key} is'):
            Checkpointer(tmp_path, {**old, 'config': {**old['config'], key: value}})
    with Checkpointer(tmp_path, old) as ckpt:
        assert ckpt.restore(tree)[2] == 600
        for step in (100, 600):
            with pytest.raises(ValueError, match=f'cannot save step {step}: .* already has step 600'):
                ckpt.save(step, tree, {})
    with Checkpointer(tmp_path, {'new': 1}, mode='overwrite') as ckpt:
        assert ckpt.latest_complete() is None
        with pytest.raises(ValueError, match='no complete checkpoint in'):
            ckpt.restore(tree)
        ckpt.save(100, tree, {})
    assert os.listdir(tmp_path) == ['100']


def test_deleting_a_linked_step_keeps_its_target(tmp_path):
    save_steps(tmp_path / 'other', [1], {'x': jnp.ones(2)})
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/1').symlink_to(tmp_path / 'other/1')
    (tmp_path / 'run/7').write_text('x')
    (tmp_path / 'run/007').mkdir()
    save_steps(tmp_path / 'run', [2, 3], {'x': jnp.ones(2)})
    assert sorted(os.listdir(tmp_path / 'run')) == ['007', '2', '3', '7']
    save_steps(tmp_path / 'run', [4], {'x': jnp.ones(2)}, mode='overwrite')
    assert sorted(os.listdir(tmp_path / 'run')) == ['007', '4']
    assert manager.problem(tmp_path / 'other/1') is None


def test_errors_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="mode='again'"):
        Checkpointer(tmp_path, {}, mode='again')
    with Checkpointer(tmp_path, {}) as ckpt, pytest.raises(TypeError, match='not JSON serializable'):
        ckpt.save(1, {'x': jnp.ones(2)}, {'x': jnp.ones(2)})
    assert os.listdir(tmp_path) == []


def test_manifest_lists_every_file(tmp_path):
    save_steps(tmp_path, [1], {'x': jnp.ones((2, 3), jnp.bfloat16)})
    manifest = json.loads((tmp_path / '1/manifest.json').read_text())
    assert manifest['arrays'] == {'x': {'shape': [2, 3], 'dtype': 'bfloat16'}}
    assert digests(tmp_path / '1').keys() - manifest['files'].keys() == manager._UNLISTED
