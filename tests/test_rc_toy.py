"""The reasoning cache's toy from end to end, as small as it gets; what its data hold."""

import asyncio
import dataclasses
import re

import pytest

from qedjax.data.derivations import long_rows, parse_problem, problems
from qedjax.rc_toy import LINES, LONG, ToyConfig, finished, run
from qedjax.rl.losses import ObjectiveConfig


def test_long_rows_begin_continue_and_summarise_a_few_lines_at_a_time():
    rows = long_rows(0, 3000, *LONG, LINES, slip=0.0, wrong=0.2)
    texts = {problem.text: problem for problem in problems(0, 'train', 3000, *LONG)}
    kinds = {'begin': 0, 'continue': 0, 'summarise': 0, 'wrong': 0}
    for row in rows:
        text, *rest = row['prompt'].split('\n')
        problem, lines = texts[text], row['completion'].split('\n')
        assert parse_problem(text) == problem
        kind = 'begin' if not rest else 'continue' if len(rest) == 1 else 'summarise'
        kinds[kind] += 1
        if kind == 'summarise':
            assert rest[-1] == '?'
            assert re.fullmatch(r'.=\d', row['completion'])
            claim = re.fullmatch(r'(?:From )?(.).*=(\d)', [line for line in rest[:-1] if not line.startswith('Answer')][-1])
            assert row['completion'][0] == claim[1]
            kinds['wrong'] += row['completion'][2] != claim[2]
        else:
            proven = [line for line in lines if not line.startswith(('From', 'Answer'))]
            assert len(proven) <= LINES[1]
    assert [kinds[k] / 3000 for k in ('begin', 'continue', 'summarise')] == pytest.approx([1 / 4, 1 / 3, 5 / 12], abs=0.03)
    assert kinds['wrong'] / kinds['summarise'] == pytest.approx(0.2, abs=0.04)


def test_a_chain_ends_with_its_proof():
    answers = ('a 1+1=2', 'a 1+1=2\nAnswer: 2', 'From a=2\nAnswer: 2\n', 'Answer: 2\nb', '')
    assert [asyncio.run(finished('p', answer)) for answer in answers] == [False, True, True, False, False]


@pytest.mark.slow
def test_the_whole_toy(tmp_path):
    cfg = ToyConfig(documents=48, long_documents=48, problems=4, turns=(1, 2), rl_problems=32, rc_problems=8)
    keep = ObjectiveConfig(zero_variance='keep')
    cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, steps=1, groups=4, objective=keep),
                              rc=dataclasses.replace(cfg.rc, steps=2, groups=4, objective=keep))
    curves = run(cfg, tmp_path)
    assert list(curves) == ['SFT', 'RL', 'RC-RL']
    assert all([p.turns for p in points] == [1, 2] for points in curves.values())
    assert (tmp_path / 'turns.png').exists()
