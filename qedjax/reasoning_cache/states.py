"""States to train from: some of those that a chain went through, and a buffer of summaries from which later chains begin.

The buffer lets the reachable horizon grow by the turns of a chain each time a problem comes up, at constant cost. Source: the reasoning
cache's training recipe as QED-Nano uses it (arXiv 2604.04898): states uniformly without replacement, the empty one included; new
summaries of a problem replace its old ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qedjax.reasoning_cache.state import State, state_from, to_json


def sample_states(states: Sequence[State], count: int, seed: Sequence[int]) -> list[State]:
    """`count` of the states (all, if there are no more), uniformly without replacement, in their order; a pure function."""
    chosen = np.random.default_rng(seed).choice(len(states), size=min(count, len(states)), replace=False)
    return [states[i] for i in sorted(chosen.tolist())]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A state that a chain ended a turn with, and the version of the weights that wrote its summary."""

    state: State
    version: int


@dataclasses.dataclass
class ReplayBuffer:
    """Problem number -> states to begin chains from.

    Attributes:
      size: problems kept; the one that was added longest ago goes first. 0 keeps none.
      horizon: states at this turn or beyond are not kept; 0 keeps all.
    """

    size: int = 0
    horizon: int = 0
    stored: dict[int, tuple[Stored, ...]] = dataclasses.field(default_factory=dict)

    def add(self, number: int, found: Sequence[Stored]) -> None:
        """Replaces what is stored of a problem."""
        self.stored.pop(number, None)
        kept = tuple(entry for entry in found if not self.horizon or entry.state.turn < self.horizon)
        if kept and self.size:
            self.stored[number] = kept
        while len(self.stored) > self.size:
            del self.stored[next(iter(self.stored))]

    def start(self, number: int, problem: str, seed: Sequence[int]) -> Stored:
        """Where a chain begins: one of the problem's stored states, or without any the empty one."""
        stored = self.stored.get(number, ())
        return stored[np.random.default_rng(seed).integers(len(stored))] if stored else Stored(State(problem), 0)

    def to_json(self) -> list[list[Any]]:
        """The contents, in order, as JSON can hold them."""
        return [[number, [[to_json(entry.state), entry.version] for entry in entries]] for number, entries in self.stored.items()]

    def load(self, rows: Sequence[Sequence[Any]]) -> None:
        """Inverse of to_json."""
        self.stored = {number: tuple(Stored(state_from(state), version) for state, version in entries) for number, entries in rows}


@dataclasses.dataclass
class Difficulty:
    """Running mean rewards of problems: those outside (least, most] are passed over, but for every `again`-th time they come up.

    Attributes:
      least, most: mean rewards of problems that are trained; (-1, 1) passes over none.
      again: a problem that is passed over gets another chance after so many times.
    """

    least: float = -1.0
    most: float = 1.0
    again: int = 4
    means: dict[int, float] = dataclasses.field(default_factory=dict)
    passed: dict[int, int] = dataclasses.field(default_factory=dict)

    def update(self, number: int, reward: float) -> None:
        """Half of the new mean is the newest reward."""
        self.means[number] = (self.means[number] + reward) / 2 if number in self.means else reward

    def admit(self, number: int) -> bool:
        """Whether to train a problem now that it has come up, which is counted; a problem without rewards always."""
        if (self.least, self.most) == (-1.0, 1.0) or self.least < self.means.get(number, self.most) <= self.most:
            return True
        self.passed[number] = self.passed.get(number, 0) + 1
        return self.passed[number] % self.again == 0

    def to_json(self) -> Mapping[str, list[list[float]]]:
        """The contents as JSON can hold them."""
        return {name: [list(item) for item in getattr(self, name).items()] for name in ('means', 'passed')}

    def load(self, rows: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Inverse of to_json."""
        self.means = {int(number): mean for number, mean in rows['means']}
        self.passed = {int(number): int(count) for number, count in rows['passed']}
