"""States to train from, the buffer of summaries and the filter by difficulty."""

import collections
import json

from hypothesis import given
from hypothesis import strategies as st

from qedjax.reasoning_cache.state import Sampled, State
from qedjax.reasoning_cache.states import Difficulty, ReplayBuffer, Stored, sample_states

SEED = (0, 1)


def stored(problem, turn, text='s'):
    return Stored(State(problem, (Sampled(text, (1, 2)),), turn), turn)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_states_are_drawn_without_replacement_and_in_order(turns, count, seed):
    states = [State('p', (), turn) for turn in range(turns)]
    chosen = sample_states(states, count, (seed,))
    assert [s.turn for s in chosen] == sorted({s.turn for s in chosen})
    assert len(chosen) == min(count, turns)
    assert chosen == sample_states(states, count, (seed,))


def test_every_state_is_as_likely_the_empty_one_included():
    states = [State('p', (), turn) for turn in range(4)]
    counts = collections.Counter(s.turn for seed in range(2000) for s in sample_states(states, 2, (seed,)))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 5 * (2000 * 0.25) ** 0.5 for count in counts.values())


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(1, 9), max_size=4)), max_size=30), st.integers(0, 3), st.integers(0, 6))
def test_the_buffer_holds_the_newest_problems_and_their_newest_summaries(adds, size, horizon):
    buffer, expected = ReplayBuffer(size, horizon), {}
    for number, turns in adds:
        buffer.add(number, [stored(f'p{number}', turn) for turn in turns])
        expected.pop(number, None)
        if kept := [turn for turn in turns if not horizon or turn < horizon]:
            expected[number] = kept
        while len(expected) > size:
            del expected[next(iter(expected))]
    assert {number: [entry.state.turn for entry in entries] for number, entries in buffer.stored.items()} == expected
    again = ReplayBuffer(size, horizon)
    again.load(json.loads(json.dumps(buffer.to_json())))
    assert (again.stored, list(again.stored)) == (buffer.stored, list(buffer.stored))


def test_chains_begin_where_an_earlier_one_ended():
    buffer = ReplayBuffer(2)
    assert buffer.start(0, 'p', SEED) == Stored(State('p'), 0)
    buffer.add(0, [stored('p', turn) for turn in (1, 2, 3)])
    assert {buffer.start(0, 'p', (seed,)).state.turn for seed in range(50)} == {1, 2, 3}
    assert buffer.start(0, 'p', SEED) == buffer.start(0, 'p', SEED)
    assert buffer.start(1, 'q', SEED).state == State('q')


def test_problems_that_are_solved_or_hopeless_are_passed_over_but_come_back():
    difficulty = Difficulty(0.1, 0.8, again=3)
    assert difficulty.admit(0)
    difficulty.update(0, 1.0)
    assert [difficulty.admit(0) for _ in range(6)] == [False, False, True, False, False, True]
    difficulty.update(0, 0.2)  # the mean is now 0.6
    assert difficulty.admit(0)
    difficulty.update(1, 0.0)
    assert not difficulty.admit(1)
    again = Difficulty(0.1, 0.8, again=3)
    again.load(json.loads(json.dumps(difficulty.to_json())))
    assert again == difficulty
    assert all(Difficulty().admit(i) for i in range(3))
