"""How every command ends: one sentence and an exit code for what a user can mend, a traceback for the rest."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import app

from qedjax import cli
from qedjax.checkpoint.manager import CheckpointError

ROOT = pathlib.Path(__file__).parents[1]


def end(monkeypatch, capsys, error):
    """Exit code and stderr of a command whose main raises this."""

    def main(_):
        raise error

    monkeypatch.setattr(app, 'run', lambda guarded, **kwargs: guarded(['command']))
    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize('error', [ValueError('bad'), CheckpointError('bad'), OSError('bad'), FloatingPointError('bad')])
def test_what_a_user_can_mend_is_one_sentence(monkeypatch, capsys, error):
    assert end(monkeypatch, capsys, error) == (2, 'error: bad\n')


def test_an_interruption_is_one_sentence(monkeypatch, capsys):
    code, text = end(monkeypatch, capsys, KeyboardInterrupt())
    assert code == 130
    assert text.startswith('error: interrupted')
    assert text.count('\n') == 1


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(app, 'run', lambda guarded, **kwargs: guarded(['command']))
    with pytest.raises(KeyError, match='ours'):
        cli.run(lambda _: {}['ours'])


def test_stray_arguments_are_refused(monkeypatch):
    monkeypatch.setattr(app, 'run', lambda guarded, **kwargs: guarded(['command', 'runs/sft']))
    with pytest.raises(app.UsageError, match='runs/sft'):
        cli.run(lambda _: None)


def test_a_flag_of_no_field_is_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / 'launch/sft.py'), '--config=configs/tiny_sft.py', f'--workdir={tmp_path}', '--config.nonsense=3']
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'Traceback' not in done.stderr
    assert 'nonsense' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(('argument', 'sentence'), [
    ('--config=configs/qed_nano_sft.py:tpu', "error: 'tpu' is no hardware of this config: choose one of v5p-64, v6e-64, v5e-256, h100-8"),
    ('--config=configs/tiny_sft.py --config.steps=many', 'error: flag --config.steps=many: invalid literal')])
def test_a_flag_that_cannot_be_read_is_one_sentence(tmp_path, argument, sentence):
    command = [sys.executable, str(ROOT / 'launch/sft.py'), f'--workdir={tmp_path}', *argument.split()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert 'Traceback' not in done.stderr


def test_distributed_without_a_cluster_is_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / 'launch/sft.py'), '--config=configs/tiny_sft.py', f'--workdir={tmp_path}', '--distributed']
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: --distributed is for a TPU slice')
