"""launch/rl.py with requests in flight, in several processes: the draws over a restart, SIGTERM and a lost process in mid-collection."""

import json
import signal
import time
import types

import pytest
from test_processes import last_step, running  # noqa: F401
from test_rl_hosts import ends, rows_of, start_all
from test_rl_processes import CHAINS, folder  # noqa: F401

from qedjax.testing import ScriptedServer

IN_FLIGHT = ('--config.max_lag=2', '--config.in_flight=4', '--config.groups=3', '--config.micro_rows=4',
             '--config.engine.prefill_rows=(1,)', '--config.engine.prefill_tokens=64')
# As launch/rl.py, but a process counts as lost after eight seconds.
IMPATIENT = """
import runpy, sys
from qedjax import processes
processes.HEARTBEAT, sys.argv[0] = 8, 'launch/rl.py'
runpy.run_path('launch/rl.py', run_name='__main__')
"""


def position_of(workdir, step):
    return json.loads((workdir / 'checkpoints' / str(step) / 'manifest.json').read_text())['metadata']['position']


def account(workdir, step, before=frozenset()):
    """Draws that were trained until a step, and those that are to be made; with those that were dropped, which are counted, these are all.

    `before` were to be made some steps ago.
    """
    position, metrics = position_of(workdir, step), rows_of(workdir, 'metrics')
    trained, going = {row['draw'] for row in rows_of(workdir, 'samples')}, {*position['pending'], *position['left']}
    assert not trained & going
    gone = set(range(position['draw'])) - trained - going
    dropped = sum(value for row in metrics for name, value in row.items() if name.startswith('dropped/'))
    assert before - trained - going <= gone
    assert len(gone) <= dropped
    assert all(row['lag_max'] <= 2 for row in metrics if 'lag_max' in row)
    return trained, going


@pytest.mark.multiprocess
def test_chains_go_on_exactly_with_another_number_of_processes(folder):  # noqa: F811
    """Each draw is trained once, or dropped and counted, or saved to be made: none twice, none skipped. An evaluation comes in between."""
    held_out = (f'--config.evaluation.source.path={folder}/data/problems.jsonl', '--config.evaluation.every=2')
    flags, trained, going = (*IN_FLIGHT, *CHAINS, *held_out), set(), set()
    for count, step in ((2, 3), (1, 6)):
        codes, output = ends(start_all(folder, folder / 'run', 'derivations_rc', *flags, f'--config.steps={step}', count=count))
        assert codes == [0] * count, output
        rows = [row for row in rows_of(folder / 'run', 'samples') if row['step'] > step - 3]
        assert not trained & {row['draw'] for row in rows}
        keys = [(row['draw'], row['turn'], row['sample']) for row in rows]
        assert len(set(keys)) == len(keys) == 3 * 3 * 2
        trained, going = account(folder / 'run', step, going)
    assert [row['step'] for row in rows_of(folder / 'run', 'metrics') if 'loss' in row] == list(range(1, 7))


@pytest.fixture
def judge(folder):  # noqa: F811
    """A judge that marks the first answers at once and then no more, until it is `awake`; problems to judge; and flags for both."""
    path = folder / 'data' / 'problems.jsonl'
    rows = [json.loads(line) | {'rubric': 'Seven points.'} for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    awake = []
    with ScriptedServer(lambda number, body: f'<score>{number % 8}</score>' if number < 20 or awake else (3600.0, 'late')) as server:
        flags = ('--config.grader=judge', f'--config.judge.remote.base_url={server.base_url}', '--config.judge.remote.model=judge',
                 '--config.save_every=100')
        yield types.SimpleNamespace(flags=flags, calls=server.calls, awake=awake)


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
def test_sigterm_in_mid_collection_ends_all_and_loses_no_step(folder, judge, running, lag):  # noqa: F811
    """And what was in the making is made after a restart, in flight by four processes."""
    flags = (*IN_FLIGHT, *judge.flags, f'--config.max_lag={lag}')
    running += start_all(folder, folder / 'run', 'derivations_rl', *flags, '--config.steps=100')
    wait_for_silence(folder / 'run', running, judge.calls)
    running[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    codes, output = ends(running, 100)
    assert time.monotonic() - sent < 15
    assert codes == [143, 143], output
    step = last_step(folder / 'run')
    assert {row['step'] for row in rows_of(folder / 'run', 'samples')} == set(range(1, step + 1))
    trained, going = account(folder / 'run', step)
    if lag:
        assert going
        judge.awake.append(True)
        codes, output = ends(start_all(folder, folder / 'run', 'derivations_rl', *flags, f'--config.steps={step + 3}', count=4))
        assert codes == [0] * 4, output
        assert trained < account(folder / 'run', step + 3, going)[0]
        rows = rows_of(folder / 'run', 'samples')
        assert len({(row['draw'], row['sample']) for row in rows}) == len(rows) == (step + 3) * 3 * 2
        graded = [row for row in rows if row['step'] > step and row['answer'].strip() and row['reward'] is not None]
        assert rows_of(folder / 'run', 'metrics')[-1]['grader/graded'] >= len(graded)  # by all four


@pytest.mark.multiprocess
@pytest.mark.parametrize('lost', [0, 1])
def test_a_process_lost_in_mid_collection_ends_the_others(folder, judge, running, lost):  # noqa: F811
    flags = (*IN_FLIGHT, *judge.flags, '--config.steps=100')
    running += start_all(folder, folder / 'run', 'derivations_rl', *flags, script=('-c', IMPATIENT))
    wait_for_silence(folder / 'run', running, judge.calls)
    running[lost].kill()
    killed = time.monotonic()
    output = running[1 - lost].communicate(timeout=100)[0]
    assert time.monotonic() - killed < 40
    assert running[1 - lost].returncode not in (0, 2, 143), output  # with which launchers do not start a run again
    assert ('stopped sending heartbeats' if lost else 'coordinat') in output, output
