"""Packing: nothing is split, mixed or lost, and what a position predicts is the next token of its own document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.data.packing import assemble, plan_rows

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=80)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), most=st.sampled_from([None, 1, 3]))
def test_every_document_is_in_exactly_one_row_and_every_row_fits(lengths, seed, most):
    rows = plan_rows(lengths, 32, seed, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    assert all(1 <= len(row) <= (most or 32) for row in rows)
    assert rows == plan_rows(lengths, 32, seed, most)


def test_another_seed_packs_otherwise():
    lengths = [5] * 60
    assert plan_rows(lengths, 32, 0) != plan_rows(lengths, 32, 1)


def test_packing_is_dense():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.5, 0.6, 1000).astype(int) + 1, 2048).tolist()
    rows = plan_rows(lengths, 2048, 0)
    assert sum(lengths) / (len(rows) * 2048) > 0.94


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=5), tail=st.integers(0, 3), seed=st.integers(0, 9))
def test_assembled_rows_hold_each_document_with_its_own_targets(sizes, tail, seed):
    rng = np.random.default_rng(seed)
    documents = [(rng.integers(0, 99, size).astype(np.int32), min(prompt, size)) for size, prompt in sizes]
    row = assemble(documents, sum(size for size, _ in sizes) + tail)
    start = 0
    for segment, (ids, prompt) in enumerate(documents, 1):
        here = slice(start, start + len(ids))
        np.testing.assert_array_equal(row.tokens[here], ids)
        np.testing.assert_array_equal(row.positions[here], np.arange(len(ids)))
        assert set(row.segment_ids[here]) == {segment}
        for t, weight in enumerate(row.weights[here]):
            trained = t + 1 < len(ids) and t + 1 >= prompt  # the target is a completion token of the same document
            assert weight == trained
            if t + 1 < len(ids):
                assert row.targets[start + t] == ids[t + 1]
        start += len(ids)
    for field in (row.tokens, row.targets, row.weights, row.positions, row.segment_ids):
        assert not field[start:].any()


@pytest.mark.parametrize('prompt', [0, 1])
def test_first_token_of_a_document_is_never_a_target(prompt):
    row = assemble([(np.array([7, 8], np.int32), prompt), (np.array([9, 10], np.int32), prompt)], 5)
    assert row.targets.tolist() == [8, 0, 10, 0, 0]
    assert row.weights.tolist() == [1, 0, 1, 0, 0]
