"""The in-process endpoint: many callers, one engine; nobody waits for ever, whatever goes wrong."""

import asyncio
import dataclasses
import functools
import threading
import traceback

import jax
import numpy as np
import pytest

from qedjax.data.chat import prompt_ids, stop_ids
from qedjax.llm.client import EndpointError
from qedjax.llm.local import LocalEndpoint
from qedjax.model.transformer import Transformer
from qedjax.rollout.engine import Engine
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig, create, make_mesh, make_rollout_mesh
from qedjax.testing import tiny_config, tiny_tokenizer
from qedjax.types import Completion, SamplingParams

CONFIG = EngineConfig(slots=4, staged=4, max_length=160, cache_tokens=1280, page_size=16, steps=4, prefill_tokens=64, prefill_rows=(1,))
CHAT = [{'role': 'user', 'content': '1+1'}]


@functools.cache
def make_model(seed=0):
    return create(lambda: Transformer(tiny_config(init_std=0.1), jax.random.key(seed)), make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope='module')
def engine():
    return Engine(make_model(), make_rollout_mesh(), CONFIG, 300, tiny_tokenizer())


@pytest.fixture(autouse=True)
def _leaves_nothing(engine):
    """No thread and no request is left behind."""
    yield
    assert not [t for t in threading.enumerate() if t.name == 'engine']
    engine.step()
    assert engine.pending == 0


def run(engine, body):
    """Runs body(endpoint) to its end."""

    async def main():
        async with LocalEndpoint(engine) as endpoint:
            return await body(endpoint)

    return asyncio.run(asyncio.wait_for(main(), 120))


async def until_at_work(endpoint):
    """Returns when the engine has begun what was asked before; no clock decides."""
    await asyncio.sleep(0)
    stream = endpoint.stream([3], SamplingParams(1.0, 150))
    await anext(stream)
    await stream.aclose()


def test_many_callers_get_what_the_engine_gives(engine):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, rng.integers(1, 40)).tolist() for _ in range(64)]
    params = [SamplingParams(1.0, int(rng.integers(1, 20)), seed=i) for i in range(64)]
    want = engine.generate(prompts, params)

    async def body(endpoint):
        return await asyncio.gather(*(endpoint.complete(prompt, p) for prompt, p in zip(prompts, params, strict=True)))

    assert run(engine, body) == want


def test_messages_take_the_template_and_its_stop_ids(engine):
    ids = prompt_ids(engine.tokenizer, CHAT)
    stops = stop_ids(engine.tokenizer)
    force = SamplingParams(0.0, 9, logit_bias=((stops[0], 1e9),))

    async def body(endpoint):
        return [await endpoint.complete(CHAT, force), await endpoint.complete(ids, force),
                await endpoint.complete(CHAT, dataclasses.replace(force, stop_ids=(5,)))]

    chat, raw, own = run(engine, body)
    assert (chat.prompt_ids, chat.ids, chat.finish_reason, chat.text) == (ids, stops[:1], 'stop', '')
    assert (raw.prompt_ids, len(raw.ids), raw.finish_reason) == (ids, 9, 'length')
    assert len(own.ids) == 9


def test_streams_are_the_text(engine):
    params = SamplingParams(1.0, 60, seed=3)
    text = engine.generate([[1, 2]], [params])[0].text
    stop = next(text[i : i + 2] for i in range(15, len(text)) if '\ufffd' not in text[i : i + 2])

    async def body(endpoint):
        return [part async for part in endpoint.stream([1, 2], dataclasses.replace(params, stop=(stop,)))]

    *pieces, completion = run(engine, body)
    assert isinstance(completion, Completion)
    assert len(pieces) > 1
    assert ''.join(pieces) == completion.text == text[: text.index(stop)]


def test_a_stop_string_in_the_prompt_is_none_of_the_completion(engine):
    ids = engine.tokenizer.encode('STOP')

    async def body(endpoint):
        force = SamplingParams(0.0, 3, stop=('STOP', 'OP'), logit_bias=((ids[3], 1e9),))  # 'P' for ever
        return await endpoint.complete(ids, force), await endpoint.complete(ids[:3], force)

    assert [(c.text, c.finish_reason) for c in run(engine, body)] == [('PPP', 'length')] * 2


