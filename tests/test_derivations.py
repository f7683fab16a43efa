"""Derivations: a stream is a function of its seed, splits share no chain, and the teacher errs at its rates."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.data.derivations import (
    LABELS,
    MAX_STEPS,
    Problem,
    apply,
    chain_rows,
    make_problem,
    parse_problem,
    problems,
    sft_rows,
    split_of,
    summary_text,
    teacher_continuation,
    teacher_proof,
)

PROBLEM = Problem(3, ('+4', '*7', '-2'), 'qrs')
PROOF = 'q 3+4=7\nr 7*7=9\ns 9-2=7\nAnswer: 7'


def rng():
    return np.random.default_rng(0)


def slips(problem, proof):
    """Share of lines whose arithmetic is wrong for their own left side."""
    lines = [re.fullmatch(r'. ([0-9])(.[0-9])=([0-9])', line) for line in proof.split('\n')[:-1]]
    return np.mean([apply(int(line[1]), line[2]) != int(line[3]) for line in lines])


def test_texts():
    assert PROBLEM.text == '3 q+4 r*7 s-2'
    assert PROBLEM.proof == teacher_proof(PROBLEM, rng(), slip=0) == PROOF
    assert parse_problem(PROBLEM.text) == PROBLEM


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), steps=st.tuples(st.integers(1, 64), st.integers(1, 64)),
       split=st.sampled_from(['train', 'held_out']))
def test_a_problem_is_a_function_of_its_arguments(seed, index, steps, split):
    low, high = sorted(steps)
    problem = make_problem(seed, index, split, low, high)
    assert problem == make_problem(seed, index, split, low, high) == parse_problem(problem.text)
    assert low <= len(problem.operations) == len(set(problem.labels)) == len(problem.values) <= high
    assert split_of(problem) == split
    value = problem.start
    for operation, line, after in zip(problem.operations, problem.lines, problem.values, strict=True):
        assert line[1:] == f' {value}{operation}={after}'
        assert after == eval(f'({value}{operation}) % 10')
        value = after


def test_a_stream_does_not_depend_on_its_length_and_seeds_differ():
    assert problems(0, 'train', 50)[:10] == problems(0, 'train', 10)
    assert set(problems(0, 'train', 50)).isdisjoint(problems(1, 'train', 50))
    assert sft_rows(0, 50)[:10] == sft_rows(0, 10)


def test_splits_share_no_chain_under_any_labels():
    chains = {split: {(p.start, p.operations) for seed in range(3) for p in problems(seed, split, 400, 1, 3)}
              for split in ('train', 'held_out')}
    assert len(chains['train']) > 500
    assert len(chains['held_out']) > 150
    assert chains['train'].isdisjoint(chains['held_out'])


def test_every_length_start_and_digit_occurs_and_labels_are_in_order():
    chains = problems(0, 'train', 1500, 4, 8)
    assert {len(p.operations) for p in chains} == {4, 5, 6, 7, 8}
    assert {p.start for p in chains} == set(range(10))
    assert all(p.labels == LABELS[: len(p.operations)] for p in chains)
    shares = np.bincount([value for p in chains for value in p.values]) / sum(len(p.values) for p in chains)
    np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_every_operation_permutes_the_digits_so_a_guess_is_right_one_time_in_ten():
    for operation in {operation for p in problems(0, 'train', 300) for operation in p.operations}:
        assert {apply(value, operation) for value in range(10)} == set(range(10))


def test_the_longest_chain_has_a_label_a_step():
    problem = make_problem(0, 0, 'held_out', MAX_STEPS, MAX_STEPS)
    assert MAX_STEPS == 64
    assert sorted(problem.labels) == sorted(LABELS)
    assert len(problem.text.encode()) == 1 + 4 * 64


@pytest.mark.parametrize('text', [
    '', '3', '3 ', 'q+4', '3 q+0', '3 q*5', '3 q+4  r*7', '3 q+4 q*7', '3 3+4', '٣ q+4', '3 q+4\n', '3 é+4',
])
def test_what_is_no_problem_is_refused(text):
    with pytest.raises(ValueError, match=r'is not a derivation|the same label'):
        parse_problem(text)


@pytest.mark.parametrize(('arguments', 'says'), [
    (('test',), "split is 'test'; choose one of train, held_out"),
    (('train', 0, 4), '1 <= min <= max <= 64'),
    (('train', 5, 4), 'min_steps=5 and max_steps=4'),
    (('train', 4, 65), 'max_steps=65'),
])
def test_impossible_requests_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        make_problem(0, 0, *arguments)


@pytest.mark.parametrize('slip', [0.0, 0.1, 0.5, 1.0])
def test_the_teacher_slips_at_its_rate_and_builds_on_the_slip(slip):
    chains, random = problems(0, 'train', 400, 8, 8), rng()
    proofs = [teacher_proof(problem, random, slip) for problem in chains]
    assert np.mean([slips(*pair) for pair in zip(chains, proofs, strict=True)]) == pytest.approx(slip, abs=0.02)
    for problem, proof in zip(chains, proofs, strict=True):
        *lines, answer = proof.split('\n')
        claims = [str(problem.start), *(line[-1] for line in lines)]
        assert [line[2] for line in lines] == claims[:-1]
        assert [line[:2] + line[3:5] for line in lines] == [f'{label} {operation}' for label, operation in
                                                            zip(problem.labels, problem.operations, strict=True)]
        assert answer == f'Answer: {claims[-1]}'


def test_sft_rows_are_training_problems_with_slips():
    rows = sft_rows(0, 200)
    chains = [parse_problem(row['prompt']) for row in rows]
    assert {split_of(problem) for problem in chains} == {'train'}
    right = [row['completion'] == problem.proof for row, problem in zip(rows, chains, strict=True)]
    assert np.mean(right) == pytest.approx(np.mean([0.9**k for k in range(4, 9)]), abs=0.1)
    assert all(row['completion'] == parse_problem(row['prompt']).proof for row in sft_rows(0, 50, slip=0))


def test_chain_rows_prove_continue_and_summarise_what_a_budget_leaves():
    rows = chain_rows(0, 3000, 2, 8, 26, slip=0.0, wrong=0.2)
    texts = {problem.text: problem for problem in problems(0, 'train', 3000, 2, 8)}
    kinds = {'prove': 0, 'continue': 0, 'summarise': 0, 'wrong': 0}
    for row in rows:
        text, *rest = row['prompt'].split('\n')
        problem = texts[text]
        kind = 'prove' if not rest else 'continue' if len(rest) == 1 else 'summarise'
        kinds[kind] += 1
        if kind == 'prove':
            assert row['completion'] == problem.proof
        if kind == 'summarise':
            assert rest[-1] == '?'
            reasoning = '\n'.join(rest[:-1])
            assert len(reasoning) <= 26
            true = summary_text(problem, reasoning)
            assert row['completion'][0] == true[0]
            kinds['wrong'] += row['completion'] != true
        elif kind == 'continue':
            assert row['completion'].startswith((f'From {rest[0]}\n', problem.lines[0]))
            assert '\nAnswer: ' in row['completion']
    assert [kinds[k] / 3000 for k in ('prove', 'continue', 'summarise')] == pytest.approx([0.3, 0.5, 0.2], abs=0.03)
    assert kinds['wrong'] / kinds['summarise'] == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize(('proof', 'summary'), [
    ('', ''), ('q 3+4', ''), ('q 3+4=7', 'q=7'), ('q 3+4=7\nr 7*7=', 'q=7'), ('q 3+4=7\nr 7*7=8\n', 'r=8'),
    (PROOF, 's=7'), ('From r=9', 'r=9'), ('From r=9\ns 9-2=7\nAns', 's=7'), ('z 1+1=2', ''), ('q=٧', ''),
])
def test_a_summary_is_the_last_claim_of_a_proof_cut_anywhere(proof, summary):
    assert summary_text(PROBLEM, proof) == summary


def test_summaries_are_wrong_at_their_rate():
    random = rng()
    digits = [summary_text(PROBLEM, PROOF, random, wrong=0.3)[-1] for _ in range(2000)]
    assert np.mean([digit != '7' for digit in digits]) == pytest.approx(0.3, abs=0.03)
    assert set(digits) == set('0123456789')


def test_a_continuation_picks_up_where_the_summary_ends_and_believes_it():
    steady = {'slip': 0, 'skip': 0, 'restart': 0}
    assert teacher_continuation(PROBLEM, 'q=7', rng(), **steady) == 'From q=7\nr 7*7=9\ns 9-2=7\nAnswer: 7'
    assert teacher_continuation(PROBLEM, 'r=1', rng(), **steady) == 'From r=1\ns 1-2=9\nAnswer: 9'
    assert teacher_continuation(PROBLEM, 's=7', rng(), **steady) == 'From s=7\nAnswer: 7'
    assert teacher_continuation(PROBLEM, '', rng(), **steady) == PROOF
    assert teacher_continuation(PROBLEM, 'q=7', rng(), slip=0, skip=0, restart=1) == PROOF
    assert teacher_continuation(PROBLEM, 'q=7', rng(), slip=0, skip=1, restart=0) == 'From q=7\ns 7-2=5\nAnswer: 5'
    assert teacher_continuation(PROBLEM, 's=7', rng(), slip=0, skip=1, restart=0) == 'From s=7\nAnswer: 7'


def test_continuations_skip_and_restart_at_their_rates():
    random = rng()
    texts = [teacher_continuation(PROBLEM, 'q=7', random, slip=0, skip=0.5, restart=0.2) for _ in range(2000)]
    assert np.mean([text == PROOF for text in texts]) == pytest.approx(0.2, abs=0.03)
    assert np.mean(['\nr ' not in text for text in texts]) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize('summary', ['z=1', 'q', 'q=', 'q=10', 'From q=7', 'q=٧'])
def test_a_summary_of_something_else_is_refused(summary):
    with pytest.raises(ValueError, match='is not a summary of'):
        teacher_continuation(PROBLEM, summary, rng())


@pytest.mark.parametrize('cut', [0, 5, 30, 100])
def test_cutting_and_continuing_proves_a_long_chain(cut):
    problem, summary = make_problem(3, 1, 'held_out', 64, 64), ''
    for _turn in itertools.count():
        text = teacher_continuation(problem, summary, rng(), slip=0, skip=0, restart=0)
        if text.endswith(f'Answer: {problem.values[-1]}') and len(text) < 200:
            break
        summary = summary_text(problem, text[: 180 + cut])
        assert _turn < 10
