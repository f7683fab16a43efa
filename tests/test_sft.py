"""The SFT run end to end: it learns, a resume is exact to the bit, and whatever is wrong is said in one sentence."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.tiny_sft import get_config
from qedjax import metrics
from qedjax.data.sources import Source
from qedjax.processes import Preempted
from qedjax.sharding import MeshConfig
from qedjax.testing import tiny_config, write_sums
from qedjax.train import sft
from qedjax.train.sft import repetition, train

ROOT = pathlib.Path(__file__).parents[1]
MESH = MeshConfig(fsdp=4, tensor=2)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sums')
    write_sums(folder)
    return folder


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
    """A run never interrupted, on 8 devices: (workdir, final state on the host)."""
    workdir = tmp_path_factory.mktemp('run')
    state = train(dataclasses.replace(get_config(str(data)), mesh=MESH), str(workdir))
    return workdir, jax.tree.map(np.asarray, state)


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def assert_equal_states(got, want, atol=0.0):
    for (path, leaf), want_leaf in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), want_leaf, rtol=0, atol=atol, err_msg=str(path))


def test_a_run_learns_and_leaves_its_files(finished):
    workdir, state = finished
    steps = [row for row in rows(workdir) if 'loss' in row]
    evaluations = [row for row in rows(workdir) if 'eval/loss' in row]
    assert [row['step'] for row in steps] == list(range(1, int(state.step) + 1))
    assert evaluations[-1]['eval/loss'] < 0.5 * steps[0]['loss']
    assert {'monitor/tokens', 'monitor/truncated', 'monitor/repetition'} <= evaluations[-1].keys()
    config = json.loads((workdir / 'config.json').read_text())
    assert config['model']['num_layers'] == 2
    assert config['optimizer']['learning_rate'] == 1e-2
    assert 'jax' in json.loads((workdir / 'environment.json').read_text())['packages']
    assert (workdir / 'hf_files' / 'tokenizer.json').is_file()
    assert str(state.step) in os.listdir(workdir / 'checkpoints')


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize('at', [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)])
def test_a_resume_is_exact_to_the_bit(data, finished, tmp_path, monkeypatch, at):
    cfg = dataclasses.replace(get_config(str(data)), mesh=MESH)
    update = metrics.Progress.update

    def killing(self, step, *args, **kwargs):
        if step == at + 1:
            raise Killed
        return update(self, step, *args, **kwargs)

    monkeypatch.setattr(metrics.Progress, 'update', killing)
    with pytest.raises(Killed):
        train(cfg, str(tmp_path))
    monkeypatch.undo()
    assert_equal_states(train(cfg, str(tmp_path)), finished[1])
    assert [row['step'] for row in rows(tmp_path) if 'loss' in row] == [row['step'] for row in rows(finished[0]) if 'loss' in row]


@pytest.mark.slow
def test_a_resume_on_other_devices_goes_on_alike(data, tmp_path, monkeypatch):
    """On 8 devices up to a kill, then on 4 in another layout: sums are rounded in another order, and nothing else differs."""
    cfg = get_config(str(data))
    cfg = dataclasses.replace(cfg, mesh=MESH, optimizer=dataclasses.replace(cfg.optimizer, learning_rate=3e-4))
    want = jax.tree.map(np.asarray, train(cfg, str(tmp_path / 'whole')).model)
    monkeypatch.setattr(metrics.Progress, 'update', lambda self, step, *args, **kwargs: _stop(step == 5))
    with pytest.raises(Killed):
        train(cfg, str(tmp_path / 'killed'))
    monkeypatch.undo()
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=2, context=2))
    state = train(cfg, str(tmp_path / 'killed'), devices=jax.devices()[:4])
    assert_equal_states(jax.tree.leaves(state.model), jax.tree.leaves(want), atol=1e-6)


def _stop(now):
    if now:
        raise Killed
    return {}


def test_an_evaluation_that_sigterm_came_before_is_made_up_for(data, finished, tmp_path, monkeypatch):
    cfg = dataclasses.replace(get_config(str(data)), mesh=MESH)
    step = next(row['step'] for row in rows(finished[0]) if 'eval/loss' in row)
    monkeypatch.setattr(sft, 'preemption', lambda: contextlib.nullcontext(lambda k: k == step))
    with pytest.raises(Preempted):
        train(cfg, str(tmp_path))
    assert not any('eval/loss' in row for row in rows(tmp_path))
    monkeypatch.undo()
    train(cfg, str(tmp_path))
    want, got = ([(row['step'], row['eval/loss']) for row in rows(path) if 'eval/loss' in row] for path in (finished[0], tmp_path))
    assert got == want


def test_a_finished_run_started_again_does_nothing(data, finished):
    workdir, state = finished
    before = (workdir / 'metrics.jsonl').read_text()
    again = train(dataclasses.replace(get_config(str(data)), mesh=MESH), str(workdir))
    assert_equal_states(again, state)
    assert (workdir / 'metrics.jsonl').read_text() == before


def test_another_config_does_not_resume(data, finished):
    cfg = dataclasses.replace(get_config(str(data)), mesh=MESH, seed=1)
    with pytest.raises(ValueError, match='belongs to another run'):
        train(cfg, str(finished[0]))
    with pytest.raises(ValueError, match='already holds steps'):
        train(cfg, str(finished[0]), mode='fresh')


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints_sound(data, tmp_path):
    cfg = get_config(str(data))
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=1e36, schedule='constant', clip_norm=0.0, name='sgd', warmup_fraction=0.0)
    cfg = dataclasses.replace(cfg, optimizer=optimizer, max_skipped=3, save_every=1, mesh=MeshConfig(), epochs=9)
    with pytest.raises(FloatingPointError, match='not finite in 3 steps in a row'):
        train(cfg, str(tmp_path), devices=jax.devices()[:1])
    assert os.listdir(tmp_path / 'checkpoints')


BAD = [
    ({'train': Source('nowhere.jsonl')}, 'nowhere.jsonl'),
    ({'train': Source()}, 'no training data'),
    ({'tokenizer': ''}, 'needs a tokenizer'),
    ({'tokenizer': 'nowhere'}, 'nowhere has no tokenizer'),
    ({'init': 'nowhere'}, 'nowhere is not a folder'),
    ({'accumulation': 3}, 'cannot be split into accumulation=3'),
    ({'row_length': 4}, 'no document can be trained on'),
    ({'row_length': 8192}, 'row_length is 8192'),
    ({'model': tiny_config(vocab_size=100)}, 'the model has 100 rows'),
    ({'model': tiny_config(remat='some')}, "model.remat is 'some'"),
    ({'mesh': MeshConfig(fsdp=3)}, 'needs 3 devices, but there are 8'),
    ({'mesh': MeshConfig(fsdp=8)}, 'cannot be shared evenly'),
    ({'epochs': 0}, 'set steps or epochs'),
    ({'format': 'chat'}, 'messages'),
    ({'turns': 'some'}, "turns is 'some'"),
]


@pytest.mark.parametrize(('change', 'message'), BAD, ids=[next(iter(change)) + f'-{i}' for i, (change, _) in enumerate(BAD)])
def test_whatever_is_wrong_is_said_before_anything_is_written(data, tmp_path, change, message):
    cfg = dataclasses.replace(dataclasses.replace(get_config(str(data)), mesh=MESH), **change)
    with pytest.raises(ValueError, match=message):
        train(cfg, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_rows_that_cannot_be_trained_on_are_named(data, tmp_path):
    bad = tmp_path / 'bad.jsonl'
    good = (data / 'train.jsonl').read_text()
    bad.write_text(good + json.dumps({'prompt': 'x', 'completion': '  '}) + '\n')
    cfg = dataclasses.replace(get_config(str(data)), mesh=MESH, train=Source(str(bad)))
    with pytest.raises(ValueError, match='1 of 82 rows cannot be trained on'):
        train(cfg, str(tmp_path / 'run'))


def test_repetition_counts_ngrams_seen_before():
    assert repetition((1, 2, 3, 4), 2) == 0
    assert repetition((1, 1, 1, 1, 1), 2) == pytest.approx(3 / 4)
    assert repetition((1,), 8) == 0


def launch(*flags, **kwargs):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, str(ROOT / 'launch/sft.py'), *flags], env=environment, cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(('flags', 'message'), [
    ([], 'error: no --config'), (['--config=configs/tiny_sft.py:nowhere'], 'error: nowhere'),
    (['--config=configs/tiny_sft.py', '--config.optimizer.name=adam'], "error: optimizer.name is 'adam'; choose one of adamw")])
def test_the_launcher_ends_with_one_sentence(tmp_path, flags, message):
    process = launch(f'--workdir={tmp_path}/run', *flags)
    output, _ = process.communicate(timeout=120)
    assert message in output.splitlines()[-1]
    assert 'Traceback' not in output
    assert process.returncode == 2


@pytest.mark.slow
def test_kill_minus_9_at_random_moments(data, finished, tmp_path):
    """Killed by SIGKILL three times, wherever it happens to be, and started again: the final parameters are the same bits."""
    flags = [f'--workdir={tmp_path}', f'--config=configs/tiny_sft.py:{data}', '--config.mesh.fsdp=4', '--config.mesh.tensor=2',
             '--config.save_every=1']
    clock = random.Random(0)
    for _ in range(3):
        process = launch(*flags)
        while process.poll() is None and not list((tmp_path / 'checkpoints').glob('*')):
            time.sleep(0.05)
        time.sleep(clock.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = launch(*flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    state = train(dataclasses.replace(get_config(str(data)), mesh=MESH, save_every=1), str(tmp_path))
    assert_equal_states(state, finished[1])
