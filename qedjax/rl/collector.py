"""Which groups are in the making, and which of them a step trains: complete, graded and fresh ones only."""

import asyncio
import dataclasses
from collections.abc import Sequence

from qedjax.llm.client import gather
from qedjax.llm.local import LocalEndpoint
from qedjax.rl.actor import Actor
from qedjax.rl.batch import varied
from qedjax.rl.config import RLConfig
from qedjax.rl.problems import Problem, problem_number
from qedjax.types import Group

PATIENCE = 10  # times the groups of a step that may be drawn for it before it makes do with fewer


@dataclasses.dataclass
class Counts:
    """Groups that were not trained since the last step, by reason."""

    stale: int = 0
    ungraded: int = 0
    zero_variance: int = 0


async def all_at_once(endpoint: LocalEndpoint, actor: Actor, chosen: Sequence[tuple[Problem, int]]) -> Sequence[Group]:
    """Groups of (problem, draw) pairs whose requests reach the engine together, in order: what it computes then depends on nothing else."""
    async with endpoint.held():
        tasks = [asyncio.ensure_future(actor.group(problem, draw)) for problem, draw in chosen]
        while endpoint.queued < len(tasks) * actor.size and not any(task.done() for task in tasks):
            await asyncio.sleep(0)
    return await gather(*tasks)


class Collector:
    """Draws problems and turns them into the groups of one step after the other.

    Attributes:
      draw: number of the next draw.
      counts: what was left out since `collect` was last called.
    """

    def __init__(self, cfg: RLConfig, endpoint: LocalEndpoint, actor: Actor, problems: Sequence[Problem], draw: int = 0,
                 pending: Sequence[int] = ()):
        """Goes on at draw number `draw`, after those in `pending`, which an earlier process had begun."""
        self.draw, self.counts = draw, Counts()
        self._cfg, self._endpoint, self._actor, self._problems = cfg, endpoint, actor, problems
        self._again = sorted(pending)
        self._open: set[int] = set()  # draws that have been begun and neither trained nor dropped
        self._making: set[asyncio.Task[Group]] = set()
        self._ready: list[Group] = []
        in_order = cfg.problems.order == 'easiest first'
        self._difficulties = [float(p.row.get('difficulty', -1.0)) for p in problems] if in_order else None

    @property
    def pending(self) -> list[int]:
        """Draws that have been begun and neither trained nor dropped, also when collecting them failed."""
        return sorted({*self._open, *self._again})

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
        self._open -= {group.draw for group in groups}
        return sorted(groups, key=lambda group: group.draw)

    async def _together(self) -> list[Group]:
        """Synchronous: the groups of this step are begun together, and nothing else is under way."""
        ready: list[Group] = []
        for _ in range(PATIENCE):
            chosen = [self._next() for _ in range(self._cfg.groups - len(ready))]
            ready += filter(self._usable, await all_at_once(self._endpoint, self._actor, chosen))
            if len(ready) == self._cfg.groups:
                break
        return ready

    async def _in_flight(self, version: int) -> list[Group]:
        """The first groups to be ready, while others go on."""
        left = PATIENCE * self._cfg.groups
        self._ready = [group for group in self._ready if self._fresh(group, version)]
        while len(self._ready) < self._cfg.groups and left:
            while len(self._making) < self._cfg.in_flight:
                problem, draw = self._next()
                self._making.add(asyncio.ensure_future(self._actor.group(problem, draw)))
            done, self._making = await asyncio.wait(self._making, return_when=asyncio.FIRST_COMPLETED)
            left -= len(done)
            finished = [task.result() for task in done]
            self._ready += [group for group in finished if self._usable(group) and self._fresh(group, version)]
        batch, self._ready = self._ready[: self._cfg.groups], self._ready[self._cfg.groups :]
        return batch

    async def close(self) -> None:
        """Gives up what is in the making."""
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)

    def _next(self) -> tuple[Problem, int]:
        draw = self._again.pop(0) if self._again else self.draw
        self.draw = max(self.draw, draw + 1)
        self._open.add(draw)
        return self._problems[problem_number(draw, len(self._problems), self._cfg.seed, self._difficulties)], draw

    def _usable(self, group: Group) -> bool:
        if sum(rollout.reward is not None for rollout in group.rollouts) < 2:
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
        """Settles a group that is not trained; False."""
        self._open.discard(group.draw)
        return False
