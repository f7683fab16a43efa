"""launch/rl.py in two processes, as a Slurm job would start it: the run of one process, its samples and its parameters."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_rl_processes import CHAINS, ROOT, SMALL, finish, folder, start  # noqa: F401
from test_sft_processes import free_port, slurm

from qedjax.checkpoint.load import load_model, saved_config
from qedjax.sharding import MeshConfig, make_mesh

HELD_OUT = ('--config.evaluation.every=2', '--config.evaluation.problems=3')


def start_all(folder, workdir, config, *flags):  # noqa: F811
    port = free_port()
    command = [sys.executable, str(ROOT / 'launch/rl.py'), f'--config=configs/{config}.py:{folder}', f'--workdir={workdir}', *SMALL, *flags,
               '--distributed']
    return [subprocess.Popen(command, env=slurm(process, port), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for process in range(2)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(('config', 'flags'), [('derivations_rl', ()), ('derivations_rc', CHAINS)])
def test_two_processes_make_the_run_of_one(folder, config, flags):  # noqa: F811
    flags = (*flags, '--config.steps=4', '--config.groups=3', '--config.micro_rows=4', *HELD_OUT,
             f'--config.evaluation.source.path={folder}/data/problems.jsonl')
    finish(start(folder, folder / 'one', config, flags))
    outputs = [(process, process.communicate(timeout=400)[0]) for process in start_all(folder, folder / 'two', config, *flags)]
    assert [process.returncode for process, _ in outputs] == [0, 0], '\n'.join(output for _, output in outputs)
    samples = [[json.loads(line) for line in (folder / name / 'samples.jsonl').read_text().splitlines()] for name in ('one', 'two')]
    assert samples[0] == samples[1]
    metrics = [[json.loads(line) for line in (folder / name / 'metrics.jsonl').read_text().splitlines()] for name in ('one', 'two')]
    for name in ('loss', 'grad_norm', 'reward', 'eval/reward'):
        np.testing.assert_allclose(*([row[name] for row in rows if name in row] for rows in metrics), rtol=0, atol=1e-5)
    models = [load_model(folder / name, make_mesh(MeshConfig(), jax.devices()[:1]), saved_config(folder / name)) for name in ('one', 'two')]
    for got, want in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=2e-5)
