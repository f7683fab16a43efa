"""Several processes as one run: what they tell each other, who is missed when one is lost, and SIGTERM."""

import asyncio
import collections
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_sft_processes import ROOT, free_port, launch, slurm

from configs.tiny_sft import get_config
from qedjax import processes
from qedjax.checkpoint.load import load_model, saved_config
from qedjax.sharding import MeshConfig, make_mesh
from qedjax.testing import write_sums
from qedjax.train import sft
from qedjax.train.sft import train


def test_one_process_does_it_all():
    async def work(items):
        return [item * item for item in items]

    assert processes.exchange('x') == ['x']
    assert asyncio.run(processes.Crew().divided([1, 2, 3], work)) == [1, 4, 9]


TALK = '''
import asyncio, sys
import jax
from qedjax import processes
processes.join()
me, crew = jax.process_index(), processes.Crew()
assert processes.exchange({'from': me, 'text': 'x' * (2_000_000 * me)}) == [{'from': p, 'text': 'x' * (2_000_000 * p)} for p in range(2)]
async def square(items):
    return [(me, item * item) for item in items]
for count in (0, 1, 2, 5):
    assert asyncio.run(crew.divided(list(range(count)), square)) == [(i % 2, i * i) for i in range(count)]
async def fail(items):
    if me == 1:
        raise RuntimeError('no more grades')
    return items
try:
    asyncio.run(crew.divided([1, 2], fail))
except RuntimeError as error:
    assert str(error) == 'process 1: no more grades', error
    print('told')
'''


@pytest.mark.multiprocess
def test_processes_exchange_values_and_errors():
    port = free_port()
    running = [subprocess.Popen([sys.executable, '-c', TALK], env=slurm(process, port), cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for process in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], '\n'.join(outputs)
    assert all('told' in output for output in outputs)


@pytest.fixture
def running():
    """Processes that do not outlive their test."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def endless(tmp_path, name):
    write_sums(tmp_path / 'sums')
    return [f'--config=configs/tiny_sft.py:{tmp_path}/sums', f'--workdir={tmp_path}/{name}', '--config.steps=100000',
            '--config.optimizer.schedule=constant', '--config.optimizer.warmup_fraction=0',
            '--config.optimizer.learning_rate=3e-4', '--config.save_every=100000',
            '--config.evaluate_every=100000']


def last_step(workdir):
    lines = (workdir / 'metrics.jsonl').read_text().splitlines() if (workdir / 'metrics.jsonl').exists() else []
    return json.loads(lines[-1])['step'] if lines else 0


def losses(workdir):
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [row['loss'] for row in rows if 'loss' in row]


def wait_for_steps(workdir, running, first):
    deadline = time.monotonic() + 200
    while last_step(workdir) < first + 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in running), [process.communicate()[0] for process in running]
        time.sleep(0.1)


@pytest.mark.multiprocess
@pytest.mark.parametrize('lost', [0, 1])
def test_a_lost_process_ends_the_others_and_is_named(tmp_path, running, lost):
    port = free_port()
    flags = endless(tmp_path, 'run')
    running += [launch(process, port, *flags, '--distributed') for process in range(2)]
    wait_for_steps(tmp_path / 'run', running, 0)
    running[lost].kill()
    killed = time.monotonic()
    output = running[1 - lost].communicate(timeout=100)[0]
    assert time.monotonic() - killed <= 2 * processes.HEARTBEAT
    assert running[1 - lost].returncode != 0
    assert ('Task 1 heartbeat timeout' if lost else 'coordination service') in output, output  # process 0 is the coordinator


# As launch/sft.py, but each process logs the rows that its devices hold in each step.
LOGGED = '''
import json, runpy, sys
import jax
import numpy as np
from qedjax.train import sft
make_train_step, path = sft.make_train_step, sys.argv.pop()
def logged(*args):
    step = make_train_step(*args)
    def log(state, batch):
        if not isinstance(batch.tokens, jax.core.Tracer):
            rows = [row.tolist() for shard in batch.tokens.addressable_shards if shard.replica_id == 0
                    for row in np.asarray(shard.data).reshape(-1, batch.tokens.shape[-1])]
            with open(path, 'a') as file:
                file.write(json.dumps([int(state.step), rows]) + chr(10))
        return step(state, batch)
    return log
sft.make_train_step, sys.argv[0] = logged, 'launch/sft.py'
runpy.run_path('launch/sft.py', run_name='__main__')
'''


@pytest.mark.multiprocess
@pytest.mark.parametrize('counts', [(1,), (2, 4, 1)])
def test_sigterm_saves_and_the_run_goes_on_with_any_number_of_processes(tmp_path, running, counts):
    """The rows of every step are those of one process, each on one device of one process: no repeats and no gaps."""
    flags, step = endless(tmp_path, 'run'), 0
    for count in counts:
        port = free_port()
        running[:] = [launch(process, port, *flags, *['--distributed'] * (count > 1), str(tmp_path / f'rows_{count}_{process}'),
                             count=count, script=('-c', LOGGED)) for process in range(count)]
        wait_for_steps(tmp_path / 'run', running, step)
        running[-1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=100)[0] for process in running]
        assert [process.returncode for process in running] == [143] * count, '\n'.join(outputs)
        assert all('ended by SIGTERM, and saved' in output for output in outputs)
        step = last_step(tmp_path / 'run')
    cfg = get_config(str(tmp_path / 'sums'))
    cfg.optimizer.schedule, cfg.optimizer.warmup_fraction, cfg.optimizer.learning_rate = 'constant', 0.0, 3e-4  # as in `endless`
    cfg.steps, cfg.mesh = step, MeshConfig(fsdp=4)
    state = train(cfg, str(tmp_path / 'whole'), devices=jax.devices()[:4])
    got = load_model(tmp_path / 'run', make_mesh(MeshConfig(), jax.devices()[:1]), saved_config(tmp_path / 'run'))
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(want), rtol=0, atol=2e-5)
    np.testing.assert_allclose(*(losses(tmp_path / name) for name in ('run', 'whole')), rtol=0, atol=1e-5)
    rows = collections.defaultdict(list)
    for path in tmp_path.glob('rows_*'):
        for number, found in map(json.loads, path.read_text().splitlines()):
            rows[number] += found
    loader = sft._Run(cfg, tmp_path / 'unused', jax.devices()[:4]).loader
    assert [sorted(rows[number]) for number in range(len(rows))] == [sorted(loader.fetch(k).tokens.tolist()) for k in range(step)]
    seen = [len(path.read_text().splitlines()) for path in tmp_path.glob('rows_*')]
    assert min(seen) >= 3  # every process had rows in every step that it was there for
