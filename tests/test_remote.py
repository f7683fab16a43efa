"""The remote endpoint against real HTTP servers that misbehave in every way that servers do."""

import asyncio
import dataclasses
import datetime
import email.utils
import time

import pytest

from qedjax.llm.client import EndpointError, RequestFailed
from qedjax.llm.remote import RemoteConfig, RemoteEndpoint, retry_after
from qedjax.testing import ScriptedServer, model_reply
from qedjax.types import SamplingParams

MESSAGES = [{'role': 'user', 'content': 'mark this'}]
QUICK = RemoteConfig('', 'judge', timeout=0.5, deadline=20.0, attempts=3, first_wait=0.01, longest_wait=0.3)


def ask(reply, count=1, params=None, messages=MESSAGES, **changes):
    """(completions or errors of `count` calls at once, the server, the endpoint's usage)."""
    with ScriptedServer(reply) as server:
        endpoint = RemoteEndpoint(dataclasses.replace(QUICK, base_url=server.base_url, **changes))

        async def main():
            calls = [endpoint.complete(messages, params or SamplingParams(0.5, 100)) for _ in range(count)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            await endpoint.close()
            return results

        return asyncio.run(main()), server, endpoint.usage


@pytest.mark.parametrize('api', ['chat', 'responses'])
def test_both_apis(api):
    (completion,), server, usage = ask(lambda *_: 'fine <score>7</score>', api=api, effort='medium', price_in=1.0, price_out=2.0)
    assert (completion.text, completion.finish_reason) == ('fine <score>7</score>', 'stop')
    wanted = {'chat': {'messages': MESSAGES, 'max_completion_tokens': 100, 'reasoning_effort': 'medium', 'seed': 0},
              'responses': {'input': MESSAGES, 'max_output_tokens': 100, 'reasoning': {'effort': 'medium'}}}
    assert server.calls == [{'model': 'judge', 'temperature': 0.5} | wanted[api]]
    assert (usage.calls, usage.tokens_in, usage.tokens_out, usage.cost) == (1, 10, 5, pytest.approx(20e-6))


FAULTS = {
    'busy': (429, {}, {'error': {'message': 'later'}}), 'down': (503, {}, {'error': {'message': 'down'}}), 'html': b'<html>gateway</html>',
    'half': b'{"choices": [{"mess', 'empty object': {}, 'no choices': {'choices': []}, 'hang': (2.0, 'late'),
    'cut': (200, {'content-length': '500'}, b'{"choices"'), 'list': b'[1, 2]', 'wrong content': model_reply(5), 'null': b'null'}


@pytest.mark.parametrize('fault', FAULTS)
def test_what_may_pass_is_tried_again(fault):
    (completion,), server, usage = ask(lambda number, _: FAULTS[fault] if number == 0 else 'good')
    assert completion.text == 'good'
    assert (len(server.calls), usage.retries) == (2, 1)


def test_what_does_not_pass_ends_the_request_alone():
    (error,), server, _ = ask(lambda *_: FAULTS['down'])
    assert isinstance(error, RequestFailed)
    assert 'failed 3 times' in str(error)
    assert '503' in str(error)
    assert len(server.calls) == 3


@pytest.mark.parametrize(('status', 'kind'), [(400, ValueError), (413, ValueError), (422, ValueError), (401, EndpointError),
                                              (403, EndpointError), (404, EndpointError)])
def test_refusals_are_never_repeated(status, kind):
    (error,), server, _ = ask(lambda *_: (status, {}, {'error': {'message': 'because'}}))
    assert isinstance(error, kind)
    assert 'because' in str(error)
    assert len(server.calls) == 1


def test_an_empty_answer_with_reasoning_alone_is_an_answer():
    reply = model_reply('')
    reply['choices'][0]['message'] = {'role': 'assistant', 'content': None, 'reasoning_content': 'long thoughts <score>7</score>'}
    reply['choices'][0]['finish_reason'] = 'length'
    (completion,), _, _ = ask(lambda *_: reply)
    assert (completion.text, completion.finish_reason) == ('', 'length')


def test_retry_after_is_heeded_up_to_the_cap():
    for header, least, most in (('0.2', 0.2, 2.0), ('86400', 0.3, 2.0), ('soon', 0.0, 2.0)):
        start = time.monotonic()
        ask(lambda number, _, header=header: (429, {'retry-after': header}, {}) if number == 0 else 'good')
        assert least <= time.monotonic() - start <= most + 1


def test_retry_after_in_all_its_forms():
    assert retry_after('3') == 3
    assert retry_after('1.5') == 1.5
    assert retry_after(None) is retry_after('abc') is retry_after('') is retry_after('-3') is None
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    assert 25 < retry_after(email.utils.format_datetime(soon, usegmt=True)) <= 30
    assert retry_after('Wed, 21 Oct 2015 07:28:00 GMT') == 0
    assert retry_after('Wed, 21 Oct 2015 07:28:00 -0000') == retry_after('Wed, 21 Oct 2015 07:28:00') == 0


def test_the_deadline_holds_for_all_attempts_together():
    start = time.monotonic()
    (error,), _, _ = ask(lambda *_: (1.0, 'late'), timeout=0.4, deadline=0.6, attempts=10)
    assert isinstance(error, RequestFailed)
    assert 'deadline of 0.6 s' in str(error)
    assert time.monotonic() - start < 5


def test_waiting_for_our_own_turn_is_no_fault_of_the_server():
    results, server, _ = ask(lambda *_: (0.2, 'good'), count=6, concurrency=1, deadline=0.7)
    assert [r.text for r in results] == ['good'] * 6
    assert len(server.calls) == 6


def test_half_a_surrogate_pair_can_be_written_down():
    (completion,), _, _ = ask(lambda *_: b'{"choices": [{"message": {"content": "a\\ud83d"}}]}')
    assert completion.text == 'a?'


def test_what_cannot_be_sent_is_refused_and_not_repeated():
    (error,), server, usage = ask(lambda *_: 'good', messages=[{'role': 'user', 'content': 'half of a pair: \ud800'}])
    assert isinstance(error, ValueError)
    assert (server.calls, usage.retries) == ([], 0)


def test_concurrency_is_bounded():
    import threading

    active, peak, lock = [0], [0], threading.Lock()

    def reply(*_):
        with lock:
            active[0] += 1
            peak[0] = max(peak[0], active[0])
        time.sleep(0.05)
        with lock:
            active[0] -= 1
        return 'good'

    results, _, _ = ask(reply, count=12, concurrency=3, timeout=5.0)
    assert [r.text for r in results] == ['good'] * 12
    assert peak[0] <= 3


def test_the_budget_ends_the_run():
    results, server, _ = ask(lambda *_: 'good', count=5, concurrency=1, price_out=1e6, budget=10.0)
    assert [getattr(r, 'text', type(r)) for r in results] == ['good', 'good'] + [EndpointError] * 3
    assert len(server.calls) == 2


def test_nobody_there():
    endpoint = RemoteEndpoint(dataclasses.replace(QUICK, base_url='http://127.0.0.1:9/v1'))

    async def main():
        with pytest.raises(RequestFailed, match='failed 3 times'):
            await endpoint.complete(MESSAGES, SamplingParams(0.5, 100))
        await endpoint.close()

    asyncio.run(main())


@pytest.mark.parametrize(('changes', 'message'), [
    ({'base_url': 'localhost:8000'}, 'needs base_url'), ({'model': ''}, 'and model'), ({'api': 'soap'}, "api is 'soap'"),
    ({'attempts': 0}, 'attempts must be positive'), ({'budget': 5.0}, 'needs price_in and price_out')])
def test_endpoints_that_cannot_be_called_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RemoteEndpoint(dataclasses.replace(QUICK, **({'base_url': 'http://x/v1'} | changes)))


def test_what_the_api_has_not_is_refused():
    for prompt, params in (([1, 2], SamplingParams()), ([], SamplingParams()), (MESSAGES, SamplingParams(min_p=0.1)),
                           (MESSAGES, SamplingParams(logit_bias=((1, 2.0),)))):
        with pytest.raises(ValueError, match='a remote endpoint'):
            asyncio.run(RemoteEndpoint(dataclasses.replace(QUICK, base_url='http://127.0.0.1:9/v1')).complete(prompt, params))
