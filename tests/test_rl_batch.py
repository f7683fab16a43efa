"""Groups to packed rows: every number lies where its id is predicted, weights are the normaliser, and who counts is counted."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rl.batch import make_samples, pack, shaped_rewards, token_weights, varied
from qedjax.rl.losses import ObjectiveConfig
from qedjax.types import Completion, Group, Rollout

MOST = 20
DEFAULT = ObjectiveConfig()


def rollout(reward, length=5, reason='stop', version=0, first=0):
    ids = tuple(range(first, first + length))
    return Rollout(Completion('', ids, tuple(-0.1 * (i + 1) for i in ids), reason, (90, 91, 92), ((version, length),)), 'x', reward)


def group(*rollouts, draw=0):
    return Group(draw, 'p', rollouts)


def test_each_number_lies_where_its_id_is_predicted():
    samples = make_samples([group(rollout(1.0, 3), rollout(0.0, 4, first=10))], DEFAULT, MOST)
    batch, = pack(samples, 16, 1)
    order = [int(t) for t in batch.tokens[0] if t]
    for sample in samples:
        start = next(i for i in range(16) if tuple(batch.tokens[0, i : i + len(sample)]) == sample.prompt + sample.ids)
        seen = slice(start + 2, start + 2 + len(sample.ids))
        np.testing.assert_array_equal(batch.targets[0, seen], sample.ids)
        np.testing.assert_allclose(batch.logprobs[0, seen], sample.logprobs)
        np.testing.assert_allclose(batch.advantages[0, seen], sample.advantage)
        np.testing.assert_allclose(batch.weights[0, seen], 0.5)
    assert len(order) == 3 + 3 + 3 + 4 - 1  # id 0 is an id like any other
    assert np.count_nonzero(batch.weights) == 7


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, MOST), min_size=2, max_size=5), min_size=1, max_size=4))
def test_weights_are_their_definitions(lengths):
    answers, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    flat = [n for group in lengths for n in group]
    for name, total in (('samples', tokens / answers), ('tokens', 1.0), ('sequences', 1.0), ('constant', tokens / (answers * MOST)),
                        ('group', 1.0)):
        weights = [w for group in token_weights(lengths, name, MOST) for w in group]
        assert sum(w * n for w, n in zip(weights, flat, strict=True)) == pytest.approx(total)


def test_ungraded_answers_leave_the_baseline_and_the_loss():
    samples = make_samples([group(rollout(1.0), rollout(None), rollout(0.0)), group(rollout(None), rollout(1.0))], DEFAULT, MOST)
    assert [(s.advantage, s.weight) for s in samples] == [(0.5, 0.5), (-0.5, 0.5)]
    assert make_samples([group(rollout(None), rollout(None))], DEFAULT, MOST) == []
    assert pack([], 16, 2) == []


@pytest.mark.parametrize(('overlong', 'advantages'), [('zero', [0.5, -0.5]), ('mask', [0.5]), ('shaped', [1.0, -1.0])])
def test_answers_that_were_cut(overlong, advantages):
    cfg = ObjectiveConfig(overlong=overlong, overlong_buffer=10)
    cut = group(rollout(1.0), rollout(0.0, MOST, 'length'))
    samples = make_samples([cut], cfg, MOST)
    assert [s.advantage for s in samples] == advantages
    assert {s.weight for s in samples} == {0.5}  # a masked answer counts in the normaliser
    assert shaped_rewards(cut, cfg, MOST) == ([1.0, -1.0] if overlong == 'shaped' else [1.0, 0.0])


def test_groups_with_nothing_to_say():
    equal, one = group(rollout(0.35), rollout(0.35), rollout(None)), group(rollout(1.0), rollout(None))
    assert not varied(equal, DEFAULT, MOST)
    assert not varied(one, DEFAULT, MOST)
    assert varied(group(rollout(0.35), rollout(0.4)), DEFAULT, MOST)
    assert {s.advantage for s in make_samples([equal], DEFAULT, MOST)} == {0.0}
    assert make_samples([equal], ObjectiveConfig(zero_variance='drop'), MOST) == []


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, MOST), min_size=1, max_size=30), st.integers(1, 4))
def test_packing_loses_nothing(lengths, rows):
    samples = make_samples([group(*(rollout(float(i % 2), n) for i, n in enumerate([*lengths, 1])))], DEFAULT, MOST)
    batches = pack(samples, 32, rows)
    assert all(batch.tokens.shape == (rows, 32) for batch in batches)
    assert sum(np.count_nonzero(b.weights) for b in batches) == sum(len(s.ids) for s in samples)
    assert sum(b.logprobs.sum() for b in batches) == pytest.approx(sum(sum(s.logprobs) for s in samples), rel=1e-4)


def test_the_oldest_version_is_the_oldest_id_of_the_group():
    young, old = rollout(1.0, version=4), rollout(1.0, version=9)
    old = dataclasses.replace(old, completion=dataclasses.replace(old.completion, versions=((2, 1), (9, 4))))
    assert group(young, old).oldest_version == 2
