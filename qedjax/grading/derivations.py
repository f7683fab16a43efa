"""The rubric of a derivation and the rule that grades by it: what an LLM grader is for real proofs.

A line earns credit if it is true of the chain. Mistakes are not carried forward: a line computed rightly from a wrong
value is a false statement, so the lines up to the first slip count and hardly any after it. Hence putting a line right
never lowers the score, a guess pays one time in ten, and a teacher that slips in one line of ten leaves a third of the
marks to be gained.

A first line `From r=9` that is true stands for the steps up to r: a chain too long for one answer can be proven in
several.
"""

import re

from qedjax.data.derivations import LABELS, Problem
from qedjax.grading.grade import FULL, Graded
from qedjax.grading.rubric import Checkpoint, Deduction, Rubric, validate

LINE_POINTS = FULL - 1  # the answer has the last point

ZERO_CREDIT = (
    'Restating the problem.',
    'Lines that are false of this chain, also those that follow rightly from an earlier mistake.',
    'Steps before a first line `From x=v` with a false v (with a true v it stands for the steps up to x).',
    'The answer without a right last step.',
)
FALSE_ANSWER_COST = STRAY_LINE_COST = 1
FALSE_ANSWER = Deduction('The final answer is false.', amount=FALSE_ANSWER_COST)
STRAY_LINE = Deduction('Some line is repeated, out of order or no line of such a proof.', amount=STRAY_LINE_COST)

_LABEL = f'([{re.escape(LABELS)}])'
_LINE = re.compile(rf'{_LABEL} [0-9][-+*][0-9]=[0-9]')
_FROM = re.compile(rf'From {_LABEL}=([0-9])')
_ANSWER = re.compile(r'Answer: ([0-9])')


def blocks(steps: int) -> list[tuple[int, int, int]]:
    """Blocks of steps as (first, end, points); LINE_POINTS in all. Single lines up to six steps, then six even runs."""
    count = min(steps, LINE_POINTS)
    return [(steps * i // count, steps * (i + 1) // count, LINE_POINTS * (i + 1) // count - LINE_POINTS * i // count)
            for i in range(count)]


def rubric(problem: Problem) -> Rubric:
    """Six points for the lines, in at most six blocks of which every line must be right, and one for the answer."""
    lines = problem.lines
    checkpoints = [Checkpoint('; '.join(lines[first:end]), points) for first, end, points in blocks(len(lines))]
    answer = Checkpoint(f'Answer: {problem.values[-1]}', FULL - LINE_POINTS)
    return validate(Rubric((*checkpoints, answer), ZERO_CREDIT, (FALSE_ANSWER, STRAY_LINE)))


def grade(problem: Problem, text: str) -> Graded:
    """Score of an answer (the text after thinking closes) by `rubric(problem)`, with reasons. Any text will do.

    The last line that is not blank is the final answer, or it was cut off: then the answer is missing, which costs its
    point and no more.
    """
    right, answer, stray = _read(problem, text)
    truth = problem.values[-1]
    score = sum(points for first, end, points in blocks(len(right)) if all(right[first:end]))
    score += (FULL - LINE_POINTS) * (right[-1] and answer == truth)
    score -= FALSE_ANSWER_COST * (answer is not None and answer != truth) + STRAY_LINE_COST * stray
    notes = [f'{sum(right)} of {len(right)} steps right']
    if not all(right):
        notes.append(f'not shown: {problem.lines[right.index(False)]}')
    notes.append('no final answer' if answer is None else f'final answer {"right" if answer == truth else "false"}')
    if stray:
        notes.append('stray lines')
    return Graded(max(score, 0), '; '.join(notes))


def _read(problem: Problem, text: str) -> tuple[list[bool], int | None, bool]:
    """Which steps are shown, the final answer if there is one, and whether there are stray lines."""
    lines, right, due = problem.lines, [False] * len(problem.labels), 0  # due: steps before it may not follow any more
    answer, stray = None, False
    rows = [row for row in map(str.strip, text.splitlines()) if row]
    for number, row in enumerate(rows, 1):
        line = _LINE.fullmatch(row) or (_FROM.fullmatch(row) if number == 1 else None)
        step = problem.labels.find(line[1]) if line else -1
        if line and step >= due:
            if line.re is _LINE:
                right[step] = row == lines[step]
            elif int(line[2]) == problem.values[step]:
                right[: step + 1] = [True] * (step + 1)
            due = step + 1
        elif number < len(rows):
            stray = True
        elif final := _ANSWER.fullmatch(row):
            answer = int(final[1])
    return right, answer, stray
