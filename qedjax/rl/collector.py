"""Which groups are in the making, and which of them a step trains: complete, graded and fresh ones only."""

import asyncio
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qedjax.llm.client import gather
from qedjax.llm.local import LocalEndpoint
from qedjax.processes import FAILURES, POLL, Crew
from qedjax.rl.actor import Actor
from qedjax.rl.batch import varied
from qedjax.rl.chains import Chains
from qedjax.rl.config import RLConfig
from qedjax.rl.draws import Draws
from qedjax.rl.problems import Problem, problem_number
from qedjax.rl.together import all_at_once
from qedjax.types import Group

PATIENCE = 10  # times the groups of a step that may be drawn for it before it makes do with fewer


@dataclasses.dataclass
class Counts:
    """Groups that were not trained since the last step, by reason, of all processes."""

    stale: int = 0
    ungraded: int = 0
    zero_variance: int = 0


class Collector:
    """Draws problems and turns them into the groups of one step after the other.

    Attributes:
      counts: what was left out since `collect` was last called.
    """

    def __init__(self, cfg: RLConfig, endpoint: LocalEndpoint, actor: Actor, problems: Sequence[Problem], chains: Chains | None = None,
                 crew: Crew | None = None, **position: Any):
        """Goes on at a position that `agree` returned, in whatever number of processes.

        With `chains`, a draw gives as many groups as states are trained, otherwise one.
        """
        self.counts, self._chains, self._crew = Counts(), chains, crew or Crew()
        self._cfg, self._endpoint, self._actor, self._problems = cfg, endpoint, actor, problems
        # In flight each process has draws of its own; in the synchronous mode all make the same ones and divide their groups.
        self._draws = Draws(**position, process=self._crew.process, count=self._crew.count) if cfg.max_lag else Draws(**position)
        self._making: set[asyncio.Task[list[Group]]] = set()
        self._ready: list[Group] = []
        in_order = cfg.problems.order == 'easiest first'
        self._difficulties = [float(p.row.get('difficulty', -1.0)) for p in problems] if in_order else None

    async def agree(self) -> dict[str, Any]:
        """Where all processes are, as a checkpoint keeps it: the same everywhere. What none of them has begun is dealt anew."""
        mine = self._draws.told(), self._chains.tell() if self._chains else []
        told = await self._crew.exchange(mine) if self._cfg.max_lag else [mine]
        position = self._draws.deal([draws for draws, _ in told])
        return position | ({'chains': self._chains.agree([news for _, news in told])} if self._chains else {})

    async def collect(self, version: int) -> list[Group]:
        """The groups of a step, in the order of their draws; `version` is that of the weights which they will change.

        There are fewer than configured only where so few are usable that it would take PATIENCE times as many draws. Raises
        RuntimeError if there is none at all.
        """
        self.counts = Counts()
        groups = await (self._in_flight(version) if self._cfg.max_lag else self._together())
        if not groups:
            raise RuntimeError(f'of {PATIENCE * self._cfg.groups} groups none could be trained ({self.counts}): their answers are '
                               'ungraded, all earn the same, or are older than max_lag allows; look at the grader and the problems')
        self._draws.open -= {group.draw for group in groups}
        return sorted(groups, key=lambda group: (group.draw, group.turn or 0))

    async def _together(self) -> list[Group]:
        """Synchronous: nothing else is under way. A step that fails leaves all as if it had not begun, so that it can begin again."""
        before, known = copy.deepcopy(self._draws), self._chains.known() if self._chains else None
        try:
            return await self._begun_together()
        except FAILURES:
            self._draws = before
            if self._chains and known:
                self._chains.forget(known)
            raise

    async def _begun_together(self) -> list[Group]:
        ready: list[Group] = []
        for _ in range(PATIENCE):
            missing = self._cfg.groups - len(ready)
            drawn = [self._next() for _ in range(-(-missing // max(self._cfg.chains.states, 1)))]
            found = await self._chains.together(drawn) if self._chains else [[self._problems[number]] for number, _ in drawn]
            chosen = [(problem, draw) for (_, draw), problems in zip(drawn, found, strict=True) for problem in problems]
            ready += filter(self._usable, await self._crew.divided(chosen, self._answer))
            if len(ready) >= self._cfg.groups:
                break
        for group in ready[self._cfg.groups :]:
            self._drop(group)
        return ready[: self._cfg.groups]

    async def _answer(self, chosen: Sequence[tuple[Problem, int]]) -> Sequence[Group]:
        """Groups of these problems and draws, begun together."""
        works = [self._actor.group(problem, draw) for problem, draw in chosen]
        return await all_at_once(self._endpoint, works, len(works) * self._actor.size)

    async def _in_flight(self, version: int) -> list[Group]:
        """The first groups to be ready, of whatever process, while others go on."""
        await self.agree()
        self._ready = [group for group in self._ready if self._fresh(group, version)]
        parts = await self._crew.exchanged(self._enough(version))
        self.counts = Counts(*(sum(values) for values in zip(*(dataclasses.astuple(counts) for _, counts in parts), strict=True)))
        ready = [groups for groups, _ in parts]
        chosen = sorted((i, process) for process, groups in enumerate(ready) for i in range(len(groups)))[: self._cfg.groups]
        self._ready = self._ready[sum(process == self._crew.process for _, process in chosen) :]
        return [ready[process][i] for i, process in chosen]

    async def _enough(self, version: int) -> tuple[list[Group], Counts]:
        """What is ready here once there is enough in all processes together. Nothing new is begun before the next step."""
        share, finished = -(-self._cfg.in_flight // self._crew.count), 0
        while await self._more(finished):
            while len(self._making) < share:
                self._making.add(asyncio.ensure_future(self._groups(*self._next())))
            # A draw may bring several groups.
            done, self._making = await asyncio.wait(self._making, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
            groups = [group for task in done for group in task.result()]
            finished += len(groups)
            self._ready += [group for group in groups if self._usable(group) and self._fresh(group, version)]
        return self._ready[: self._cfg.groups], self.counts

    async def _more(self, finished: int) -> bool:
        """Whether a step needs more groups than are ready, and more may be drawn for it; `finished` here."""
        totals = await self._crew.totals(len(self._ready), finished)
        return totals is not None and totals[0] < self._cfg.groups and totals[1] < PATIENCE * self._cfg.groups

    async def close(self) -> None:
        """Gives up what is in the making."""
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)

    async def _groups(self, number: int, draw: int) -> list[Group]:
        """All groups of a draw."""
        chosen = await self._chains.states(number, draw) if self._chains else [self._problems[number]]
        return list(await gather(*(self._actor.group(problem, draw) for problem in chosen)))

    def _next(self) -> tuple[int, int]:
        """Number of the next problem, and of its draw."""
        while True:
            draw, again = self._draws.next()
            number = self._number(draw)
            if again or not self._chains or self._chains.admit(number):  # those that were begun have been admitted
                return number, draw
            self._draws.open.discard(draw)

    def _number(self, draw: int) -> int:
        return problem_number(draw, len(self._problems), self._cfg.seed, self._difficulties)

    def _usable(self, group: Group) -> bool:
        rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        if self._chains and rewards:
            self._chains.rewarded(self._number(group.draw), float(np.mean(rewards)))
        if len(rewards) < 2:
            self.counts.ungraded += 1
            return self._drop(group)
        if self._cfg.objective.zero_variance == 'refill' and not varied(group, self._cfg.objective, self._cfg.max_tokens):
            self.counts.zero_variance += 1
            return self._drop(group)
        return True

    def _fresh(self, group: Group, version: int) -> bool:
        if group.oldest_version >= version - self._cfg.max_lag:
            return True
        self.counts.stale += 1
        return self._drop(group)

    def _drop(self, group: Group) -> bool:
        """Settles a group that is not trained; False.

        A draw of several states is settled by the first of its groups: made again, it would train that one a second time.
        """
        self._draws.open.discard(group.draw)
        return False
