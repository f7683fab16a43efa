"""Rubrics: checkpoints worth 7 points in all, what earns nothing, and deductions; as values and as text.

    Checkpoints (7 pts total)
    1. [4 pts] The main idea.
    Alternative A
    2. [3 pts] The rest.
    Alternative B
    2. [2 pts] Half of the rest by another route.
    3. [1 pt] The other half.

    Zero-credit items
    - Restating the problem.

    Deductions
    - [-1] A small gap.
    - [at most 3] The converse is never shown.

Alternatives do not add up: a proof earns the best of them. `parse` and `render` are inverse to each other on valid rubrics.
"""

import dataclasses
import itertools
import re
import string
from collections.abc import Sequence

from qedjax.grading.grade import FULL


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Something to show, worth `points` if it is shown."""

    text: str
    points: int


@dataclasses.dataclass(frozen=True)
class Deduction:
    """A flaw: it costs `amount` points, or caps the score at `cap`. Exactly one of the two is set."""

    text: str
    amount: int | None = None
    cap: int | None = None


@dataclasses.dataclass(frozen=True)
class Rubric:
    """How a proof earns its points: the checkpoints, and the best of the alternatives. Every text is one line with single spaces."""

    checkpoints: tuple[Checkpoint, ...]
    zero_credit: tuple[str, ...] = ()
    deductions: tuple[Deduction, ...] = ()
    alternatives: tuple[tuple[Checkpoint, ...], ...] = ()


_HEADINGS = (f'Checkpoints ({FULL} pts total)', 'Zero-credit items', 'Deductions')
_HEADING = re.compile(r'(checkpoints|zero-credit|deductions)(?: items)?(?: \([^()]*\))?:?', re.IGNORECASE)
_ALTERNATIVE = re.compile(r'alternative [a-z0-9]+:?', re.IGNORECASE)
_NAMES = string.ascii_uppercase
_CHECKPOINT = re.compile(r'[0-9]+\. \[([0-9]{1,2}) pts?\] (.+)')
_ZERO_CREDIT = re.compile(r'- (.+)')
_DEDUCTION = re.compile(r'- \[(?:-([0-9]{1,2})|at most ([0-9]{1,2}))\] (.+)')


def validate(rubric: Rubric) -> Rubric:
    """Returns the rubric, or raises ValueError that says what is wrong with it."""
    everything = [*rubric.checkpoints, *itertools.chain(*rubric.alternatives)]
    for number, checkpoint in enumerate(everything, 1):
        if type(checkpoint.points) is not int or checkpoint.points < 1:
            raise ValueError(f'checkpoint {number} is worth {checkpoint.points!r}; points must be positive integers')
    if len(rubric.alternatives) == 1 or not all(rubric.alternatives):
        raise ValueError('alternatives must be at least two, and none may be empty')
    common, *routes = (sum(checkpoint.points for checkpoint in chain) for chain in (rubric.checkpoints, *rubric.alternatives))
    if (total := common + max(routes, default=0)) != FULL:
        best = ' with the best alternative' if routes else ''
        raise ValueError(f'the checkpoints{best} are worth {total} points in all; they must sum to {FULL}')
    for number, deduction in enumerate(rubric.deductions, 1):
        value, low, high = (deduction.amount, 1, FULL) if deduction.cap is None else (deduction.cap, 0, FULL - 1)
        if (deduction.amount is None) == (deduction.cap is None):
            raise ValueError(f'deduction {number} must have either an amount or a cap')
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f'deduction {number} is {value!r}; it must be an integer from {low} to {high}')
    scored = [checkpoint.text for checkpoint in everything]
    for text in (*scored, *(deduction.text for deduction in rubric.deductions), *rubric.zero_credit):
        if not text or text != ' '.join(text.split()):
            raise ValueError(f'the text {text[:60]!r} must be one line, not empty, with single spaces')
    return rubric


def render(rubric: Rubric) -> str:
    """Text of a valid rubric; sections without items are left out."""
    validate(rubric)
    sections = (
        _numbered(rubric.checkpoints, 1) + [
            line for name, chain in zip(_NAMES, rubric.alternatives, strict=False)
            for line in (f'Alternative {name}', *_numbered(chain, len(rubric.checkpoints) + 1))],
        [f'- {text}' for text in rubric.zero_credit],
        [f'- [{f"at most {d.cap}" if d.amount is None else f"-{d.amount}"}] {d.text}' for d in rubric.deductions],
    )
    filled = [[heading, *items] for heading, items in zip(_HEADINGS, sections, strict=True) if items]
    return '\n\n'.join(map('\n'.join, filled))


def parse(text: str) -> Rubric:
    """The rubric that a text describes; what precedes its 'Checkpoints' heading is skipped, spacing is normalised.

    Raises ValueError, with the line, for anything that is not understood, and as `validate` does.
    """
    sections: dict[str, list] = {}
    section, name = None, ''
    alternatives: list[list[Checkpoint]] = []
    for line in filter(None, (' '.join(line.split()) for line in text.splitlines())):
        if heading := _HEADING.fullmatch(line):
            name = heading[1].lower()
            if name in sections or (not sections and name != 'checkpoints'):
                raise ValueError(f'the section {line[:60]!r} is repeated or comes before the checkpoints')
            section = sections[name] = []
        elif name == 'checkpoints' and _ALTERNATIVE.fullmatch(line):
            section = []
            alternatives.append(section)
        elif section is not None:
            section.append(_item(name, line))
    if section is None:
        raise ValueError(f"no line is a 'Checkpoints' heading in {text[:60]!r}")
    checkpoints, zero_credit, deductions = (tuple(sections.get(name, ())) for name in ('checkpoints', 'zero-credit', 'deductions'))
    return validate(Rubric(checkpoints, zero_credit, deductions, tuple(map(tuple, alternatives))))


def _item(section: str, line: str) -> Checkpoint | Deduction | str:
    pattern = {'checkpoints': _CHECKPOINT, 'zero-credit': _ZERO_CREDIT, 'deductions': _DEDUCTION}[section]
    item = pattern.fullmatch(line)
    if item is None:
        raise ValueError(f'the line {line[:60]!r} is not an item of the section {section}')
    if section == 'checkpoints':
        return Checkpoint(item[2], int(item[1]))
    if section == 'deductions':
        return Deduction(item[3], *(None if value is None else int(value) for value in item.groups()[:2]))
    return item[1]


def _numbered(checkpoints: Sequence[Checkpoint], first: int) -> list[str]:
    return [f'{number}. [{_points(c.points)}] {c.text}' for number, c in enumerate(checkpoints, first)]


def _points(points: int) -> str:
    return f'{points} pt' if points == 1 else f'{points} pts'
