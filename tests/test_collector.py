"""Collecting in flight by several processes, here as tasks of one loop: what each draws, what all train, and how they end together."""

import asyncio
import collections
import contextlib
import pickle
import threading

import numpy as np
import pytest

from qedjax import processes
from qedjax.llm.client import EndpointError
from qedjax.processes import Crew, Preempted
from qedjax.rl import collector as collecting
from qedjax.rl.chains import Chains, ChainsConfig
from qedjax.rl.collector import Collector
from qedjax.rl.config import RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import Problem
from qedjax.testing import tiny_tokenizer
from qedjax.types import Completion, Group, Rollout

PROBLEMS = [Problem((1,), {'problem': str(i)}) for i in range(7)]
CONFIG = RLConfig(groups=3, in_flight=6, max_lag=1, objective=ObjectiveConfig(zero_variance='refill'))


class Hub:
    """Where pretended processes meet."""

    def __init__(self, count):
        self.count, self.notes, self.values = count, {}, {}
        self.barrier = asyncio.Barrier(count)

    async def meet(self, process, value):
        self.values[process] = pickle.dumps(value)
        await self.barrier.wait()
        values = [pickle.loads(self.values[i]) for i in range(self.count)]
        await self.barrier.wait()
        return values


class Pretended(Crew):
    def __init__(self, hub, process):
        self.told = threading.Event()
        super().__init__(self.told)
        self.process, self.count, self.hub, self._board = process, hub.count, hub, self

    def swap(self, note):
        self.hub.notes[self.process] = note
        return list(self.hub.notes.values())

    async def exchange(self, value):
        async with self.held():
            return await self.hub.meet(self.process, value)


class Actor:
    """Makes a group after a while; every fifth draw earns nothing to learn from and every seventh no grade."""

    def __init__(self, seed, pace=1.0):
        self.rng, self.pace, self.version, self.begun, self.ended = np.random.default_rng(seed), pace, 0, [], []

    async def group(self, problem, draw):
        self.begun.append(draw)
        version = self.version
        await asyncio.sleep(self.pace * self.rng.exponential(0.003))
        self.ended.append(draw)
        rewards = [None] * 2 if draw % 7 == 6 else [0.5] * 2 if draw % 5 == 4 else [0.0, 1.0]
        completion = Completion('', (1,), (0.0,), 'stop', (1,), ((version, 1),))
        return Group(draw, problem.row['problem'], tuple(Rollout(completion, '', reward) for reward in rewards))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(processes, 'POLL', 0.002)
    monkeypatch.setattr(collecting, 'POLL', 0.002)


def collectors(count, actors, position=()):
    hub = Hub(count)
    crew = [Pretended(hub, process) for process in range(count)]
    return [Collector(CONFIG, None, actor, PROBLEMS, None, one, **dict(position)) for one, actor in zip(crew, actors, strict=True)]


async def steps(collector, actor, versions):
    """What each step trains and leaves out, and where it ends."""
    taken = []
    for version in versions:
        actor.version = version
        taken.append(([(g.draw, g.oldest_version) for g in await collector.collect(version)], vars(collector.counts)))
    return taken, await collector.agree()


async def run(count, seed, versions, position=()):
    """All processes for some steps; they must agree on everything."""
    actors = [Actor(seed + process, 1 + 3 * process) for process in range(count)]
    crew = collectors(count, actors, position)
    results = await asyncio.gather(*(steps(c, actor, versions) for c, actor in zip(crew, actors, strict=True)))
    assert all(result == results[0] for result in results)
    for collector in crew:
        await collector.close()
    return results[0], actors


@pytest.mark.parametrize(('before', 'after'), [(1, 3), (2, 1), (2, 4), (3, 2), (5, 1)])
def test_no_draw_is_trained_twice_or_skipped(before, after):
    for seed in range(3):
        settled, position, dropped = [], {}, collections.Counter()
        for count, versions in ((before, range(6)), (after, range(6, 12)), (before, range(12, 15))):
            (taken, position), _ = asyncio.run(run(count, seed, versions, position))
            for groups, counts in taken:
                assert len(groups) == CONFIG.groups
                assert [draw for draw, _ in groups] == sorted(draw for draw, _ in groups)
                settled += [draw for draw, _ in groups]
                dropped.update(counts)
        assert len(set(settled)) == len(settled)
        going = {*position['pending'], *position['left']}
        gone = set(range(position['draw'])) - going - set(settled)
        assert len(gone) == sum(dropped.values())  # each is counted once, in whatever process it was dropped
        assert len([draw for draw in gone if draw % 7 == 6]) == dropped['ungraded']
        assert not going & set(settled)


