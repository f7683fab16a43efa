"""One token: frequencies, thresholds, log-probs, and rows that know nothing of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rollout.sampling import Choice, _keep, sample, token_keys
from qedjax.sharding import make_rollout_mesh

V, NUM_VALID, DRAWS = 50, 47, 20_000
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 2
OPTIONS = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'banned': (), 'bias': ()}


def choice(rows):
    """A Choice of one row for each dictionary of options."""
    rows = [OPTIONS | row for row in rows]
    padded = [[*row['banned'], *[-1] * 3][:3] for row in rows]
    bias = [[*row['bias'], *[(-1, 0.0)] * 3][:3] for row in rows]
    column = {name: jnp.array([row[name] for row in rows], np.int32 if name == 'top_k' else np.float32)
              for name in ('temperature', 'top_k', 'top_p', 'min_p')}
    return Choice(**column, banned_ids=jnp.array(padded), bias_ids=jnp.array([[i for i, _ in row] for row in bias]),
                  bias=jnp.array([[b for _, b in row] for row in bias], np.float32))


@jax.jit
def draw(logits, keys, choice):
    return sample(logits, keys, choice, NUM_VALID, top=3, entropy=True)


def probabilities(logits, options):
    """The distribution of the choice, by sorting, in float64."""
    options = OPTIONS | options
    x = logits.astype(np.float64)[:NUM_VALID]
    for i, b in options['bias']:
        x[i] += b
    x = x / options['temperature']
    x[list(options['banned'])] = -np.inf
    if options['top_k']:
        x[x < np.sort(x)[::-1][min(options['top_k'], NUM_VALID) - 1]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if options['top_p'] < 1:
        order = np.argsort(-p, kind='stable')
        enough = np.cumsum(p[order]) >= options['top_p'] - 1e-12
        p[p < p[order][np.argmax(enough)]] = 0
    p[p < options['min_p'] * p.max()] = 0
    return np.pad(p / p.sum(), (0, V - NUM_VALID))


CASES = [{}, {'temperature': 0.6}, {'temperature': 1.7}, {'top_k': 5}, {'top_p': 0.8}, {'min_p': 0.2}, {'banned': (3, 11)},
         {'bias': ((4, 2.5), (9, -1.0))}, {'top_k': 12, 'top_p': 0.7, 'min_p': 0.1, 'temperature': 1.3, 'bias': ((2, 3.0),)},
         {'top_k': 1}, {'top_p': 0.0}, {'top_k': 1000, 'top_p': 1.0}]


@pytest.fixture(scope='module')
def counts():
    """Ids [cases, DRAWS] of every case, all in one batch a draw."""
    with jax.set_mesh(make_rollout_mesh()):
        keys = jax.random.split(jax.random.key(7), (DRAWS, len(CASES)))
        logits, options = jnp.broadcast_to(LOGITS, (len(CASES), V)), choice(CASES)
        ids = jax.jit(jax.vmap(lambda k: sample(logits, k, options, NUM_VALID).ids))(keys)
    return [np.bincount(column, minlength=V) for column in np.asarray(ids).T]


@pytest.mark.parametrize('case', range(len(CASES)), ids=str)
def test_frequencies_pass_a_chi_square_test(counts, case):
    want = probabilities(LOGITS, CASES[case]) * DRAWS
    assert counts[case][want == 0].sum() == 0
    likely = want > 5  # the statistic needs some counts in each cell: pool the others
    observed, expected = [np.append(x[likely], x[~likely].sum()) for x in (counts[case], want)]
    keep = expected > 0
    statistic, degrees = np.sum((observed - expected)[keep] ** 2 / expected[keep]), keep.sum() - 1
    assert statistic <= degrees + 4 * np.sqrt(2 * degrees) + 10 * (degrees > 0)  # far beyond p = 0.001 for every number of degrees


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([-3e38, -2.5, -1.0, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 7.0, float('-inf')]), min_size=V, max_size=V),
       st.integers(1, 60), st.floats(0.001, 0.999))
def test_thresholds_equal_sorting(values, k, p):
    """Ties of the last stay; equal floats, signed zeros and neighbours one bit apart are told apart rightly."""
    x = np.array(values, np.float32)[None]
    got = np.asarray(jitted_keep(x, np.ones_like(x), np.full(1, k, np.float32)))[0]
    if k <= V:
        threshold = np.sort(x[0])[::-1][k - 1]
        np.testing.assert_array_equal(got, x[0] >= threshold if threshold else (x[0] > 0) | _zeros(x[0], k))
    else:
        assert got.all()
    weights = np.full_like(x, 1 / 64)  # sums of these are exact
    got = np.asarray(jitted_keep(x, weights, np.full(1, p, np.float32)))[0]
    kept = min(int(np.ceil(p * 64)), V + 1)
    assert got.all() if kept > V else got.sum() >= kept
    assert got.sum() - (x[0] == np.where(got, x[0], np.inf).min())[got].sum() < kept


def _zeros(x, k):
    """Zeros that belong to the top k if +0 comes before -0, as it does in the order of bits."""
    positive = (x == 0) & ~np.signbit(x)
    return positive if (x > 0).sum() + positive.sum() >= k else x == 0


jitted_keep = jax.jit(_keep)


def test_options_bear_on_the_choice_alone():
    """Log-probs, entropies and top ids are of the whole distribution whatever the options; a plain row ignores its neighbours' bits."""
    keys = jax.random.split(jax.random.key(1), 4)
    rows = [{'temperature': 0.7}] * 4
    odd = [{'temperature': 0.7, 'top_k': 2, 'bias': ((5, 1e9),)}, rows[0], {'temperature': 0.7, 'top_p': 0.1, 'banned': (1,)},
           {'temperature': 0.0}]
    logits = np.random.default_rng(2).normal(size=(4, V)).astype(np.float32)
    with jax.set_mesh(make_rollout_mesh()):
        plain, mixed = draw(logits, keys, choice(rows)), draw(logits, keys, choice(odd))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(mixed), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    scaled = logits[:, :NUM_VALID].astype(np.float64) / np.array([0.7, 0.7, 0.7, 1.0])[:, None]
    table = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    assert mixed.ids[0] == 5
    assert mixed.ids[3] == logits[3, :NUM_VALID].argmax()
    np.testing.assert_allclose(mixed.logprobs, table[np.arange(4), mixed.ids], atol=1e-5)
    np.testing.assert_allclose(mixed.entropies, -(np.exp(table) * table).sum(1), atol=1e-5)
    np.testing.assert_array_equal(mixed.top_ids, np.argsort(-table, axis=1)[:, :3])
    np.testing.assert_allclose(mixed.top_logprobs, -np.sort(-table, axis=1)[:, :3], atol=1e-5)


