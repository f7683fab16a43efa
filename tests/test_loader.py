"""The loader: batch k depends on the data, the settings and k alone; bad documents are dropped and counted."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.data.loader import TOO_LONG, UNTRAINABLE, Loader
from qedjax.types import Example


def make_examples(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return tuple(rng.integers(0, 99, rng.integers(low, high)).tolist())

    return [Example(ids(0, 5), ids(2, longest - 5)) for _ in range(count)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), batch=st.integers(1, 7), seed=st.integers(0, 3))
def test_each_document_once_an_epoch(count, batch, seed):
    loader = Loader(make_examples(count), row_length=32, batch=batch, seed=seed)
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        assert sorted(i for k in steps for row in loader.documents_of(k) for i in row) == list(range(count))
        assert sum(int((loader.fetch(k).segment_ids > 0).sum()) for k in steps) == loader.report.tokens


def test_a_batch_is_a_function_of_its_number():
    examples = make_examples(50)
    loader = Loader(examples, row_length=32, batch=4)
    steps = 3 * loader.steps_per_epoch
    batches = [loader.fetch(k) for k in range(steps)]
    fresh = Loader(iter(examples), row_length=32, batch=4)
    assert all(same(fresh.fetch(k), batches[k]) for k in reversed(range(steps)))
    for start in (0, 1, steps - 2):
        assert all(same(a, b) for a, b in zip(fresh.iterate(start, steps), batches[start:], strict=True))
    first, second = (loader.documents_of(e * loader.steps_per_epoch) for e in (0, 1))
    assert first != second  # epochs are shuffled apart


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_rows_are_read_once_whatever_the_number_of_processes(processes):
    named = [Example((i,), (i,) * (i % 20 + 1)) for i in range(50)]  # each token names its document
    loader = Loader(named, row_length=32, batch=4)
    size, log = 4 // processes, []
    for k in range(loader.steps_per_epoch):
        parts = [loader.fetch(k, slice(p * size, (p + 1) * size)) for p in range(processes)]
        assert all(part.tokens.shape == (size, 32) for part in parts)
        assert same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), loader.fetch(k))
        log += [int(i) for part in parts for i in part.tokens[(part.segment_ids > 0) & (part.positions == 0)]]
    assert sorted(log) == list(range(50))


def test_documents_that_cannot_be_trained_are_dropped_and_counted():
    good = Example((1, 2), (3, 4))
    examples = [Example(tuple(range(30)), (1, 2, 3)), Example((1,), ()), Example((), (5,)), good, Example((1,) * 31, (2,))]
    loader = Loader(examples, row_length=32, batch=2)
    assert loader.report.dropped == {TOO_LONG: 1, UNTRAINABLE: 2}
    assert loader.report.documents == 2
    assert loader.report.trained_tokens == 3 == sum(loader.fetch(k).weights.sum() for k in range(loader.steps_per_epoch))
    assert '1 longer than row_length' in str(loader.report)


@pytest.mark.parametrize('examples', [[], [Example((1,), ())], [Example((1,) * 40, (2,))]])
def test_nothing_to_train_on_is_an_error(examples):
    with pytest.raises(ValueError, match='no document can be trained on'):
        Loader(examples, row_length=32, batch=2)


def test_fingerprint_tells_data_and_settings_apart():
    examples = make_examples(20)
    base = Loader(examples, row_length=32, batch=4).fingerprint
    changed = [*examples[:-1], Example(examples[-1].prompt_ids, (*examples[-1].completion_ids[:-1], 98 - examples[-1].completion_ids[-1]))]
    shifted = [Example((), e.prompt_ids + e.completion_ids) for e in examples]
    others = [Loader(changed, row_length=32, batch=4), Loader(shifted, row_length=32, batch=4), Loader(examples, row_length=40, batch=4),
              Loader(examples, row_length=32, batch=5), Loader(examples, row_length=32, batch=4, seed=1)]
    prints = [loader.fingerprint for loader in others]
    assert base == Loader(examples, row_length=32, batch=4).fingerprint
    assert len({base, *prints}) == 6
