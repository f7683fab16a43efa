"""The grader of derivations: seven for a perfect proof alone; credit never falls as lines are put right."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.data.derivations import Problem, apply, make_problem, problems, teacher_continuation, teacher_proof
from qedjax.grading.derivations import blocks, grade, rubric
from qedjax.grading.rubric import parse, render, validate

PROBLEM = Problem(3, ('+4', '*7', '-2'), 'qrs')  # two points a line
PROOF = 'q 3+4=7\nr 7*7=9\ns 9-2=7\nAnswer: 7'
CHAINS = st.builds(make_problem, st.integers(0, 99), st.integers(0, 99), st.just('held_out'), st.just(1), st.just(12))
JUNK = st.one_of(
    st.text(max_size=12),
    st.text('qrsFromAnswer: 0123456789+-*=\n', max_size=12),
    st.sampled_from(['Score: 7', '<score>7</score>', 'q 3+4=8', 'From q=0', 'Answer: 3', 'Checkpoints (7 pts total)']))


@pytest.mark.parametrize('steps', range(1, 65))
def test_every_length_has_a_rubric_of_seven_points(steps):
    problem = make_problem(0, steps, 'train', steps, steps)
    scheme = validate(rubric(problem))
    assert sum(checkpoint.points for checkpoint in scheme.checkpoints) == 7
    assert parse(render(scheme)) == scheme
    assert tuple('; '.join(c.text for c in scheme.checkpoints[:-1]).split('; ')) == problem.lines
    sizes = [end - first for first, end, _ in blocks(steps)]
    assert max(sizes) - min(sizes) <= 1
    assert grade(problem, problem.proof).score == 7


def test_the_rubric_is_readable():
    assert render(rubric(PROBLEM)).startswith(
        'Checkpoints (7 pts total)\n1. [2 pts] q 3+4=7\n2. [2 pts] r 7*7=9\n3. [2 pts] s 9-2=7\n4. [1 pt] Answer: 7\n')


@pytest.mark.parametrize(('text', 'score', 'why'), [
    ('', 0, '0 of 3 steps right; not shown: q 3+4=7; no final answer'),
    (PROOF, 7, '3 of 3 steps right; final answer right'),
    ('\n  q 3+4=7\n\nr 7*7=9 \r\ns 9-2=7\nAnswer: 7\n\n', 7, 'right'),
    (PROBLEM.text, 0, 'no final answer'),
    ('Answer: 7', 0, 'final answer right'),
    ('Answer: 4', 0, 'final answer false'),
    ('q 3+4=7', 2, 'not shown: r 7*7=9'),
    ('q 3+4=7\nr 7*7=', 2, 'no final answer'),
    ('q 3+4=7\nr 7*7=9\ns 9-2=7', 6, 'no final answer'),
    ('q 3+4=7\nr 7*7=9\ns 9-2=7\nAnswer: 8', 5, 'final answer false'),
    ('q 3+4=7\nr 7*7=8\ns 8-2=6\nAnswer: 6', 1, '1 of 3 steps right; not shown: r 7*7=9'),
    ('q 3+4=7\nr 7*7=8\ns 9-2=7\nAnswer: 7', 5, '2 of 3 steps right'),
    ('q 3+4=7\ns 9-2=7\nAnswer: 7', 5, 'not shown: r 7*7=9'),
    ('r 7*7=9\ns 9-2=7\nq 3+4=7\nAnswer: 7', 4, 'stray lines'),
    ('q 3+4=8\nq 3+4=7\nr 7*7=9\ns 9-2=7\nAnswer: 7', 4, 'stray lines'),
    (PROOF.replace('r', 'r 7*7=9\nr', 1), 6, 'stray lines'),
    ('Here is a proof.\n' + PROOF, 6, 'stray lines'),
    (PROOF + '\nThis proof is complete. Score: 7', 5, 'no final answer; stray lines'),
    ('Answer: 1\nAnswer: 2\n' + PROOF, 6, 'stray lines'),
    ('Score: 7\n<score>7</score>\nGraded(score=7)', 0, 'stray lines'),
    ('q ٣+٤=٧\nr 7*7=9\ns 9-2=7\nAnswer: ٧', 3, 'no final answer; stray lines'),
    ('q 4+4=8\nr 1*7=7\ns 2-2=0\nAnswer: 7', 0, '0 of 3 steps right'),
    ('q 3-4=9\nr 7+7=4\ns 9-3=6\nAnswer: 7', 0, '0 of 3 steps right'),
    ('t 3+4=7\nu 7*7=9\nAnswer: 7', 0, 'stray lines'),
    ('From r=9\ns 9-2=7\nAnswer: 7', 7, '3 of 3 steps right'),
    ('From r=8\ns 8-2=6\nAnswer: 6', 0, '0 of 3 steps right'),
    ('q 3+4=7\nFrom r=9\ns 9-2=7\nAnswer: 7', 4, 'stray lines'),
    ('From r=9\nq 3+4=7\ns 9-2=7\nAnswer: 7', 6, 'stray lines'),
    ('From z=9\ns 9-2=7\nAnswer: 7', 2, 'stray lines'),
])
def test_scores_and_reasons(text, score, why):
    graded = grade(PROBLEM, text)
    assert graded.score == score
    assert why in graded.feedback


@settings(max_examples=200, deadline=None)
@given(problem=CHAINS, rows=st.lists(JUNK, max_size=8))
def test_any_text_has_a_grade_and_only_the_perfect_proof_has_seven(problem, rows):
    text = '\n'.join(rows)
    assert 0 <= grade(problem, text).score < 7
    assert grade(problem, problem.proof).score == 7
    assert len(grade(problem, text).feedback) < 200


@settings(max_examples=300, deadline=None)
@given(problem=CHAINS, data=st.data())
def test_putting_a_wrong_line_right_never_lowers_the_score(problem, data):
    true = problem.proof.split('\n')
    junk = JUNK.map(lambda text: ' '.join(text.split()))
    # Not blank: that is no line at all, and one written after what was taken for a cut last line makes a stray line of it.
    junk = junk.filter(lambda row: row and not row.startswith((*problem.labels, 'From')))
    claims = st.from_regex(r'\A [0-9][-+*][0-9]=[0-9]\Z')  # of the step that is due: wrong, or by chance right
    rows = [data.draw(st.one_of(st.just(line), junk, claims.map(line[0].__add__))) for line in true]
    number = data.draw(st.integers(0, len(true) - 1))
    repaired = [*rows[:number], true[number], *rows[number + 1 :]]
    assert grade(problem, '\n'.join(repaired)).score >= grade(problem, '\n'.join(rows)).score


@settings(max_examples=100, deadline=None)
@given(problem=CHAINS, data=st.data())
def test_another_line_of_the_proof_never_lowers_the_score(problem, data):
    lines = problem.proof.split('\n')
    scores = [grade(problem, '\n'.join(lines[:end])).score for end in range(len(lines) + 1)]
    assert scores == sorted(scores)
    assert (scores[0], scores[-2], scores[-1]) == (0, 6, 7)
    cut = problem.proof[: data.draw(st.integers(0, len(problem.proof)))]
    whole = sum(line in lines for line in cut.split('\n'))  # a line that is cut off earns and costs nothing
    assert grade(problem, cut).score == scores[whole]


@pytest.mark.parametrize('text', [
    'a' * 100_000, '\n' * 100_000, 'q 3+4=7\n' * 15_000, 'From ' * 20_000, '9' * 100_000, 'Answer: 7\n' * 10_000,
    '\0' * 1000, '\ud800' * 1000, ' \u2028' * 50_000,
])
def test_enormous_and_odd_texts_are_graded(text):
    assert grade(PROBLEM, text).score <= 1


def exact_mean(problem, slip):
    """Mean score of the teacher: the sum over everything that it can write."""
    total = 0.0
    for claims in itertools.product(range(10), repeat=len(problem.labels)):
        before, chance = (problem.start, *claims), 1.0
        for operation, value, claim in zip(problem.operations, before, claims, strict=False):
            chance *= 1 - slip if apply(value, operation) == claim else slip / 9
        if chance:
            lines = [problem.line(step, before[step], claim) for step, claim in enumerate(claims)]
            total += chance * grade(problem, '\n'.join([*lines, f'Answer: {claims[-1]}'])).score
    return total


def test_the_teachers_mean_grade_is_the_exact_one_and_falls_with_its_slips():
    rates = (0, 0.05, 0.1, 0.2, 0.5)
    means = [exact_mean(PROBLEM, slip) for slip in rates]
    assert means[0] == 7
    assert all(low < high - 0.2 for high, low in itertools.pairwise(means))
    assert means == pytest.approx([by_hand(slip) for slip in rates], abs=1e-9)
    random = np.random.default_rng(0)
    sampled = [grade(PROBLEM, teacher_proof(PROBLEM, random, 0.1)).score for _ in range(4000)]
    assert np.mean(sampled) == pytest.approx(means[2], abs=4 * np.std(sampled) / 4000**0.5)


def by_hand(slip):
    """Two points a true line, one for the answer after a true one, less one if it is false, but never below 0."""
    true, back, mean = 1.0, slip / 9, 0.0  # back: a second slip may return to the truth
    none_true, none_false = 1.0, 0.0  # chances that no line was true yet and that the value is true, or false
    for _ in PROBLEM.labels:
        line = true * (1 - slip)
        true, mean = line + (1 - true) * back, mean + 2 * line
        none_true, none_false = none_false * back, none_true * slip + none_false * (1 - back)
    return mean + line - (1 - true - none_false)


def test_the_teacher_leaves_room_and_continues_worse_than_it_starts():
    random, chains = np.random.default_rng(0), problems(0, 'train', 600)
    means = [np.mean([grade(p, teacher_proof(p, random, slip)).score for p in chains]) for slip in (0, 0.05, 0.1, 0.2)]
    assert means[0] == 7
    assert means == sorted(means, reverse=True)
    assert 3.5 < means[2] < 5.5
    fresh, continued = [], []
    for p in chains:
        done = len(p.labels) // 2
        text = teacher_continuation(p, f'{p.labels[done]}={p.values[done]}', random, slip=0, skip=0.25, restart=0)
        continued.append(grade(p, text).score)
        fresh.append(grade(p, teacher_proof(p, random, slip=0)).score)
    assert np.mean(continued) < np.mean(fresh) - 0.5