def test_staleness_is_bounded_and_counted():
    async def main():
        actors = [Actor(0), Actor(1, 30)]  # some of the second's groups take several steps
        crew = collectors(2, actors)
        results = await asyncio.gather(*(steps(c, actor, range(30)) for c, actor in zip(crew, actors, strict=True)))
        for collector in crew:
            await collector.close()
        return results[0][0]

    taken = asyncio.run(main())
    assert all(oldest >= version - CONFIG.max_lag for version, (groups, _) in enumerate(taken) for _, oldest in groups)
    assert sum(counts['stale'] for _, counts in taken) > 0


def test_the_engine_is_held_only_once_all_have_done_their_work():
    events = []

    @contextlib.asynccontextmanager
    async def hold():
        events.append('held')
        yield

    async def work(process):
        await asyncio.sleep(0.05 * process)
        events.append(f'{process} is done')
        return process

    async def main():
        hub = Hub(3)
        crew = [Pretended(hub, process) for process in range(3)]
        crew[0].hold = hold
        return await asyncio.gather(*(one.exchanged(work(one.process)) for one in crew))

    assert asyncio.run(main()) == [[0, 1, 2]] * 3
    assert events == ['0 is done', '1 is done', '2 is done', 'held']


async def ended(crew, works):
    """The errors with which all processes end, and the position that they save."""
    errors = await asyncio.wait_for(asyncio.gather(*works, return_exceptions=True), 20)
    positions = await asyncio.gather(*(collector.agree() for collector in crew))
    assert all(position == positions[0] for position in positions)
    for collector in crew:
        await collector.close()
    return errors, positions[0]


def test_a_failure_of_one_is_raised_by_all_and_loses_nothing():
    """Process 1 makes two groups and then fails; the others make none by then."""
    async def main():
        actors = [Actor(process, pace) for process, pace in enumerate((1e6, 1, 1e6))]
        crew, group = collectors(3, actors), actors[1].group

        async def fail(problem, draw):
            if len(actors[1].begun) < 2:
                return await group(problem, draw)
            while len(actors[1].ended) < 2:
                await asyncio.sleep(0.001)
            raise EndpointError('no more grades')

        actors[1].group = fail
        errors, position = await ended(crew, [collector.collect(0) for collector in crew])
        assert [str(error) for error in errors] == ['process 1: no more grades'] * 3
        assert all(isinstance(error, EndpointError) for error in errors)
        return position, {draw for actor in actors for draw in actor.begun}, actors[1].ended

    position, begun, done = asyncio.run(main())
    assert begun - {draw for draw in done if draw % 5 == 4 or draw % 7 == 6} <= set(position['pending'])  # but what was dropped
    assert set(range(position['draw'])) == {*position['pending'], *position['left'], *done}


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('when', ['before', 'while'])
def test_sigterm_to_one_ends_the_collecting_of_all(count, when):
    async def main():
        actors = [Actor(process, 1e6) for process in range(count)]
        crew = collectors(count, actors)
        if when == 'before':
            crew[-1]._crew.told.set()
        works = [asyncio.ensure_future(collector.collect(0)) for collector in crew]
        if when == 'while':
            while not actors[-1].begun:
                await asyncio.sleep(0.001)
            crew[-1]._crew.told.set()
        return await ended(crew, works), actors[-1].begun

    (errors, position), begun = asyncio.run(main())
    assert all(isinstance(error, Preempted) for error in errors)
    assert sorted([*position['pending'], *position['left']]) == list(range(position['draw']))
    assert bool(begun) == (when == 'while')


def test_chains_know_the_same_once_they_agree():
    """In whatever order each learnt its own; what is learnt while they tell each other is kept."""
    cfg = ChainsConfig(2, replay=3, least=0.2, most=0.8)
    rng, tokenizer = np.random.default_rng(0), tiny_tokenizer('none')
    crew = [Chains(cfg, None, tokenizer, (), 0, PROBLEMS) for _ in range(3)]
    alone = Chains(cfg, None, tokenizer, (), 0, PROBLEMS)

    def learn(chains):
        number = int(rng.integers(7))
        chains.rewarded(number, float(rng.random()))
        chains.admit(number)
        chains.replay.stored[number] = ()  # not to be kept: nobody was told
        chains._learn('add', number, [])

    for _ in range(5):
        for chains in rng.permutation(np.array([*crew, crew[0]], object)):
            learn(chains)
        told = [chains.tell() for chains in crew]
        learn(crew[1])
        known = [chains.agree(told) for chains in crew]
        assert known[0] == known[1] == known[2]
        assert len(crew[1].news) == 3
        for news in told:
            for name, values in news:
                alone._learn(name, *values)
        assert alone.agree([alone.tell()]) == known[0]
