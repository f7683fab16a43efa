"""The protocol of graders, the one that grades derivations by rule, and all of them by name."""

from collections.abc import Mapping
from typing import Any, Protocol

from qedjax.data.derivations import parse_problem
from qedjax.grading import derivations
from qedjax.grading.answers import AnswerGrader
from qedjax.grading.grade import Grade
from qedjax.grading.judge import Judge, JudgeConfig
from qedjax.llm.remote import RemoteEndpoint


class Grader(Protocol):
    """Grades answers to problems. Any number of calls may be under way."""

    def check(self, row: Mapping[str, Any]) -> None:
        """Raises ValueError, in one sentence, for a problem (a row of data) whose answers it could not grade."""
        ...

    async def grade(self, row: Mapping[str, Any], answer: str) -> Grade:
        """The grade of an answer: the text after thinking ends, not blank.

        Raises EndpointError when nothing can be graded any more.
        """
        ...

    def report(self) -> dict[str, float]:
        """What a run should report of it: numbers by name, counted since it was made."""
        ...

    async def close(self) -> None:
        """Gives back connections and processes; called in the event loop that graded."""
        ...


class DerivationGrader:
    """Grades proofs of derivations (data.derivations) by their rubric."""

    def check(self, row: Mapping[str, Any]) -> None:
        """See Grader."""
        parse_problem(row['problem'])

    async def grade(self, row: Mapping[str, Any], answer: str) -> Grade:
        """See Grader."""
        return derivations.grade(parse_problem(row['problem']), answer)

    def report(self) -> dict[str, float]:
        """See Grader."""
        return {}

    async def close(self) -> None:
        """See Grader."""


def make_grader(name: str, judge: JudgeConfig, workdir: str) -> Grader:
    """The grader called 'derivations', 'answers' or 'judge'. Raises ValueError for a judge that cannot work."""
    if name == 'judge':
        return Judge(judge, RemoteEndpoint(judge.remote), workdir)
    return {'derivations': DerivationGrader, 'answers': AnswerGrader}[name]()
