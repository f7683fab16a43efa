"""Score against turns: what a chain that stops early would have answered, its cost, the table and the plot."""

import pytest

from qedjax.reasoning_cache.curve import after, curve, plot, table
from qedjax.reasoning_cache.state import REASON, SUMMARISE, Call, State, Trace
from qedjax.types import Completion


def trace(problem, *answers):
    """A chain whose reasonings have 10 ids and whose summaries have 3."""
    calls = []
    for turn, answer in enumerate(answers):
        written = Completion(answer, (0,) * 10, (), 'stop'), Completion('s', (0,) * 3, (), 'stop')
        calls += [Call(REASON, turn, written[0]), Call(SUMMARISE, turn, written[1])]
    states = tuple(State(problem, (), turn) for turn in range(len(answers) + 1))
    return Trace(states[0], tuple(calls[:-1]), states, answers, 'turns')


def test_a_chain_stopped_early_gives_its_last_answer_until_then_and_pays_for_no_more():
    chain = trace('p', '', 'a', '  ', 'b')
    assert [after(chain, turns) for turns in (1, 2, 3, 4, 9)] == [('', 10), ('a', 23), ('a', 36), ('b', 49), ('b', 49)]


def test_means_and_intervals_are_over_chains():
    points = curve([trace('1', '1', '1'), trace('2', '', '2'), trace('3', 'x')], (1, 2), lambda problem, answer: float(problem == answer))
    assert [(p.turns, p.mean, p.tokens, p.unanswered) for p in points] == [
        (1, pytest.approx(1 / 3), 10, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3), pytest.approx(56 / 3), 0)]
    assert points[0].interval == pytest.approx(1.96 * (1 / 3) ** 0.5 / 3**0.5)


def test_table_and_plot(tmp_path):
    curves = {'SFT': curve([trace('1', '1'), trace('2', '')], (1, 2, 16), lambda *_: 0.5)}
    lines = table(curves, 7).split('\n')
    assert lines[0].split() == ['turns', '1', '2', '16']
    assert lines[1].split()[:2] == ['SFT', '3.50']
    plot(curves, tmp_path / 'turns.png', 7)
    assert (tmp_path / 'turns.png').read_bytes().startswith(b'\x89PNG')
