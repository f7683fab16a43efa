"""Derivations: chains of single-digit operations modulo 10, to be proven line by line, and a noisy teacher.

A problem is `3 a+4 b*7 c+2`: start from 3, then do each labelled step. Its proof has one line a step and the answer:

    a 3+4=7
    b 7*7=9
    c 9+2=1
    Answer: 1

Steps that are drawn are labelled a, b, c and so on: a tiny model can then tell from a label where its step stands. With
labels that begin anywhere it learns to count lines instead, and cannot go on from the middle. Every operation permutes
the ten digits: whatever came before, a guessed value is right one time in ten.

A proof may be continued from a summary (`b=9`: step b gives 9): its first line is then `From b=9`, and the steps up
to b are left out. The teacher slips in arithmetic, skips a line or restarts when it continues, and summarises
wrongly, all at set rates.
"""

import dataclasses
import itertools
import re
import string
import zlib

import numpy as np

from qedjax import prompts

LABELS = string.ascii_letters + '!#$%&/?@^_|~'  # one byte each, none of them used by operations or values
MAX_STEPS = len(LABELS)  # 64
DIGITS = {'+': '123456', '*': '37'}  # of the operations that are drawn: 80 facts of arithmetic; any of _PROBLEM may be asked
SPLITS = ('train', 'held_out')
HELD_OUT = 8  # one chain in eight is held out

_LABEL = f'[{re.escape(LABELS)}]'
_PROBLEM = re.compile(rf'[0-9](?: {_LABEL}(?:[+-][1-9]|\*[379]))+')
_CLAIM = re.compile(rf'(?:From )?({_LABEL})(?: [0-9][-+*][0-9])?=([0-9])')
_SUMMARY = re.compile(rf'({_LABEL})=([0-9])')


@dataclasses.dataclass(frozen=True)
class Problem:
    """A chain of operations; hashable, equal to `parse_problem(problem.text)`.

    Attributes:
      start: the digit to start from.
      operations: of each step, as in '+4'.
      labels: one character a step, no two alike.
    """

    start: int
    operations: tuple[str, ...]
    labels: str

    @property
    def text(self) -> str:
        """The problem as it is put to a model."""
        return ' '.join([str(self.start), *map(''.join, zip(self.labels, self.operations, strict=True))])

    @property
    def values(self) -> tuple[int, ...]:
        """The true value after each step."""
        return tuple(itertools.accumulate(self.operations, apply, initial=self.start))[1:]

    @property
    def lines(self) -> tuple[str, ...]:
        """The true line of each step."""
        before = (self.start, *self.values)
        return tuple(self.line(step, before[step], value) for step, value in enumerate(self.values))

    @property
    def proof(self) -> str:
        """The perfect proof."""
        return '\n'.join([*self.lines, f'Answer: {self.values[-1]}'])

    def line(self, step: int, before: int, after: int) -> str:
        """The line that claims `after` as the result of a step on `before`."""
        return f'{self.labels[step]} {before}{self.operations[step]}={after}'


def apply(value: int, operation: str) -> int:
    """Value of `operation` (as in '+4') on a digit, modulo 10."""
    digit = int(operation[1])
    return {'+': value + digit, '-': value - digit, '*': value * digit}[operation[0]] % 10


def make_problem(seed: int, index: int, split: str = 'train', min_steps: int = 4, max_steps: int = 8) -> Problem:
    """Problem number `index` of a stream, a pure function of the arguments; its length is uniform in the given range.

    A chain belongs to one split for ever, by a checksum of its start and operations (labels apart), so no seed or
    length puts a held-out chain into training. Raises ValueError for an unknown split or impossible lengths.
    """
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; choose one of {", ".join(SPLITS)}')
    if not 1 <= min_steps <= max_steps <= MAX_STEPS:
        raise ValueError(f'min_steps={min_steps} and max_steps={max_steps} must satisfy 1 <= min <= max <= {MAX_STEPS}')
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    steps = int(rng.integers(min_steps, max_steps + 1))
    while True:
        problem = Problem(int(rng.integers(10)), tuple(_operation(rng) for _ in range(steps)), LABELS[:steps])
        if split_of(problem) == split:
            return problem


def _operation(rng: np.random.Generator) -> str:
    """Each operator equally often."""
    operator = '+*'[rng.integers(2)]
    return operator + DIGITS[operator][rng.integers(len(DIGITS[operator]))]


def split_of(problem: Problem) -> str:
    """The split that a chain belongs to, whatever its labels."""
    chain = f'{problem.start}{"".join(problem.operations)}'
    return SPLITS[zlib.crc32(chain.encode()) % HELD_OUT == 0]


def problems(seed: int, split: str, n: int, min_steps: int = 4, max_steps: int = 8) -> list[Problem]:
    """The first n problems of a stream. Chains can recur within a split (short ones must), never across splits."""
    return [make_problem(seed, index, split, min_steps, max_steps) for index in range(n)]


def parse_problem(text: str) -> Problem:
    """The problem that a text states; raises ValueError if it states none."""
    if not _PROBLEM.fullmatch(text):
        raise ValueError(f'{text[:60]!r} is not a derivation; expected a text such as {"3 a+4 b*7 c+2"!r}')
    start, *steps = text.split(' ')
    labels = ''.join(step[0] for step in steps)
    if len(set(labels)) < len(labels):
        raise ValueError(f'{text[:60]!r} gives two steps the same label')
    return Problem(int(start), tuple(step[1:] for step in steps), labels)


