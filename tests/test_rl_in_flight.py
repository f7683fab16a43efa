"""launch/rl.py with requests in flight, in several processes: the draws over a restart, SIGTERM and a lost process in mid-collection."""

import json
import signal
import time

import pytest
from test_processes import last_step, running  # noqa: F401
from test_rl_hosts import ends, rows_of, start_all
from test_rl_processes import CHAINS, folder  # noqa: F401

from qedjax.testing import ScriptedServer

IN_FLIGHT = ('--config.max_lag=2', '--config.in_flight=4', '--config.groups=3', '--config.micro_rows=4')
# As launch/rl.py, but a process counts as lost after eight seconds.
IMPATIENT = """
import runpy, sys
from qedjax import processes
processes.HEARTBEAT, sys.argv[0] = 8, 'launch/rl.py'
runpy.run_path('launch/rl.py', run_name='__main__')
"""


def position_of(workdir, step):
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest.json').read_text())['metadata']['position']


def account(workdir, step):
    """Draws trained until the end of the run, where it is, and how many draws were dropped; together these are all."""
    position, metrics = position_of(workdir, step), rows_of(workdir, 'metrics')
    trained, going = {row['draw'] for row in rows_of(workdir, 'samples')}, {*position['pending'], *position['left']}
    assert not trained & going
    gone = set(range(position['draw'])) - trained - going
    dropped = sum(value for row in metrics for name, value in row.items() if name.startswith('dropped/'))
    assert len(gone) <= dropped
    assert all(row['lag_max'] <= 2 for row in metrics if 'lag_max' in row)
    return trained, going


@pytest.mark.multiprocess
@pytest.mark.parametrize(('config', 'flags', 'counts'), [('derivations_rl', (), (2, 4)), ('derivations_rc', CHAINS, (2, 1))])
def test_draws_go_on_exactly_with_another_number_of_processes(folder, config, flags, counts):  # noqa: F811
    """Each is trained once, or dropped and counted, or saved to be made: none twice, none skipped. An evaluation comes in between."""
    held_out = (f'--config.evaluation.source.path={folder}/data/problems.jsonl', '--config.evaluation.every=2')
    trained, going, step = set(), set(), 0
    for count in counts:
        step += 3
        flags_now = (*IN_FLIGHT, *flags, *held_out, f'--config.steps={step}')
        codes, output = ends(start_all(folder, folder / 'run', config, *flags_now, count=count))
        assert codes == [0] * count, output
        rows = [row for row in rows_of(folder / 'run', 'samples') if row['step'] > step - 3]
        assert not trained & {row['draw'] for row in rows}
        keys = [(row['draw'], row.get('turn'), row['sample']) for row in rows]
        assert len(set(keys)) == len(keys) == 3 * 3 * 2
        trained, now = account(folder / 'run', step)
        dropped = sum(row.get('dropped/stale', 0) for row in rows_of(folder / 'run', 'metrics') if row['step'] > step - 3)
        assert len(going - trained - now) <= dropped
        going = now
    assert [row['step'] for row in rows_of(folder / 'run', 'metrics') if 'loss' in row] == list(range(1, step + 1))


@pytest.fixture
def judged(folder):  # noqa: F811
    """Flags of a run whose judge marks the first answers at once and then no more, and the calls that it got."""
    path = folder / 'data' / 'problems.jsonl'
    rows = [json.loads(line) | {'rubric': 'Seven points.'} for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with ScriptedServer(lambda number, body: f'<score>{number % 8}</score>' if number < 20 else (3600.0, 'late')) as server:
        yield ('--config.grader=judge', f'--config.judge.remote.base_url={server.base_url}', '--config.judge.remote.model=judge',
               '--config.save_every=100', '--config.steps=100'), server.calls


def wait_for_silence(workdir, processes, calls):
    """Until some steps are done and the judge is asked for marks that never come."""
    deadline = time.monotonic() + 200
    while last_step(workdir) < 1 or len(calls) < 22:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.1)
    time.sleep(1)


@pytest.mark.multiprocess
@pytest.mark.parametrize('lag', [0, 2])
def test_sigterm_in_mid_collection_ends_all_and_loses_no_step(folder, judged, running, lag):  # noqa: F811
    flags, calls = judged
    running += start_all(folder, folder / 'run', 'derivations_rl', *IN_FLIGHT, *flags, f'--config.max_lag={lag}')
    wait_for_silence(folder / 'run', running, calls)
    running[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    codes, output = ends(running, 100)
    assert time.monotonic() - sent < 15
    assert codes == [143, 143], output
    step = last_step(folder / 'run')
    assert {row['step'] for row in rows_of(folder / 'run', 'samples')} == set(range(1, step + 1))
    _, going = account(folder / 'run', step)
    assert len(going) >= 2 or not lag  # at least what the judge is asked about


@pytest.mark.multiprocess
@pytest.mark.parametrize('lost', [0, 1])
def test_a_process_lost_in_mid_collection_ends_the_others(folder, judged, running, lost):  # noqa: F811
    flags, calls = judged
    running += start_all(folder, folder / 'run', 'derivations_rl', *IN_FLIGHT, *flags, script=('-c', IMPATIENT))
    wait_for_silence(folder / 'run', running, calls)
    running[lost].kill()
    killed = time.monotonic()
    output = running[1 - lost].communicate(timeout=100)[0]
    assert time.monotonic() - killed < 40
    assert running[1 - lost].returncode != 0, output
