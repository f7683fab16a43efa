"""launch/rl.py as a process, also from chains: killed three times with SIGKILL, it ends with the bits of a run that was never killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qedjax.checkpoint.hf import save_hf
from qedjax.checkpoint.load import load_model, saved_config
from qedjax.data.derivations import problems
from qedjax.model.transformer import Transformer
from qedjax.sharding import MeshConfig, create, make_mesh
from qedjax.testing import tiny_config, tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ('--config.groups=2', '--config.group_size=2', '--config.steps=6', '--config.save_every=1', '--config.max_tokens=16',
         '--config.objective.zero_variance=keep', '--config.objective.entropy_coef=0.1', '--config.micro_rows=1',
         '--config.engine.slots=4', '--config.engine.staged=4', '--config.engine.prefill_tokens=256',
         '--config.optimizer.learning_rate=1e-2')
CHAINS = ('--config.chains.decoding.turns=2', '--config.chains.decoding.reason.max_tokens=16',
          '--config.chains.decoding.summarise.max_tokens=4', '--config.chains.replay=4')


@pytest.fixture
def folder(tmp_path):
    """As a quickstart leaves it, but for a policy that has learnt nothing: its reward is 0, so its entropy moves it."""
    model = create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(0)), make_mesh(MeshConfig(), jax.devices()[:1]))
    (tmp_path / 'data').mkdir()
    for stage in ('sft', 'rl'):
        save_hf(model, tmp_path / stage)
        tiny_tokenizer('none').save_pretrained(tmp_path / stage)
    rows = [{'problem': p.text} for p in problems(0, 'train', 4)]  # so that replay brings each up again
    (tmp_path / 'data' / 'problems.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path


def start(folder, workdir, config, flags):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
    command = [sys.executable, str(ROOT / 'launch/rl.py'), f'--config=configs/{config}.py:{folder}', f'--workdir={workdir}', *SMALL, *flags]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.multiprocess
@pytest.mark.parametrize(('config', 'flags'), [('derivations_rl', ()), ('derivations_rc', CHAINS)])
def test_killed_three_times_it_ends_with_the_same_bits(folder, config, flags):
    finish(start(folder, folder / 'whole', config, flags))
    metrics = folder / 'cut' / 'metrics.jsonl'
    for step in (1, 3, 4):
        process, deadline = start(folder, folder / 'cut', config, flags), time.monotonic() + 200
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(folder, folder / 'cut', config, flags))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    models = [load_model(folder / name, mesh, saved_config(folder / name)) for name in ('whole', 'cut')]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [json.loads(line)['step'] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 7))
