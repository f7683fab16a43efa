"""Rubrics: text and value say the same, and what is wrong with one is named; a score out of range is refused."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.grading.grade import Graded
from qedjax.grading.rubric import Checkpoint, Deduction, Rubric, parse, render, validate

TEXTS = st.text(max_size=40).map(lambda text: ' '.join(text.split())).filter(bool)
CUTS = st.sets(st.integers(1, 6)).map(lambda cuts: [0, *sorted(cuts), 7])
POINTS = CUTS.map(lambda cuts: [high - low for low, high in itertools.pairwise(cuts)])
DEDUCTIONS = st.one_of(
    st.builds(Deduction, TEXTS, amount=st.integers(1, 7)), st.builds(Deduction, TEXTS, cap=st.integers(0, 6)))

RUBRIC = Rubric(
    (Checkpoint('The main idea.', 4), Checkpoint('A bound.', 2), Checkpoint('The end.', 1)),
    ('Restating the problem.',),
    (Deduction('A small gap.', amount=1), Deduction('The converse is missing.', cap=3)))
TEXT = """\
Checkpoints (7 pts total)
1. [4 pts] The main idea.
2. [2 pts] A bound.
3. [1 pt] The end.

Zero-credit items
- Restating the problem.

Deductions
- [-1] A small gap.
- [at most 3] The converse is missing."""


@st.composite
def rubrics(draw):
    checkpoints = tuple(Checkpoint(draw(TEXTS), points) for points in draw(POINTS))
    common, best = (checkpoints[:-1], checkpoints[-1:]) if draw(st.booleans()) else (checkpoints, ())
    other = (Checkpoint(draw(TEXTS), draw(st.integers(1, best[0].points))),) if best else ()
    return Rubric(common, tuple(draw(st.lists(TEXTS, max_size=3))), tuple(draw(st.lists(DEDUCTIONS, max_size=3))),
                  (best, other) if best else ())


def test_text_of_a_rubric():
    assert render(RUBRIC) == TEXT
    assert parse(TEXT) == RUBRIC


@settings(max_examples=100, deadline=None)
@given(rubric=rubrics())
def test_parse_undoes_render(rubric):
    assert parse(render(rubric)) == rubric


def test_alternatives_do_not_add_up():
    text = ('Checkpoints (7 pts total)\n1. [4 pts] Idea.\nAlternative A\n2. [3 pts] Rest.\nAlternative B\n2. [1 pt] Half.\n'
            '3. [1 pt] More.\n\nZero-credit items\n- Guessing.')
    rubric = parse(text)
    assert [[c.points for c in chain] for chain in rubric.alternatives] == [[3], [1, 1]]
    assert render(rubric) == text
    for bad, says in (('[3 pts] Rest', '[2 pts] Rest'), ('[3 pts] Rest', '[4 pts] Rest')):
        with pytest.raises(ValueError, match='with the best alternative are worth'):
            parse(text.replace(bad, says))
    with pytest.raises(ValueError, match='at least two'):
        parse(text.split('Alternative B')[0])


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_other_text_is_refused_with_a_reason(text):
    with pytest.raises(ValueError, match=r'heading|points|section'):
        parse(text)


def test_preamble_spacing_and_sections_without_items_do_not_matter():
    loose = 'The scheme.\r\n\r\n  checkpoints:\r\n 1.  [7 pts]   Everything,\tshown. \r\n\r\nZero-credit items:\r\n'
    assert parse(loose) == Rubric((Checkpoint('Everything, shown.', 7),))
    assert render(parse(loose)) == 'Checkpoints (7 pts total)\n1. [7 pts] Everything, shown.'


@pytest.mark.parametrize(('old', 'new', 'says'), [
    ('[2 pts]', '[3 pts]', 'worth 8 points in all'),
    ('[2 pts]', '[0 pts]', 'checkpoint 2 is worth 0'),
    ('[2 pts]', '[1.5 pts]', r"the line '2. \[1.5 pts\] A bound.' is not an item of the section checkpoints"),
    ('2. [2 pts]', '2.', "the line '2. A bound.' is not an item"),
    ('- Restating', 'Restating', "the line 'Restating the problem.' is not an item of the section zero-credit"),
    ('[-1]', '[-8]', 'deduction 1 is 8'),
    ('[-1]', '[+1]', r"the line '- \[\+1\] A small gap.' is not an item of the section deductions"),
    ('at most 3', 'at most 7', 'deduction 2 is 7'),
    ('1. [4 pts]', 'Checkpoints\n1. [4 pts]', "the section 'Checkpoints' is repeated"),
    ('Checkpoints', 'Zero-credit', r"'Zero-credit \(7 pts total\)' is repeated or comes before"),
])
def test_what_is_wrong_with_a_text_is_named(old, new, says):
    with pytest.raises(ValueError, match=says):
        parse(TEXT.replace(old, new))


@pytest.mark.parametrize(('changes', 'says'), [
    ({'checkpoints': ()}, 'worth 0 points in all'),
    ({'checkpoints': (Checkpoint('a', 8), Checkpoint('b', -1))}, 'checkpoint 2 is worth -1'),
    ({'checkpoints': (Checkpoint('a', 7.0),)}, 'checkpoint 1 is worth 7.0'),
    ({'checkpoints': (Checkpoint('a\nb', 7),)}, 'must be one line'),
    ({'zero_credit': ('',)}, 'not empty'),
    ({'deductions': (Deduction('a'),)}, 'deduction 1 must have either'),
    ({'deductions': (Deduction('a', amount=1, cap=2),)}, 'deduction 1 must have either'),
])
def test_what_is_wrong_with_a_value_is_named(changes, says):
    for check in (validate, render):
        with pytest.raises(ValueError, match=says):
            check(dataclasses.replace(RUBRIC, **changes))


@pytest.mark.parametrize('score', [-1, 8, 7.5, float('nan'), True, '7', None])
def test_a_score_out_of_range_is_refused(score):
    with pytest.raises(ValueError, match='score is'):
        Graded(score)


def test_rewards():
    assert [Graded(score).reward for score in (0, 3.5, 7)] == [0, 0.5, 1]
