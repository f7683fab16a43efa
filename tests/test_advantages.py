"""Advantages: equal rewards are exactly zero, ungraded answers count for nobody, and each kind is its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedjax.rl.advantages import ADVANTAGES, group_advantages, overlong_penalty


@pytest.mark.parametrize('kind', ADVANTAGES)
@pytest.mark.parametrize('reward', [0.0, 0.1, 0.35, 1 / 3, 6.5 / 7, 1.0, -2.5e8])
@pytest.mark.parametrize('size', [2, 3, 7, 8, 16])
def test_equal_rewards_are_exactly_zero(kind, reward, size):
    assert not group_advantages([reward] * size, kind).any()
    assert not group_advantages([np.float32(reward)] * size, kind).any()


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=16), st.sampled_from(sorted(ADVANTAGES)))
def test_kinds_are_their_formulas_over_the_graded(rewards, kind):
    graded = np.array([r for r in rewards if r is not None])
    got = group_advantages(rewards, kind)
    if len(graded) < 2:
        assert got is None
        return
    assert np.isnan(got).tolist() == [r is None for r in rewards]
    values = got[~np.isnan(got)]
    centred = graded - np.sum(graded) / len(graded)
    want = {'mean': centred,
            'std': centred / (np.sqrt(np.sum(centred**2) / (len(graded) - 1)) + 1e-4),
            'loo': np.array([r - (np.sum(graded) - r) / (len(graded) - 1) for r in graded])}[kind]
    np.testing.assert_allclose(values, np.zeros_like(want) if graded.max() == graded.min() else want, atol=1e-6)
    assert np.isfinite(values).all()


def test_nearly_equal_rewards_are_small_under_the_floor():
    assert np.abs(group_advantages([1.0, 1.0 + 1e-9] * 4, 'std')).max() < 1e-4


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), '7', True, [1.0], np.array([0.5])])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match='a reward is'):
        group_advantages([0.5, bad, 0.1])


@pytest.mark.parametrize(('length', 'want'), [(0, 0), (80, 0), (90, -0.5), (100, -1), (120, -1)])
def test_the_overlong_penalty_is_linear_over_the_buffer(length, want):
    assert overlong_penalty(length, 100, 20) == pytest.approx(want)
    assert overlong_penalty(length, 100, 0) == 0