@pytest.mark.parametrize('options', [{}, {'temperature': 0.0}, {'top_k': 3}, {'top_p': 0.5}, {'min_p': 0.3}, {'banned': (1,)}])
def test_what_is_not_finite_is_never_a_token(options):
    logits = np.zeros((5, V), np.float32)
    logits[0, 3], logits[1], logits[2, 4], logits[3] = np.nan, -np.inf, np.inf, np.nan
    logits[:, NUM_VALID:] = np.nan  # rows without a token are never looked at
    with jax.set_mesh(make_rollout_mesh()):
        got = draw(logits, jax.random.split(jax.random.key(0), 5), choice([options] * 5))
    np.testing.assert_array_equal(np.asarray(got.ids)[:4], -1)
    assert np.isnan(got.logprobs[:4]).all()
    assert 0 <= got.ids[4] < NUM_VALID
    np.testing.assert_allclose(got.logprobs[4], -np.log(NUM_VALID), rtol=1e-6)


def test_nothing_left_to_choose_is_an_error_and_forcing_works_at_any_temperature():
    logits = np.zeros((3, 2), np.float32)
    with jax.set_mesh(make_rollout_mesh()):
        got = sample(logits, jax.random.split(jax.random.key(0), 3), choice(
            [{'banned': (0, 1)}, {'temperature': 1e-3, 'bias': ((1, 1e9),)}, {'temperature': 5.0, 'bias': ((1, -1e9),)}]), 2)
    np.testing.assert_array_equal(got.ids, [-1, 1, 0])
    np.testing.assert_allclose(got.logprobs[1:], np.log(0.5), rtol=1e-6)


def test_keys_are_functions_of_seed_sample_and_position():
    def bits(*args):
        return tuple(np.asarray(jax.random.key_data(token_keys(*(np.array([a]) for a in args))))[0].tolist())

    cases = [(np.uint32(s), n, p) for s in (0, 1, 2**32 - 1) for n in (0, 1, 5) for p in (0, 1, 49_151)]
    assert len({bits(*case) for case in cases}) == len(cases)
    assert bits(*cases[4]) == bits(*cases[4])


@pytest.mark.parametrize('shape', [(1, 2), (2, 2)])
def test_every_mesh_draws_the_same(shape):
    logits, keys = np.random.default_rng(3).normal(size=(4, V)).astype(np.float32), jax.random.split(jax.random.key(5), 4)
    options = choice([{}, {'top_k': 4}, {'temperature': 0.0}, {'top_p': 0.6, 'bias': ((1, 2.0),)}])
    with jax.set_mesh(make_rollout_mesh()):
        want = draw(logits, keys, options)
    with jax.set_mesh(make_rollout_mesh(*shape)):
        rows = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.P('data')), (logits, options))
        got = draw(rows[0], jax.random.wrap_key_data(jax.device_put(jax.random.key_data(keys), jax.P('data'))), rows[1])
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-6)


def test_a_choice_by_temperature_alone():
    logits, keys = np.random.default_rng(3).normal(size=(2, V)).astype(np.float32), jax.random.split(jax.random.key(5), 2)
    with jax.set_mesh(make_rollout_mesh()):
        want = draw(logits, keys, choice([{'temperature': 0.5}, {'temperature': 0.0}]))
        got = sample(logits, keys, Choice(jnp.array([0.5, 0.0])), NUM_VALID)
    np.testing.assert_array_equal(got.ids, want.ids)
