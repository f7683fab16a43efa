"""The engine against the plain sampler: the same ids whatever slots, order, chunks, pages, meshes and neighbours; nothing is lost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qedjax.model.transformer import Transformer
from qedjax.rollout import static
from qedjax.rollout.engine import Engine, EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_config, tiny_tokenizer
from qedjax.train.lm_head import token_stats
from qedjax.types import SamplingParams

NUM_VALID, EOS = 300, 299
CFG = tiny_config(init_std=0.1)
SMALL = EngineConfig(slots=4, staged=4, max_length=160, cache_tokens=1280, page_size=16, steps=4, prefill_tokens=64, prefill_rows=(4, 1),
                     max_bias=2)


def make_model(seed=0, **changes):
    cfg = dataclasses.replace(CFG, **changes)
    return create(lambda: Transformer(cfg, jax.random.key(seed)), make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope='module')
def model():
    return make_model()


@pytest.fixture(scope='module')
def engine(model):
    """One engine for the tests that leave it as they found it."""
    return Engine(model, make_rollout_mesh(), dataclasses.replace(SMALL, entropy=True, top_logprobs=2), NUM_VALID, tiny_tokenizer())


@pytest.fixture(autouse=True)
def _leaves_nothing(request):
    """No test leaves a page, a member or a request behind in the shared engine."""
    yield
    if 'engine' in request.fixturenames:
        assert_idle(request.getfixturevalue('engine'))


def assert_idle(engine):
    engine.step()
    engine.step()
    scheduler = engine._scheduler
    assert engine.pending == 0
    assert not scheduler.prefixes
    assert not scheduler.member_of
    assert all(pool.free == scheduler.capacity for pool in scheduler.pools)


def workload(count, seed=0, longest=40, most=24):
    """Prompts of mixed lengths, half greedy and half sampled."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, NUM_VALID, rng.integers(1, longest)).tolist() for _ in range(count)]
    return prompts, [SamplingParams(i % 2, int(rng.integers(1, most)), seed=i) for i in range(count)]


@pytest.fixture(scope='module')
def expected(model):
    """The workload of 40 requests, and what the plain sampler draws for it: (ids, log-probs)."""
    prompts, params = workload(40)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        return prompts, params, static.generate(model, prompts, params, num_valid=NUM_VALID, batch=8)


def assert_as_expected(completions, expected, order=None):
    prompts, _, want = expected
    for i, got in zip(range(len(want)) if order is None else order, completions, strict=True):
        assert got.prompt_ids == tuple(prompts[i])
        assert got.ids == want[i][0]
        np.testing.assert_allclose(got.logprobs, want[i][1], atol=1e-5)


CONFIGS = {
    'one slot': ({'slots': 1, 'staged': 1, 'steps': 1}, (1, 1)),
    'many slots, long chunks': ({'slots': 16, 'staged': 0, 'steps': 32}, (1, 1)),
    'short of pages': ({'slots': 8, 'staged': 8, 'cache_tokens': 176, 'steps': 2, 'page_size': 4, 'max_length': 64}, (1, 1)),
    'tensor': ({}, (1, 2)), 'data and tensor': ({'prefill_tokens': 256, 'prefill_rows': (16, 1)}, (2, 2)),
}


@pytest.mark.parametrize('case', CONFIGS)
def test_streams_do_not_depend_on_the_engine(expected, case):
    """Slots, chunks, preemption, order and mesh change nothing; weights are a copy; nothing is compiled, and all pages come back."""
    changes, shape = CONFIGS[case]
    devices = jax.devices()[: shape[0] * shape[1]]
    trained = create(lambda: Transformer(CFG, jax.random.key(0)), make_mesh(MeshConfig(fsdp=shape[0], tensor=shape[1]), devices))
    engine = Engine(trained, make_rollout_mesh(*shape), dataclasses.replace(SMALL, **changes), NUM_VALID)
    for leaf in jax.tree.leaves(trained):
        leaf.delete()
    order = np.random.default_rng(1).permutation(40).tolist()
    completions = engine.generate([expected[0][i] for i in order], [expected[1][i] for i in order])
    assert_as_expected(completions, expected, order)
    assert (engine.stats.preemptions > 0) == (case == 'short of pages')
    assert engine.stats.tokens >= sum(len(c.ids) for c in completions)
    assert engine.stats.compilations == 0
    assert_idle(engine)


