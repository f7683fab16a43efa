"""launch/sft.py in two processes, as a Slurm job would start it: one run, the same numbers as in one process."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs.tiny_sft import get_config
from qedjax.checkpoint.load import load_model, saved_config
from qedjax.sharding import MeshConfig, make_mesh
from qedjax.testing import write_sums
from qedjax.train.sft import train

ROOT = pathlib.Path(__file__).parents[1]


def slurm(process, port, count=2):
    """What Slurm tells one of the processes of a job on this machine; they have four devices in all."""
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': f'--xla_force_host_platform_device_count={4 // count}',
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost',
            'SLURM_NTASKS': str(count), 'SLURM_PROCID': str(process), 'SLURM_LOCALID': str(process), 'SLURM_STEP_NUM_NODES': '1'}


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def launch(process, port, *flags, count=2, script=('launch/sft.py',)):
    return subprocess.Popen([sys.executable, *script, *flags], env=slurm(process, port, count), cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.multiprocess
def test_two_processes_make_one_run(tmp_path):
    """Training, evaluation, the monitor's samples and checkpoints; then the finished run is opened again by both."""
    write_sums(tmp_path / 'sums')
    flags = [f'--config=configs/tiny_sft.py:{tmp_path}/sums', f'--workdir={tmp_path}/two', '--config.steps=4', '--distributed']
    for _ in range(2):
        port = free_port()
        processes = [launch(process, port, *flags) for process in range(2)]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], '\n'.join(outputs)
    cfg = get_config(str(tmp_path / 'sums'))
    cfg.steps, cfg.mesh = 4, MeshConfig(fsdp=4)
    state = train(cfg, str(tmp_path / 'one'), devices=jax.devices()[:4])
    got = load_model(tmp_path / 'two', make_mesh(MeshConfig(), jax.devices()[:1]), saved_config(tmp_path / 'two'))
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(want), rtol=0, atol=2e-5)
    assert (tmp_path / 'two' / 'metrics.jsonl').read_text().count('monitor/tokens') == (tmp_path / 'one' / 'metrics.jsonl').read_text(
        ).count('monitor/tokens') > 0
