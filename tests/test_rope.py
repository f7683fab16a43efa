"""Rotary frequencies against values computed by hand from the papers, and the rotation's own laws."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.model.config import RopeScaling
from qedjax.model.rope import apply_rope, rope_angles, rope_frequencies
from qedjax.testing import tiny_config

PAIRS = np.arange(64) / 64  # exponents of a head of 128


def frequencies(theta=1e6, **scaling):
    return rope_frequencies(tiny_config(head_dim=128, rope_theta=theta, rope_scaling=RopeScaling(**scaling)))


@pytest.mark.parametrize('theta', [1e4, 1e6, 5e6])
def test_frequencies_are_powers_of_theta(theta):
    inverse, factor = frequencies(theta)
    assert (inverse.dtype, inverse.shape, factor) == (np.float32, (64,), 1.0)
    np.testing.assert_allclose(inverse, theta**-PAIRS, rtol=2e-7)  # at most the last bits of float32


def test_linear_divides_every_frequency():
    np.testing.assert_array_equal(frequencies(kind='linear', factor=8.0)[0], frequencies()[0] / 8)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_ramps_between():
    inverse, factor = frequencies(kind='yarn', factor=4.0, original_positions=32_768)
    ratio = inverse / frequencies()[0]

    def pair(rotations):  # that turns this often over 32,768 positions
        return 64 * math.log(32_768 / (2 * math.pi * rotations)) / math.log(1e6)

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    assert (low, high) == (23, 40)
    np.testing.assert_allclose(ratio[: low + 1], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[high:], 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(ratio[low:high + 1], np.linspace(1, 1 / 4, high - low + 1), rtol=1e-5)
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_without_truncation_ramps_between_fractional_pairs():
    yarn = {'kind': 'yarn', 'factor': 4.0, 'original_positions': 32_768}
    rounded, exact = (frequencies(**yarn, truncate=truncate)[0] for truncate in (True, False))
    moved = np.flatnonzero(rounded != exact)
    assert moved.min() == 24
    assert moved.max() == 39


def test_yarn_attention_factor_is_taken_as_given():
    assert frequencies(kind='yarn', factor=4.0, original_positions=2048, attention_factor=0.7)[1] == 0.7
    assert frequencies(kind='yarn', factor=1.0, original_positions=2048)[1] == 1.0


def test_llama3_bands():
    """Llama 3.1: 8x, 8,192 positions, bands at 1 and 4 turns."""
    inverse, factor = frequencies(5e5, kind='llama3', factor=8.0, original_positions=8192)
    plain = frequencies(5e5)[0]
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(inverse[turns > 4], plain[turns > 4])
    np.testing.assert_array_equal(inverse[turns < 1], plain[turns < 1] / 8)
    middle = (turns >= 1) & (turns <= 4)
    assert middle.sum() == 6
    smooth = (turns[middle] - 1) / 3
    np.testing.assert_allclose(inverse[middle], plain[middle] * (smooth + (1 - smooth) / 8), rtol=1e-5)
    assert factor == 1.0


def test_angles_at_the_last_position_of_the_2507_models():
    """At 262,143 with theta 5e6 angles are exact but for the roundings of float32."""
    cfg = tiny_config(head_dim=128, rope_theta=5e6, max_positions=262_144)
    cos, sin = rope_angles(cfg, jnp.array([[0, 262_143]]))
    exact = 262_143 * 5e6**-PAIRS
    np.testing.assert_allclose(cos[0, 0], 1)
    np.testing.assert_allclose(sin[0, 0], 0)
    np.testing.assert_allclose(cos[0, 1], np.cos(exact), atol=0.05)
    np.testing.assert_allclose(cos[0, 1, 0], math.cos(262_143), atol=1e-6)  # one radian a position: no rounding at all
    np.testing.assert_allclose(sin[0, 1, 32:], np.sin(exact)[32:], atol=1e-4)  # slow pairs, which carry the distance


def rotated(x, position, cfg):
    x, angles = jnp.asarray(x, jnp.float32)[None, None, None], rope_angles(cfg, jnp.array([[position]]))
    return np.asarray(apply_rope(x, angles))[0, 0, 0]


def test_rotation_pairs_the_two_halves_of_a_head():
    cfg = tiny_config(head_dim=4, rope_theta=100.0)
    a, b, c, d = 1.0, 2.0, 3.0, 4.0
    (cos0, sin0), (cos1, sin1) = ((math.cos(t), math.sin(t)) for t in (3.0, 0.3))
    expected = [a * cos0 - c * sin0, b * cos1 - d * sin1, c * cos0 + a * sin0, d * cos1 + b * sin1]
    np.testing.assert_allclose(rotated([a, b, c, d], 3, cfg), expected, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 99))
def test_scores_depend_on_the_distance_only_and_lengths_are_kept(first, second, shift, seed):
    cfg = tiny_config(head_dim=16)
    q, k = np.random.default_rng(seed).standard_normal((2, 16))
    here, there = (rotated(q, first + s, cfg) @ rotated(k, second + s, cfg) for s in (0, shift))
    assert here == pytest.approx(there, abs=0.01)
    assert np.linalg.norm(rotated(q, first, cfg)) == pytest.approx(np.linalg.norm(q), rel=1e-5)


def test_rotation_is_float32_inside_and_keeps_the_dtype():
    cfg = dataclasses.replace(tiny_config(head_dim=8), rope_theta=1e4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 8)), jnp.bfloat16)
    angles = rope_angles(cfg, jnp.array([[1000, 4001]]))
    out = apply_rope(x, angles)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, apply_rope(x.astype(jnp.float32), angles).astype(jnp.bfloat16))