@pytest.mark.parametrize('shards', [1, 2])
def test_a_request_may_fill_a_single_page(model, shards):
    """Tables one page wide: what has a size of one still has its sharding."""
    config = dataclasses.replace(SMALL, max_length=16, cache_tokens=64 * shards)
    engine = Engine(model, make_rollout_mesh(shards, devices=jax.devices()[:shards]), config, NUM_VALID)
    (done,) = engine.generate([[1, 2, 3]], [SamplingParams(0.0, 13)])
    assert len(done.ids) == 13


def test_random_cancels_disturb_nobody(engine, expected):
    prompts, params, want = expected
    rng = np.random.default_rng(3)
    requests = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    while engine.pending:
        engine.step()
        if rng.random() < 0.5:
            engine.cancel(requests[rng.integers(len(requests))])
    cancelled = [r.completion.finish_reason == 'cancelled' for r in requests]
    assert 3 < sum(cancelled) < 37
    for request, (ids, logprobs, _), gone in zip(requests, want, cancelled, strict=True):
        count = len(request.completion.ids)
        assert request.completion.ids == ids[:count]
        np.testing.assert_allclose(request.completion.logprobs, logprobs[:count], atol=1e-5)
        assert gone or count == len(ids)


def test_samples_of_a_prompt_differ_and_share_its_prefill(engine):
    prompt = workload(1, seed=5)[0][0] * 3
    before = engine.stats.prefill_tokens
    got = engine.generate([prompt] * 16, [SamplingParams(1.0, 12, seed=9, sample=i) for i in range(16)])
    assert len({c.ids for c in got}) == 16
    assert engine.stats.prefill_tokens - before == len(prompt) - 1
    again = engine.generate([prompt] * 3, [SamplingParams(1.0, 12, seed=9, sample=i) for i in (11, 0, 4)])
    assert [c.ids for c in again] == [got[i].ids for i in (11, 0, 4)]


def test_stop_ids_min_tokens_and_bias(engine, expected):
    prompts, _, want = expected
    i = next(i for i, w in enumerate(want) if i % 2 == 0 and len(w[0]) > 6 and w[0][3] not in w[0][:3])
    stop = want[i][0][3]
    prompt, greedy = prompts[i], SamplingParams(0.0, 7, stop_ids=(EOS, stop))
    got = engine.generate([prompt] * 3, [greedy, dataclasses.replace(greedy, min_tokens=6),
                                         dataclasses.replace(greedy, logit_bias=((EOS, 1e9), (stop, -1e9)))])
    assert got[0].ids == want[i][0][:4]
    assert [c.finish_reason for c in got] == ['stop', got[1].finish_reason, 'stop']
    assert len(got[1].ids) >= 6
    assert stop not in got[1].ids[:6]
    assert got[2].ids == (EOS,)
    assert got[2].logprobs[0] < np.log(0.5)  # forced, yet its own probability is told


def test_stop_strings_streams_and_texts(engine):
    """Ids are kept up to the one that completed the stop; what is streamed is the text."""
    tokenizer = engine.tokenizer
    prompt, params = workload(1, seed=8)[0][0], SamplingParams(1.0, 60, seed=4)
    free, = engine.generate([prompt], [params])
    assert free.text == tokenizer.decode(free.ids, clean_up_tokenization_spaces=False)
    stop = next(free.text[i : i + 3] for i in range(20, len(free.text)) if '\ufffd' not in free.text[i : i + 3])
    pieces = []
    request = engine.submit(prompt, dataclasses.replace(params, stop=(stop, 'never there')), pieces.append)
    while engine.pending:
        engine.step()
    got = request.completion
    assert got.finish_reason == 'stop'
    assert ''.join(pieces) == got.text == free.text[: free.text.index(stop)]
    assert got.ids == free.ids[: len(got.ids)]
    assert len(got.logprobs) == len(got.ids) == len(got.entropies)
    assert stop in tokenizer.decode(got.ids)
    assert stop not in tokenizer.decode(got.ids[:-1])


def test_text_is_told_when_a_step_is_done(engine):
    """Whoever hears text may cancel, submit and raise: nobody loses an id, nothing is told twice, and what has ended is still reported."""
    prompts, params = workload(1, seed=8)[0] * 4, SamplingParams(1.0, 40, seed=4)
    want, heard, more = engine.generate(prompts[:1], [params])[0], [[] for _ in prompts], []

    def hear(i, text):
        heard[i].append(text)
        if len(heard[i]) == 3:
            if i == 0:
                engine.cancel(requests[0])
            elif i == 1:
                more.append(engine.submit(prompts[0], params))
            elif i == 2:
                raise RuntimeError('heard enough')

    requests = [engine.submit(prompt, params, functools.partial(hear, i)) for i, prompt in enumerate(prompts)]
    ended, raised = [], 0
    while not engine.idle:
        try:
            ended += engine.step()
        except RuntimeError:
            raised += 1
    assert raised == 1
    assert set(ended) == {*requests, *more}
    assert len(ended) == len(set(ended))
    for i, request in enumerate([*requests, *more]):
        assert request.completion.ids == want.ids[: len(request.completion.ids)]
        assert request.completion.finish_reason == ('cancelled' if i == 0 else 'length')
        assert (len(request.completion.ids) == 40) == (i > 0)
    for request, texts in zip(requests, heard, strict=True):
        assert ''.join(texts) == request.completion.text


