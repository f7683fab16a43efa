"""What grading returns: a score with feedback, or the reason why there is none, which is never a score of 0."""

import dataclasses

FULL = 7


@dataclasses.dataclass(frozen=True)
class Graded:
    """An answer was graded. Raises ValueError unless `score`, an int or a mean of several, lies in [0, 7]."""

    score: float
    feedback: str = ''

    def __post_init__(self):
        if type(self.score) not in (int, float) or not 0 <= self.score <= FULL:
            raise ValueError(f'score is {self.score!r}; it must be a number from 0 to {FULL}')

    @property
    def reward(self) -> float:
        """Share of the full marks, in 0 .. 1."""
        return self.score / FULL


@dataclasses.dataclass(frozen=True)
class Ungraded:
    """An answer could not be graded: it is tried again or left out, and never counts as 0."""

    reason: str


Grade = Graded | Ungraded
