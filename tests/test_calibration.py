"""Agreement with people, by hand-computed cases; and the tool on a scripted judge, then replayed without it."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from qedjax.grading.calibration import agreement, canaries
from qedjax.testing import ScriptedServer

ROOT = pathlib.Path(__file__).parents[1]


def test_measures():
    got = agreement(['a', 'a', 'a', 'b', 'b'], [7, 3, 3, 0, 2], [7, 0, 1, 2, 2])
    assert got['mae'] == pytest.approx((0 + 3 + 2 + 2 + 0) / 5)
    assert got['bias'] == pytest.approx(3 / 5)
    assert got['buckets'] == pytest.approx(3 / 5)
    assert got['order'] == pytest.approx((1 + 1 + 0.5) / 3)
    mean_given, mean_human = 13 / 3, 8 / 3
    first = [abs((g - mean_given) - (h - mean_human)) for g, h in ((7, 7), (3, 0), (3, 1))]
    assert got['advantage'] == pytest.approx((sum(first) + 1 + 1) / 5)


def test_perfect_and_empty():
    assert agreement('aabb', [1, 5, 0, 7], [1, 5, 0, 7]) == {'mae': 0, 'bias': 0, 'buckets': 1, 'order': 1, 'advantage': 0}
    assert all(math.isnan(value) for value in agreement([], [], []).values())
    assert math.isnan(agreement('ab', [1, 2], [1, 2])['order'])


def run(tmp_path, *flags):
    command = [sys.executable, str(ROOT / 'tools/calibrate_grader.py'), f'--config={ROOT}/configs/qed_nano_rl.py',
               '--config.judge.remote.api=chat', f'--data={tmp_path}/graded.jsonl', *flags]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}, capture_output=True, text=True,
                          check=False)
    return done.returncode, {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()[1:]}, done.stderr


@pytest.mark.slow
def test_the_tool_and_its_replay(tmp_path):
    rows = [{'problem': f'p{i % 2}', 'rubric': 'all', 'proof': f'proof {i}', 'points': i % 8} for i in range(8)]
    (tmp_path / 'graded.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))

    def reply(number, body):
        text = body['messages'][0]['content']
        return next((f'<score>{i}</score>' for i in range(8) if f'proof {i}\n' in text), '<score>0</score>')

    with ScriptedServer(reply) as server:
        url = f'--config.judge.remote.base_url={server.base_url}'
        code, first, errors = run(tmp_path, url, f'--out={tmp_path}/a')
        assert code == 0, errors
    assert (first['mae'], first['order'], first['graded'], first['canary/planted']) == (0, 1, 8, 0)
    code, again, errors = run(tmp_path, url, f'--out={tmp_path}/b', f'--replay={tmp_path}/a/transcripts.jsonl')
    assert code == 0, errors
    assert again == {name: value for name, value in first.items() if not name.startswith('canary')}


def test_canaries_hold_no_proof():
    assert set(canaries({'problem': 'Show it.'})) == {'restated', 'nonsense', 'planted'}
