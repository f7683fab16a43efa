"""Problems: checked, filtered and drawn as a pure function of the draw."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedjax.data.sources import Source
from qedjax.rl.problems import ProblemsConfig, problem_number, read_problems
from qedjax.testing import tiny_tokenizer


@pytest.fixture
def source(tmp_path):
    rows = [{'task': f'p{i}', 'rubrics': 'all', 'reward_mean': i / 10} for i in range(11)]
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return Source(str(tmp_path / 'p.jsonl'), columns='problem=task,rubric=rubrics,difficulty=reward_mean')


def read(source, check=lambda row: None, **changes):
    return [p.row['problem'] for p in read_problems(source, ProblemsConfig(**changes), tiny_tokenizer('none'), check)]


def test_solved_and_hopeless_problems_are_left_out(source):
    assert len(read(source)) == 11
    assert read(source, least=0.0, most=0.7) == [f'p{i}' for i in range(1, 8)]
    with pytest.raises(ValueError, match='no problem is left'):
        read(source, least=0.96, most=0.99)


def test_rows_that_cannot_be_graded_are_bad_rows(source):
    def check(row):
        if row['problem'] == 'p3':
            raise ValueError('no rubric for this one')

    with pytest.raises(ValueError, match=r'1 of 11 rows cannot be graded, e\.g\. row 4: no rubric'):
        read(source, check)
    source.max_bad_share = 0.2
    assert 'p3' not in read(source, check)


def test_the_prompt_is_around_the_problem_and_its_length_counts(source):
    tokenizer = tiny_tokenizer('none')
    problem, = read_problems(source, ProblemsConfig(prompt='Prove {problem} now', least=0.95), tokenizer, lambda row: None)
    assert 'Prove p10 now' in tokenizer.decode(problem.prompt_ids)
    with pytest.raises(ValueError, match='prompt longer than 5 tokens'):
        read(source, max_prompt=5)


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_problem_once_an_epoch(count, seed, epoch):
    drawn = [problem_number(epoch * count + i, count, seed) for i in range(count)]
    assert sorted(drawn) == list(range(count))


def test_the_easiest_come_first_in_the_first_epoch_alone():
    rates = np.random.default_rng(0).random(20)
    first = [rates[problem_number(i, 20, 0, rates)] for i in range(20)]
    assert first == sorted(rates, reverse=True)
    assert [problem_number(20 + i, 20, 0, rates) for i in range(20)] == [problem_number(20 + i, 20, 0) for i in range(20)]
