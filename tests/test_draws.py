"""Who makes which draw: each is settled exactly once, however unevenly processes advance and however many there are after a restart."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rl.draws import Draws


def crew(count, position=()):
    return [Draws(**dict(position), process=process, count=count) for process in range(count)]


def deal(processes):
    """What all tell each other; all come to the same position."""
    told = [draws.told() for draws in processes]
    positions = [draws.deal(told) for draws in processes]
    assert all(position == positions[0] for position in positions)
    return positions[0]


def play(data, processes, settled, admitted):
    """Draws are begun, settled and dealt again in some order."""
    for _ in range(data.draw(st.integers(0, 40))):
        draws = data.draw(st.sampled_from(processes))
        action = data.draw(st.sampled_from(('begin', 'begin', 'settle', 'deal')))
        if action == 'begin':
            number, again = draws.next()
            assert again == (number in admitted)  # what was begun once has been admitted, and nothing else
            admitted.add(number)
        elif action == 'settle' and draws.open:
            number = data.draw(st.sampled_from(sorted(draws.open)))
            draws.open.remove(number)
            settled[number] += 1
        elif action == 'deal':
            deal(processes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_each_draw_is_settled_once_whatever_the_number_of_processes(data):
    settled, admitted, position = collections.Counter(), set(), {}
    for count in data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)):
        processes = crew(count, position)
        play(data, processes, settled, admitted)
        position = deal(processes)
        assert not {*position['pending']} & {*position['left']}
        assert {*settled, *position['pending'], *position['left']} == set(range(position['draw']))
        assert not settled.keys() & {*position['pending'], *position['left']}
        assert admitted == {*settled, *position['pending']}
    processes = crew(1, position)
    while (number := processes[0].next()[0]) < position['draw']:
        settled[number] += 1
    assert settled == dict.fromkeys(range(position['draw']), 1)


def test_one_process_draws_in_order():
    draws = Draws(6, (3, 1))
    assert [draws.next() for _ in range(4)] == [(1, True), (3, True), (6, False), (7, False)]
    draws.open -= {1, 6}
    assert draws.deal([draws.told()]) == {'draw': 8, 'pending': [3, 7], 'left': []}


def test_what_a_slow_process_leaves_goes_to_all():
    fast, slow = crew(2)
    assert [fast.next()[0] for _ in range(4)] == [0, 2, 4, 6]
    assert slow.next()[0] == 1
    assert deal([fast, slow]) == {'draw': 7, 'pending': [0, 1, 2, 4, 6], 'left': [3, 5]}
    assert [fast.next()[0] for _ in range(2)] == [3, 7]
    assert [slow.next()[0] for _ in range(2)] == [5, 8]