def test_the_stop_id_has_no_text_and_spaces_stay(engine):
    tokenizer = engine.tokenizer
    ids = tokenizer.encode("a , b ' s do n't", add_special_tokens=False)
    tokenizer.clean_up_tokenization_spaces = True
    params = SamplingParams(0.0, 40, stop_ids=(EOS,))
    for drawn, text in (([*ids, EOS], "a , b ' s do n't"), (ids, "a , b ' s do n't")):
        request = engine.submit([1], params)
        request.extend(0, drawn, [0.0] * len(drawn))
        engine.cancel(request)
        assert (request.completion.text, request.completion.ids) == (text, tuple(drawn))
    tokenizer.clean_up_tokenization_spaces = False


def replay(model, completion, temperature, num_valid=NUM_VALID):
    """The trainer's statistics of each id of a completion: log-probs, entropies."""
    ids = np.zeros((1, 192), np.int32)
    ids[0, : len(completion.prompt_ids) + len(completion.ids)] = completion.prompt_ids + completion.ids
    seen = slice(len(completion.prompt_ids) - 1, len(completion.prompt_ids) + len(completion.ids) - 1)
    stats = trainer_stats(model, ids, temperature, num_valid)
    return np.asarray(stats.logprob)[0, seen], np.asarray(stats.entropy)[0, seen]


@jax.jit(static_argnums=(2, 3))
def trainer_stats(model, ids, temperature, num_valid):
    x = model(ids, jnp.arange(192)[None], jnp.ones_like(ids))
    return token_stats(x, model.head, jnp.roll(ids, -1, axis=1), num_valid=num_valid, temperature=temperature)