def teacher_proof(problem: Problem, rng: np.random.Generator, slip: float = 0.1) -> str:
    """A proof; each line has chance `slip` of a wrong result, uniform among the nine, and later lines build on it."""
    return '\n'.join(_write(problem, 0, problem.start, rng, slip))


def teacher_continuation(
    problem: Problem, summary: str, rng: np.random.Generator, *, slip: float = 0.1, skip: float = 0.25,
    restart: float = 0.25,
) -> str:
    """The rest of a proof from a summary, believed as it stands; '' continues from nothing.

    Worse than starting fresh: with chance `restart` the summary is ignored, else with chance `skip` the next step is
    left out. Raises ValueError for a summary that is not one of this problem.
    """
    found = _SUMMARY.fullmatch(summary)
    if summary and (not found or found[1] not in problem.labels):
        raise ValueError(f'{summary[:60]!r} is not a summary of {problem.text[:60]!r}')
    if not found or rng.random() < restart:
        return teacher_proof(problem, rng, slip)
    step = problem.labels.index(found[1]) + 1
    step += step < len(problem.labels) and rng.random() < skip
    return '\n'.join([f'From {summary}', *_write(problem, step, int(found[2]), rng, slip)])


def _write(problem: Problem, first: int, value: int, rng: np.random.Generator, slip: float) -> list[str]:
    """The lines of the steps from number `first`, computed from `value`, and the answer."""
    lines = []
    for step in range(first, len(problem.labels)):
        before, value = value, _digit(apply(value, problem.operations[step]), rng, slip)
        lines.append(problem.line(step, before, value))
    return [*lines, f'Answer: {value}']


def _digit(digit: int, rng: np.random.Generator, wrong: float) -> int:
    """The digit, or with chance `wrong` one of the other nine."""
    return (digit + int(rng.integers(1, 10))) % 10 if rng.random() < wrong else digit


def summary_text(problem: Problem, proof: str, rng: np.random.Generator | None = None, wrong: float = 0.0) -> str:
    """How far a proof got, as in 'r=9': the last complete line of a step of this problem; '' if there is none.

    The proof may be cut anywhere. With chance `wrong` the digit is one of the other nine (this takes an rng).
    """
    claims = [claim for line in proof.splitlines() if (claim := _CLAIM.fullmatch(line)) and claim[1] in problem.labels]
    if not claims:
        return ''
    digit = int(claims[-1][2])
    return f'{claims[-1][1]}={_digit(digit, rng, wrong) if rng and wrong else digit}'


def chain_rows(
    seed: int, n: int, min_steps: int, max_steps: int, budget: int, *, slip: float = 0.1, wrong: float = 0.03
) -> list[dict[str, str]]:
    """n training rows (`prompt`, `completion`) that teach the reasoning cache, with its prompts.

    Three in ten prove a problem, half continue a proof from a summary, with the faults of teacher_continuation, and the others summarise
    what the first `budget` characters of a proof or of a continuation came to. A summary's digit is wrong at the rate `wrong`, also of
    those that are continued.
    """
    rngs = (np.random.default_rng((seed, len(SPLITS) + 1, index)) for index in range(n))
    return [_chain_row(problem, budget, rng, slip, wrong)
            for problem, rng in zip(problems(seed, 'train', n, min_steps, max_steps), rngs, strict=True)]


def _chain_row(problem: Problem, budget: int, rng: np.random.Generator, slip: float, wrong: float) -> dict[str, str]:
    kind, done = rng.choice(3, p=(0.3, 0.5, 0.2)), int(rng.integers(1, len(problem.labels) + 1))
    if kind == 0:
        return {'prompt': problem.text, 'completion': teacher_proof(problem, rng, slip)}
    begun = '\n'.join(problem.lines[:done])
    if kind == 1:
        summary = summary_text(problem, begun, rng, wrong)
        asked = prompts.render('derivations_continue', problem=problem.text, summary=summary)
        return {'prompt': asked, 'completion': teacher_continuation(problem, summary, rng, slip=slip)}
    start = '' if rng.random() < 1 / 3 else summary_text(problem, begun)
    reasoning = teacher_continuation(problem, start, rng, slip=slip, restart=0.0)[:budget].strip('\n')
    asked = prompts.render('derivations_summarise', problem=problem.text, reasoning=reasoning)
    return {'prompt': asked, 'completion': summary_text(problem, reasoning, rng, wrong)}


def sft_rows(seed: int, n: int, min_steps: int = 4, max_steps: int = 8, slip: float = 0.1) -> list[dict[str, str]]:
    """n training rows (`prompt`, `completion`): problems of the training split and the teacher's proofs of them."""
    rngs = (np.random.default_rng((seed, len(SPLITS), index)) for index in range(n))  # a stream of its own
    chains = problems(seed, 'train', n, min_steps, max_steps)
    return [{'prompt': problem.text, 'completion': teacher_proof(problem, rng, slip)}
            for problem, rng in zip(chains, rngs, strict=True)]
