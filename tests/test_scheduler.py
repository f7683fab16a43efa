"""The scheduler without a device: whatever comes, everyone is served, in order, and every page comes back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rollout.requests import Request
from qedjax.rollout.scheduler import GROUP_REACH, Scheduler
from qedjax.types import SamplingParams

SIZE, STEPS = 4, 3


def request(arrival, length=5, limit=6, prompt=None):
    ids = np.full(length, arrival, np.int32) if prompt is None else np.full(length, prompt, np.int32)
    return Request(ids, SamplingParams(max_tokens=limit), limit, arrival, np.inf)


def turn(scheduler, slots):
    """One round as the engine has it, with a device that draws STEPS ids for each member with room: who ended."""
    scheduler.admit(slots)
    for prefix in scheduler.filling():
        prefix.filled = min(prefix.filled + 4, len(prefix.tokens))
    for attached in scheduler.attach():
        if attached.copy:
            source, target = attached.copy
            assert source not in attached.member.pages
            assert attached.member.pages[(attached.member.request.length - 1) // SIZE] == target
    preempted = scheduler.grow()
    check(scheduler)
    ended = []
    for member in scheduler.running():
        r = member.request
        r.ids += [0] * min(STEPS, r.limit - len(r.ids), max(0, len(member.pages) * SIZE - r.length + 1))
        if len(r.ids) == r.limit:
            scheduler.remove(member)
            r.finish('length')
            ended.append(r)
    for r in preempted:
        scheduler.enqueue(r)
    return ended


def check(scheduler):
    """Nobody's own page is anyone else's: what two hold is a full page of a shared prompt, which nobody writes."""
    for shard, members in enumerate(scheduler.members):
        written, held = [], set()
        for member in filter(None, members):
            first = 0 if member.prefix is not None else (member.request.length - 1) // SIZE
            written += member.pages[first:] if member.prefix is None else member.pages
            held |= set(member.pages)
        for (owner, _), prefix in scheduler.prefixes.items():
            held |= set(prefix.pages) if owner == shard else set()
        assert len(written) == len(set(written))
        assert scheduler.pools[shard].free == scheduler.capacity - len(held)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 4), st.integers(0, 3), st.integers(7, 40))
def test_everyone_is_served_and_every_page_comes_back(seed, shards, slots, staged, pages):
    """Random lengths, groups and cancels; pages may be scarce, so that members are preempted."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(shards, slots + staged, pages, SIZE, STEPS)
    waiting = [request(i, int(rng.integers(1, 12)), int(rng.integers(1, 12)), prompt=int(rng.integers(0, 8))) for i in range(40)]
    left = set(waiting)
    for _ in range(2000):
        if waiting and rng.random() < 0.6:
            scheduler.enqueue(waiting.pop(0))
        left -= set(turn(scheduler, slots))
        if left and rng.random() < 0.1:
            victim = min(left, key=lambda r: (r in waiting, rng.random()))
            if victim not in waiting:
                if member := scheduler.member_of.get(victim):
                    scheduler.remove(member)
                victim.finish('cancelled')
                left.remove(victim)
        if rng.random() < 0.03:
            scheduler.renew(everyone=bool(rng.integers(2)))
        if not left:
            break
    assert not left, f'{len(left)} requests were not served'
    scheduler.admit(slots)
    assert not scheduler.prefixes
    assert not scheduler.member_of
    assert all(pool.free == pages for pool in scheduler.pools)


def test_the_head_is_never_overtaken_and_groups_stay_together():
    scheduler = Scheduler(1, 1, 40, SIZE, STEPS)
    order = [request(0, prompt=1), request(1, prompt=2), request(2, prompt=1), request(3, length=60), request(4, prompt=2),
             request(GROUP_REACH + 1, prompt=1)]
    for r in order:
        scheduler.enqueue(r)
    served = []
    while len(served) < len(order):
        served += turn(scheduler, 1)
    assert [order.index(r) for r in served] == [0, 2, 1, 4, 3, 5]


def test_the_youngest_gives_way():
    scheduler = Scheduler(1, 3, 8, SIZE, STEPS)
    requests = [request(i, length=3, limit=20) for i in range(3)]
    for r in requests:
        scheduler.enqueue(r)
    ended, times = [], 0
    while len(ended) < 3:
        before = set(scheduler.member_of)
        ended += turn(scheduler, 3)
        gone = [r.arrival for r in before - set(scheduler.member_of) - set(ended)]
        assert all(r.arrival < min(gone, default=9) for r in scheduler.member_of)
        times += len(gone)
    assert [r.arrival for r in ended] == [0, 1, 2]
    assert times > 0
