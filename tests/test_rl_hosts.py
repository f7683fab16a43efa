"""launch/rl.py in several processes, as a Slurm job would start it: the run of one process, its samples and its parameters."""

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


def start_all(folder, workdir, config, *flags, count=2, script=('launch/rl.py',)):  # noqa: F811
    port = free_port()
    command = [sys.executable, *script, f'--config=configs/{config}.py:{folder}', f'--workdir={workdir}', *SMALL, *flags,
               *['--distributed'] * (count > 1)]
    return [subprocess.Popen(command, env=slurm(process, port, count), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True) for process in range(count)]


def ends(processes, within=400):
    """Their exit codes and outputs."""
    outputs = [process.communicate(timeout=within)[0] for process in processes]
    return [process.returncode for process in processes], '\n'.join(outputs)


def rows_of(workdir, name):
    return [json.loads(line) for line in (workdir / f'{name}.jsonl').read_text().splitlines()]


# As launch/rl.py, but something happens in the second process while it reads the problems.
HAPPENS = """
import os, runpy, signal, sys
import jax
from qedjax.rl import loop
read, sys.argv[0] = loop.read_problems, 'launch/rl.py'
def reading(*args):
    if jax.process_index():
        {event}
    return read(*args)
loop.read_problems = reading
runpy.run_path('launch/rl.py', run_name='__main__')
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(('event', 'code', 'sentence'), [
    ("raise OSError('/mnt/shared is not mounted')", 2, '/mnt/shared is not mounted'),
    ('os.kill(os.getpid(), signal.SIGTERM)', 143, 'ended by SIGTERM')])
def test_what_happens_to_one_process_at_the_start_ends_all_alike(folder, event, code, sentence):  # noqa: F811
    flags = '--config.steps=3', '--config.micro_rows=4'
    processes = start_all(folder, folder / 'run', 'derivations_rl', *flags, script=('-c', HAPPENS.format(event=event)))
    codes, output = ends(processes)
    assert codes == [code] * 2, output
    assert output.count(sentence) >= 2
    assert not (folder / 'run' / 'metrics.jsonl').exists() or not any('loss' in row for row in rows_of(folder / 'run', 'metrics'))


@pytest.mark.multiprocess
@pytest.mark.parametrize(('config', 'flags', 'count'), [('derivations_rl', (), 4), ('derivations_rc', CHAINS, 2)])
def test_several_processes_make_the_run_of_one(folder, config, flags, count):  # noqa: F811
    flags = (*flags, '--config.steps=4', '--config.groups=3', '--config.micro_rows=4', *HELD_OUT,
             f'--config.evaluation.source.path={folder}/data/problems.jsonl')
    finish(start(folder, folder / 'one', config, flags))
    codes, output = ends(start_all(folder, folder / 'several', config, *flags, count=count))
    assert codes == [0] * count, output
    assert rows_of(folder / 'one', 'samples') == rows_of(folder / 'several', 'samples')
    metrics = [rows_of(folder / name, 'metrics') for name in ('one', 'several')]
    for name in ('loss', 'grad_norm', 'reward', 'eval/reward'):
        np.testing.assert_allclose(*([row[name] for row in rows if name in row] for rows in metrics), rtol=0, atol=1e-5)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    models = [load_model(folder / name, mesh, saved_config(folder / name)) for name in ('one', 'several')]
    for got, want in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=2e-5)
