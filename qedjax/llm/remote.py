"""A remote endpoint that speaks OpenAI's protocol: chat completions or responses, with retries, deadlines and a budget."""

import asyncio
import dataclasses
import datetime
import email.utils
import json
import os
import random
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai

from qedjax.llm.client import EndpointError, Prompt, RequestFailed
from qedjax.types import Completion, SamplingParams

APIS = ('chat', 'responses')
FATAL = (401, 403, 404)  # a wrong key, account, address or model: no request can succeed
RETRIED = (408, 409, 425, 429)  # and every 5xx
FINISH = {'stop': 'stop', 'length': 'length', 'completed': 'stop', 'max_output_tokens': 'length'}


@dataclasses.dataclass(unsafe_hash=True)
class RemoteConfig:
    """Where and how to call.

    Attributes:
      base_url: of the API, up to and with /v1.
      model: name there.
      api: 'chat' or 'responses'.
      key_variable: environment variable with the key; a server that wants none may have it unset.
      effort: reasoning effort; '' leaves it out.
      timeout: seconds a call; deadline: seconds a request with all its calls, from when its turn comes.
      attempts: calls a request at most; first_wait: seconds before the second, doubled each time, jittered; an answer's Retry-After
        counts instead, up to longest_wait. The defaults bear with a server that is away for about five minutes.
      concurrency: requests under way at a time.
      price_in, price_out: dollars a million tokens; budget: dollars after which this process makes no call, 0 is none.
    """

    base_url: str = ''
    model: str = ''
    api: str = 'chat'
    key_variable: str = 'OPENAI_API_KEY'
    effort: str = ''
    timeout: float = 900.0
    deadline: float = 3600.0
    attempts: int = 8
    first_wait: float = 2.0
    longest_wait: float = 120.0
    concurrency: int = 64
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float = 0.0


def validate(cfg: RemoteConfig) -> None:
    """Raises ValueError, in one sentence, for an endpoint that cannot be called."""
    if not cfg.base_url.startswith(('http://', 'https://')) or not cfg.model:
        raise ValueError(f'a remote endpoint needs base_url (http://HOST/v1) and model, not base_url={cfg.base_url!r}, model={cfg.model!r}')
    if cfg.api not in APIS:
        raise ValueError(f'api is {cfg.api!r}; choose one of {", ".join(APIS)}')
    for name in ('timeout', 'deadline', 'attempts', 'concurrency', 'longest_wait'):
        if not getattr(cfg, name) > 0:
            raise ValueError(f'{name} must be positive, not {getattr(cfg, name)}')
    if cfg.budget and not (cfg.price_in or cfg.price_out):
        raise ValueError(f'budget={cfg.budget} dollars needs price_in and price_out, dollars a million tokens')