@pytest.mark.parametrize('temperature', [0.6, 0.8, 1.0, 1.3])
def test_logprobs_and_entropies_are_those_of_the_trainer(model, engine, temperature, mesh):
    prompts, _ = workload(24, seed=11)
    params = [SamplingParams(temperature, 110, seed=i, **({'top_k': 9} if i % 3 == 0 else {})) for i in range(24)]
    completions = engine.generate(prompts, params)
    assert sum(len(c.ids) for c in completions) >= 2500
    for completion in completions:
        logprobs, entropies = replay(model, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
        np.testing.assert_allclose(completion.entropies, entropies, atol=2e-5)
        for token, logprob, best in zip(completion.ids, completion.logprobs, completion.top_logprobs, strict=True):
            assert best[0][1] >= best[1][1] >= -np.inf
            assert logprob <= best[0][1] + 1e-6
            assert all(abs(logprob - other) < 1e-6 for i, other in best if i == token)


@pytest.mark.slow
def test_bfloat16_logprobs_stay_close_to_the_trainers(mesh):
    model = make_model(dtype='bfloat16', param_dtype='bfloat16', vocab_size=384, init_std=0.05)
    engine = Engine(model, make_rollout_mesh(), dataclasses.replace(SMALL, slots=16), NUM_VALID)
    prompts, _ = workload(100, seed=12)
    completions = engine.generate(prompts, [SamplingParams(0.8, 100, seed=i) for i in range(100)])
    assert sum(len(c.ids) for c in completions) == 10_000
    assert max(np.abs(c.logprobs - replay(model, c, 0.8)[0]).max() for c in completions) < 2e-2


def test_new_weights_in_flight(model, mesh):
    """Ids before the swap carry the old version and those after it the new; each log-prob is that of its weights on the cache it saw."""
    other = make_model(1)
    engine = Engine(model, make_rollout_mesh(), SMALL, NUM_VALID)
    prompts, _ = workload(6, seed=2)
    requests = [engine.submit(prompt, SamplingParams(1.0, 40, seed=i)) for i, prompt in enumerate(prompts)]
    for _ in range(5):
        engine.step()
    engine.set_weights(other, 7)
    while engine.pending:
        engine.step()
    mixed = [r.completion for r in requests]
    assert {version for c in mixed for version, _ in c.versions} == {0, 7}
    assert any(len(c.versions) == 2 for c in mixed)
    for completion in mixed:
        assert sum(count for _, count in completion.versions) == len(completion.ids)
        np.testing.assert_allclose(completion.logprobs, replay_mixed({0: model, 7: other}, completion), atol=1e-5)
    fresh = Engine(other, make_rollout_mesh(), SMALL, NUM_VALID).generate(prompts, [r.params for r in requests])
    again = engine.generate(prompts, [r.params for r in requests])
    assert [c.ids for c in again] == [c.ids for c in fresh]
    assert_idle(engine)


def replay_mixed(models, completion):
    """Log-probs by feeding ids one by one, each under the weights of its version; a prompt's ids are the first version's."""
    from qedjax.model.cache import PagedCache, row_table

    cache, table = PagedCache.create(CFG, 12, 16), row_table(1, 12)
    versions = [v for v, count in completion.versions for _ in range(count)]
    ids = completion.prompt_ids + completion.ids
    per_id = [versions[0]] * (len(completion.prompt_ids) - 1) + versions
    logprobs = []
    for position, version in enumerate(per_id):
        logits, cache = feed(models[version], np.array([[ids[position]]]), np.array([[position]]), cache, table)
        logprobs.append(jax.nn.log_softmax(logits[:NUM_VALID])[ids[position + 1]])
    return np.array(logprobs[len(completion.prompt_ids) - 1 :])


@jax.jit
def feed(model, token, position, cache, table):
    x, cache = model.decode(token, position, cache, table)
    return model.logits(x)[0, 0], cache


def test_refreshed_cache_is_that_of_the_new_weights(model, mesh):
    other = make_model(1)
    engine = Engine(model, make_rollout_mesh(), SMALL, NUM_VALID)
    prompts, _ = workload(6, seed=2)
    requests = [engine.submit(prompt, SamplingParams(1.0, 30, seed=i)) for i, prompt in enumerate(prompts)]
    for _ in range(4):
        engine.step()
    engine.set_weights(other, 1, refresh=True)
    while engine.pending:
        engine.step()
    for request in requests:
        completion, old = request.completion, sum(count for version, count in request.completion.versions if version == 0)
        want = np.concatenate([replay(m, completion, 1.0)[0][part] for m, part in ((model, slice(old)), (other, slice(old, None)))])
        np.testing.assert_allclose(completion.logprobs, want, atol=1e-5)
    assert_idle(engine)


def test_a_fault_ends_its_request_and_no_other(expected):
    """An id whose embedding is not a number: its request ends with an error, and its pages are clean for whoever gets them."""
    model = make_model(tie_embeddings=False)
    bad = 123
    table = np.array(model.embed[...])
    table[bad] = np.nan
    broken = jax.tree.map(lambda x: x, model)
    broken.embed[...] = jax.device_put(table, model.embed[...].sharding)
    engine = Engine(broken, make_rollout_mesh(), dataclasses.replace(SMALL, cache_tokens=320), NUM_VALID)
    prompts, params = workload(24, seed=6)
    prompts = [[t for t in prompt if t != bad] or [1] for prompt in prompts]
    params = [dataclasses.replace(p, logit_bias=((bad, -1e9),)) for p in params]
    want = Engine(model, make_rollout_mesh(), SMALL, NUM_VALID).generate(prompts, params)
    poisoned = [[*p[: len(p) // 2], bad, *p[len(p) // 2 :]] if i % 3 == 0 else p for i, p in enumerate(prompts)]
    got = engine.generate(poisoned, params)
    for i, (completion, clean) in enumerate(zip(got, want, strict=True)):
        if i % 3 == 0:
            assert (completion.finish_reason, completion.ids) == ('error', ())
        else:
            assert completion.ids == clean.ids
    assert_idle(engine)


def test_deadlines_and_order(engine):
    """A request out of time ends with what it has, waiting or running; the others are served in the order of arrival."""
    prompts, _ = workload(30, seed=13)
    late = engine.submit(prompts[0], SamplingParams(1.0, 100, deadline=1e-6))
    requests = [engine.submit(prompt, SamplingParams(1.0, 10, seed=1)) for prompt in prompts[1:]]
    ended = []
    while engine.pending:
        ended += engine.step()
    assert late.completion.finish_reason == 'deadline'
    places = [ended.index(request) for request in requests]
    assert all(abs(place - i) <= SMALL.slots + SMALL.staged for i, place in enumerate(places))


@pytest.mark.parametrize(('prompt', 'params', 'message'), [
    ([], SamplingParams(), 'the prompt is empty'),
    ([1] * 160, SamplingParams(max_tokens=None), 'has 160 tokens and asks for at least 1 more, but the model has 160 positions'),
    ([1] * 64, SamplingParams(max_tokens=10**9), 'asks for 1000000000 more'),
    ([1, 320], SamplingParams(), 'ids outside'),
    ([1], SamplingParams(seed=-1), 'seed=-1'), ([1], SamplingParams(seed=None), 'no whole number'),
    ([1], SamplingParams(max_tokens=2.5), 'no whole number'), ([1], SamplingParams(top_k=None), 'no whole number'),
    ([1], SamplingParams(seed=2**63), 'seed='), ([1], SamplingParams(top_p=1.5), 'top_p=1.5'),
    ([1], SamplingParams(top_k=-1), 'top_k=-1'), ([1], SamplingParams(min_p=float('nan')), 'min_p=nan'),
    ([1], SamplingParams(stop=('a', '')), 'empty stop string'), ([1], SamplingParams(stop_ids=(300,)), r'outside \[0, 300\) in stop_ids'),
    ([1], SamplingParams(logit_bias=((1, float('inf')),)), 'a bias beyond 1e'),
    ([1], SamplingParams(stop_ids=tuple(range(9))), '9 stop ids'),
    ([1], SamplingParams(deadline=0.0), 'deadline of 0.0'), ([1], SamplingParams(min_tokens=-1), 'min_tokens=-1')])
def test_requests_that_cannot_be_served_are_refused_and_others_go_on(engine, prompt, params, message):
    other = engine.submit([1, 2], SamplingParams(0.0, 3))
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, params)
    while engine.pending:
        engine.step()
    assert len(other.completion.ids) == 3


def test_a_prompt_one_short_of_the_limit_gets_its_one_token(engine):
    for length, count in ((159, 1), (150, 10)):
        completion, = engine.generate([[5] * length], [SamplingParams(0.0, None)])
        assert (len(completion.ids), completion.finish_reason) == (count, 'length')


@pytest.mark.parametrize(('changes', 'message'), [
    ({'slots': 0}, 'engine.slots must be at least 1'), ({'staged': -1}, 'engine.staged must not be negative'),
    ({'slots': 3}, 'must be multiples of the 2 data shards'), ({'max_length': 5000}, 'more than the 4096 positions'),
    ({'top_logprobs': 301}, 'more than the 300 ids'),
    ({'prefill_tokens': 42}, 'must be a multiple of every one'), ({'prefill_rows': (4, 2)}, 'must fall and end with 1')])
def test_sizes_that_do_not_fit_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, make_rollout_mesh(2, 1), dataclasses.replace(SMALL, **changes), NUM_VALID)


def test_a_request_that_no_shard_could_hold_is_refused(model):
    engine = Engine(model, make_rollout_mesh(2, 1), dataclasses.replace(SMALL, cache_tokens=128), NUM_VALID)
    with pytest.raises(ValueError, match='may come to 100 positions, but the cache of a shard holds 64'):
        engine.submit([1] * 90, SamplingParams(0.0, 10))
    got = engine.generate([[1] * 44] * 2, [SamplingParams(0.0, 20), SamplingParams(0.0, None, min_tokens=2**40)])
    assert [len(c.ids) for c in got] == [20, 20]  # what the cache leaves, where nothing else is said


@pytest.mark.slow
def test_heavy_traffic_compiles_nothing_and_leaks_nothing(model):
    """2,000 random requests, submitted while others run, with cancels and preemption."""
    config = dataclasses.replace(SMALL, slots=16, staged=16, cache_tokens=640)
    engine = Engine(model, make_rollout_mesh(), config, NUM_VALID, tiny_tokenizer())
    rng, requests, before = np.random.default_rng(0), [], None
    prompts, params = workload(2000, seed=21)
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        requests.append(engine.submit(prompt, dataclasses.replace(p, top_k=int(rng.integers(0, 5)), top_p=float(rng.choice([1.0, 0.9])),
                                                                  stop=('e',) if i % 5 == 0 else ())))
        if i % 7 == 0:
            engine.step()
        if i % 50 == 0:
            engine.cancel(requests[rng.integers(len(requests))])
        if i == 500:
            before = len(jax.live_arrays())
    while engine.pending:
        engine.step()
    assert all(r.completion is not None for r in requests)
    assert engine.stats.preemptions > 0
    assert engine.stats.compilations == 0
    assert_idle(engine)
    assert len(jax.live_arrays()) <= before + 2