def test_a_cancelled_task_gives_up_its_request_alone(engine):
    async def body(endpoint):
        tasks = [asyncio.create_task(endpoint.complete([1, 2, i], SamplingParams(1.0, 150, seed=i))) for i in range(6)]
        await until_at_work(endpoint)
        tasks[0].cancel()
        tasks[3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        async for _ in endpoint.stream([1], SamplingParams(1.0, 150)):
            break  # a reader that leaves
        return results

    tokens = engine.stats.tokens
    results = run(engine, body)
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [i in (0, 3) for i in range(6)]
    assert all(len(r.ids) == 150 for i, r in enumerate(results) if i not in (0, 3))
    assert engine.stats.tokens - tokens < 7 * 150


def test_what_cannot_be_served_is_told_to_its_caller(engine):
    async def body(endpoint):
        with pytest.raises(ValueError, match='has 160 tokens'):
            await endpoint.complete([1] * 160, SamplingParams(max_tokens=1))
        with pytest.raises(ValueError, match='at least one'):
            await endpoint.complete([], SamplingParams(max_tokens=1))
        return await endpoint.complete([1], SamplingParams(max_tokens=3))

    assert len(run(engine, body).ids) == 3


def test_a_request_that_cannot_be_read_harms_nobody_else(engine):
    async def body(endpoint):
        good = asyncio.create_task(endpoint.complete([1, 2], SamplingParams(1.0, 40)))
        for prompt, changes in (([1], {'max_tokens': '5'}), ([1], {'stop': (5,)}), ([1], {'stop': 'ab'}), ([1, 2.5], {}), ('text', {})):
            with pytest.raises((TypeError, ValueError)):
                await endpoint.complete(prompt, dataclasses.replace(SamplingParams(max_tokens=2), **changes))
        return await good

    assert len(run(engine, body).ids) == 40


def test_ids_of_numpy_are_ids(engine):
    async def body(endpoint):
        return [await endpoint.complete(prompt, SamplingParams(0.0, 3)) for prompt in ((1, 2), np.array([1, 2]), list(np.array([1, 2])))]

    first, *others = run(engine, body)
    assert first.prompt_ids == (1, 2)
    assert others == [first, first]


def test_closing_ends_what_is_under_way_and_refuses_the_rest(engine):
    async def body(endpoint):
        task = asyncio.create_task(endpoint.complete([1, 2], SamplingParams(1.0, 150)))
        await until_at_work(endpoint)
        await endpoint.close()
        with pytest.raises(EndpointError, match='is closed'):
            await endpoint.complete([1], SamplingParams(max_tokens=1))
        with pytest.raises(EndpointError, match='is closed'):
            await endpoint.set_weights(None, 1)
        return await task

    assert run(engine, body).finish_reason == 'cancelled'


def test_text_held_back_is_streamed_when_the_endpoint_closes(engine):
    """The end of the text may be the beginning of a stop string until the request has ended."""
    ids = engine.tokenizer.encode('S')

    async def body(endpoint):
        stream = endpoint.stream(ids, SamplingParams(0.0, 150, stop=('S' * 100 + '!',), logit_bias=((ids[0], 1e9),)))
        parts = [await anext(stream)]  # 101 and more S: what is more than a stop string could hold
        await endpoint.close()
        return parts + [part async for part in stream]

    *pieces, completion = run(engine, body)
    assert completion.finish_reason == 'cancelled'
    assert ''.join(pieces) == completion.text == 'S' * len(completion.ids)


def test_extra_stop_ids_of_a_checkpoint_hold_for_messages(engine):
    async def main():
        async with LocalEndpoint(engine, stops=(7, 8)) as endpoint:
            return await endpoint.complete(CHAT, SamplingParams(0.0, 9, logit_bias=((8, 1e9),)))

    assert asyncio.run(main()).ids == (8,)


def test_new_weights_between_chunks(engine):
    old, new = make_model(0), make_model(1)

    async def body(endpoint):
        stream = endpoint.stream([1, 2], SamplingParams(1.0, 150))
        await anext(stream)
        await endpoint.set_weights(new, 5)
        *_, first = [part async for part in stream]
        second = await endpoint.complete([1, 2], SamplingParams(1.0, 5))
        await endpoint.set_weights(old, 0)
        return first, second

    first, second = run(engine, body)
    assert [version for version, _ in first.versions] == [0, 5]
    assert second.versions == ((5, 5),)


def test_new_weights_from_another_thread(engine):
    async def body(endpoint):
        await asyncio.to_thread(lambda: asyncio.run(endpoint.set_weights(make_model(0), 7)))
        completion = await endpoint.complete([1, 2], SamplingParams(1.0, 5))
        await endpoint.set_weights(make_model(0), 0)
        return completion

    assert run(engine, body).versions == ((7, 5),)


def test_weights_that_come_with_the_last_id_hold_nobody_up(engine):
    """The swap reads the chunk that ends the last request: its caller is told all the same. Swaps that are given up harm nobody."""
    weights = make_model(0)

    async def body(endpoint):
        for count in range(1, 9):
            task = asyncio.create_task(endpoint.complete([1, 2], SamplingParams(1.0, count)))
            await asyncio.sleep(0.002 * count)
            swap = asyncio.create_task(endpoint.set_weights(weights, 0))
            if count % 2:
                await asyncio.sleep(0)
                swap.cancel()
            assert len((await asyncio.wait_for(task, 30)).ids) == count
            await asyncio.gather(swap, return_exceptions=True)
        with pytest.raises(ValueError, match='of another model'):
            await endpoint.set_weights(jax.tree.map(lambda x: x[:1], weights), 1)
        return await endpoint.complete([1, 2], SamplingParams(1.0, 3))

    assert len(run(engine, body).ids) == 3


def test_a_failure_of_the_engine_reaches_everyone():
    """Weights that are gone: the step fails, every caller is told, and so are those who come later."""
    engine = Engine(make_model(), make_rollout_mesh(), CONFIG, 300, tiny_tokenizer())

    async def body(endpoint):
        tasks = [asyncio.create_task(endpoint.complete([1, i], SamplingParams(1.0, 100))) for i in range(3)]
        await until_at_work(endpoint)
        for leaf in jax.tree.leaves(engine._model):
            leaf.delete()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        later = await asyncio.gather(*(endpoint.complete([1], SamplingParams(max_tokens=1)) for _ in range(3)), return_exceptions=True)
        assert len({len(traceback.extract_tb(error.__traceback__)) for error in later}) == 1  # each has its own
        return results + later

    results = run(engine, body)
    assert all(isinstance(r, EndpointError) and 'deleted' in str(r) for r in results)