@dataclasses.dataclass
class Usage:
    """Calls made, retries among them, tokens sent and received, and what they cost in dollars."""

    calls: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class _Again(Exception):
    """A call failed in a way that another may not; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class RemoteEndpoint:
    """A LanguageModel behind HTTP, for one event loop at a time. Messages only: token ids mean nothing to it."""

    def __init__(self, cfg: RemoteConfig):
        validate(cfg)
        self.cfg, self.usage = cfg, Usage()
        self._open: tuple[openai.AsyncOpenAI, asyncio.Semaphore] | None = None

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """See LanguageModel; raises RequestFailed when the attempts or the deadline are used up."""
        if not prompt or not isinstance(prompt[0], Mapping):
            raise ValueError('a remote endpoint takes messages, not token ids')
        client, gate = self._connection()
        try:
            async with gate, asyncio.timeout(self.cfg.deadline):  # in this order: waiting for our own turn is not the server's fault
                return await self._attempts(client, self._body(list(prompt), params))
        except TimeoutError as error:
            raise RequestFailed(f'{self.cfg.base_url} did not answer within the deadline of {self.cfg.deadline:g} s') from error

    async def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[str | Completion]:
        """The whole text at once, then the completion."""
        completion = await self.complete(prompt, params)
        yield completion.text
        yield completion

    def _connection(self) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        if self._open is None:  # made here and not before: both belong to the event loop that calls
            key = os.environ.get(self.cfg.key_variable) or 'none'
            client = openai.AsyncOpenAI(api_key=key, base_url=self.cfg.base_url, max_retries=0, timeout=self.cfg.timeout)
            self._open = client, asyncio.Semaphore(self.cfg.concurrency)
        return self._open

    async def close(self) -> None:
        """Closes the connections; a later call, in another event loop perhaps, makes new ones."""
        opened, self._open = self._open, None
        if opened:
            await opened[0].close()

    async def _attempts(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Completion:
        reason = ''
        for attempt in range(self.cfg.attempts):
            try:
                return await self._call(client, body)
            except _Again as again:
                reason = str(again)
                wait = self.cfg.first_wait * 2**attempt * random.uniform(0.5, 1.5) if again.wait is None else again.wait
            if attempt + 1 < self.cfg.attempts:
                self.usage.retries += 1
                await asyncio.sleep(min(wait, self.cfg.longest_wait))
        raise RequestFailed(f'{self.cfg.base_url} failed {self.cfg.attempts} times, at last: {reason}')

    async def _call(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> Completion:
        if self.cfg.budget and self.usage.cost >= self.cfg.budget:
            raise EndpointError(f'the budget of ${self.cfg.budget:g} for {self.cfg.base_url} is spent; raise it to go on')
        self.usage.calls += 1
        create = (client.responses if self.cfg.api == 'responses' else client.chat.completions).with_raw_response.create
        try:
            async with asyncio.timeout(self.cfg.timeout):  # the library's own counts from byte to byte
                response = await create(**body)
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        except (openai.APIConnectionError, TimeoutError) as error:
            raise _Again(f'{type(error).__name__}: {error}') from error
        try:
            return self._read(json.loads(response.http_response.content))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # of a reply that is not what the protocol says
            raise _Again(f'a reply that cannot be read ({type(error).__name__}: {error})') from error

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        status, said = error.status_code, str(error.message)[:200]
        if status in FATAL:
            return EndpointError(f'{self.cfg.base_url} refuses every call with {status}: {said}; check base_url, model and the key in '
                                 f'{self.cfg.key_variable}')
        if status in RETRIED or status >= 500:
            return _Again(f'{status}: {said}', retry_after(error.response.headers.get('retry-after')))
        return ValueError(f'{self.cfg.base_url} refuses this request with {status}: {said}')

    def _body(self, messages: list, params: SamplingParams) -> dict[str, Any]:
        """What is sent. Nothing that was not asked for: servers fill in nothing of ours either."""
        if params.min_p or params.min_tokens or params.logit_bias or params.stop_ids:
            raise ValueError('a remote endpoint offers no min_p, min_tokens, logit_bias or stop_ids')
        body: dict[str, Any] = {'model': self.cfg.model, 'temperature': params.temperature}
        if params.top_p < 1:
            body['top_p'] = params.top_p
        if params.top_k:
            body['extra_body'] = {'top_k': params.top_k}
        if self.cfg.api == 'responses':
            more: dict[str, Any] = {'input': messages, 'max_output_tokens': params.max_tokens,
                                    'reasoning': {'effort': self.cfg.effort} if self.cfg.effort else None}
        else:
            more = {'messages': messages, 'max_completion_tokens': params.max_tokens, 'reasoning_effort': self.cfg.effort,
                    'stop': list(params.stop)}
            body['seed'] = (params.seed + 1_000_003 * params.sample) % 2**31
        return body | {name: value for name, value in more.items() if value}

    def _read(self, content: Any) -> Completion:
        """The completion in a reply of either API; its text is what follows the reasoning, and may be empty."""
        if self.cfg.api == 'responses':
            parts = [part for item in content['output'] if item['type'] == 'message' for part in item['content']]
            text = ''.join(part['text'] for part in parts if part['type'] == 'output_text')
            reason = (content.get('incomplete_details') or {}).get('reason') or content['status']
            counts = 'input_tokens', 'output_tokens'
        else:
            choice = content['choices'][0]
            text, reason = choice['message'].get('content') or '', choice.get('finish_reason') or 'stop'
            counts = 'prompt_tokens', 'completion_tokens'
        if not isinstance(text, str):
            raise TypeError(f'content is {type(text).__name__}, not text')
        usage = content.get('usage') or {}
        read, written = (int(usage.get(name) or 0) for name in counts)
        self.usage.tokens_in += read
        self.usage.tokens_out += written
        self.usage.cost += (read * self.cfg.price_in + written * self.cfg.price_out) / 1e6
        text = text.encode('utf-8', 'replace').decode()  # half of a surrogate pair could never be written down
        return Completion(text, (), (), FINISH.get(reason, 'error'))


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date; None if there is none or it is neither."""
    if header is None:
        return None
    if re.fullmatch(r'\s*[0-9]+(\.[0-9]+)?\s*', header):
        return float(header)
    try:
        moment = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
