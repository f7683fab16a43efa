"""One request of the engine: what was asked, what has come so far, and whether it can be served at all."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from qedjax.rollout.text import TextStream
from qedjax.types import Completion, SamplingParams

MAX_BIAS = 1e30  # float32 still holds a logit beside it
MIN_TEMPERATURE = 1e-3  # far below it, logits / temperature overflow: a NaN, which arg-max would take for the best


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine can serve: positions a request, decodable ids, places for stop ids and biases, and positions that its cache holds."""

    max_length: int
    num_valid: int
    max_stop_ids: int
    max_bias: int
    cached: int


@dataclasses.dataclass(eq=False)
class Request:
    """A request in the engine. `completion` is None until it has ended; the other fields belong to the engine.

    Attributes:
      prompt: ids to continue.
      params: as they were given.
      limit: ids to draw at most.
      arrival: position in the order of service.
      expires: time.monotonic() at which it ends with what it has.
      on_text: called with newly released text.
      stream: released text and stop strings, for a request that asks for either.
    """

    prompt: np.ndarray
    params: SamplingParams
    limit: int
    arrival: int
    expires: float
    on_text: Callable[[str], Any] | None = None
    stream: TextStream | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
    versions: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    completion: Completion | None = None

    @property
    def length(self) -> int:
        """Ids of prompt and completion so far."""
        return len(self.prompt) + len(self.ids)

    def tokens(self) -> np.ndarray:
        """Ids of prompt and completion so far."""
        return np.concatenate([self.prompt, np.array(self.ids, np.int32)])

    def extend(self, version: int, ids: Sequence[int], logprobs: Sequence[float], entropies: Sequence[float] = (),
               tops: Sequence[tuple[tuple[int, float], ...]] = ()) -> str | None:
        """Takes in what was drawn under one version of the weights, up to whatever ends it; the reason if it has ended."""
        count, reason = next(((i, 'error') for i, token in enumerate(ids) if token < 0), (len(ids), None))
        stops = self.params.stop_ids
        if stop := next((i + 1 for i, token in enumerate(ids[:count]) if token in stops), None):
            count, reason = stop, 'stop'
        if self.stream is not None:
            text = ids[: count - 1] if reason == 'stop' else ids[:count]
            before = self.stream.count
            self._release(self.stream.push(text))
            if self.stream.stopped:
                count, reason = self.stream.count - before, 'stop'
        self.ids += ids[:count]
        self.logprobs += logprobs[:count]
        self.entropies += entropies[:count]
        self.top_logprobs += tops[:count]
        if count:
            last = self.versions.pop() if self.versions and self.versions[-1][0] == version else (version, 0)
            self.versions.append((version, last[1] + count))
        return reason or ('length' if len(self.ids) >= self.limit else None)

    def finish(self, reason: str, tokenizer: Any = None) -> None:
        """Ends the request with what it has; the tokenizer gives it its text."""
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.params.stop_ids else self.ids
        if self.stream is None:
            text = '' if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        else:
            self._release(self.stream.finish())
            text = self.stream.text
            if reason == 'length' and self.stream.stopped:  # by what was held back until now
                reason = 'stop'
        self.completion = Completion(text, tuple(self.ids), tuple(self.logprobs), reason, tuple(self.prompt.tolist()),
                                     tuple(self.versions), tuple(self.entropies), tuple(self.top_logprobs))

    def _release(self, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(text)


def check_request(prompt: Sequence[int], params: SamplingParams, limits: Limits, name: str = 'the prompt') -> None:
    """Raises ValueError, in one sentence that calls the prompt `name`, for a request that cannot be served; needs no model."""
    if wrong := _wrong_choice(params, limits) or _wrong_length(prompt, params, limits):
        raise ValueError(f'{name} {wrong}')


def _wrong_length(prompt: Sequence[int], params: SamplingParams, limits: Limits) -> str | None:
    if not len(prompt):
        return 'is empty: give it at least one token'
    if not 0 <= min(prompt) <= max(prompt) < limits.num_valid:
        return f'has ids outside [0, {limits.num_valid}), which the tokenizer cannot have made'
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if wanted < 1 or params.min_tokens < 0:
        return (f'asks for max_tokens={params.max_tokens} and min_tokens={params.min_tokens}; the first must be positive, the second not '
                'negative')
    if len(prompt) + wanted > limits.max_length:
        least = 'at least ' if params.max_tokens is None else ''
        return (f'has {len(prompt)} tokens and asks for {least}{wanted} more, but the model has {limits.max_length} positions; '
                'shorten either')
    if len(prompt) + wanted > limits.cached:
        return (f'may come to {len(prompt) + wanted} positions, but the cache of a shard holds {limits.cached}; lower max_tokens or raise '
                'cache_tokens')
    return None


def _wrong_choice(params: SamplingParams, limits: Limits) -> str | None:
    if params.temperature and not MIN_TEMPERATURE <= params.temperature < math.inf:  # NaN too
        return f'asks for temperature={params.temperature}; it must be 0 (greedy) or at least {MIN_TEMPERATURE}'
    if not (_whole(params.seed, params.sample, params.top_k, params.min_tokens, *params.stop_ids, *(i for i, _ in params.logit_bias))
            and (params.max_tokens is None or _whole(params.max_tokens))):
        return f'has a seed, sample, count or id that is no whole number: {params}'
    if not (0 <= params.seed < 2**32 and 0 <= params.sample < 2**31):
        return f'asks for seed={params.seed} and sample={params.sample}; they must be in [0, 2^32) and [0, 2^31)'
    if not (0 <= params.top_k < 2**31 and 0 <= params.top_p <= 1 and 0 <= params.min_p <= 1):
        return (f'asks for top_k={params.top_k}, top_p={params.top_p} and min_p={params.min_p}; the first must not be negative, the others '
                'lie in [0, 1]')
    if '' in params.stop:
        return 'asks for an empty stop string, which would end it at once; leave it out'
    ids = [*params.stop_ids, *(token for token, _ in params.logit_bias)]
    if any(not 0 <= token < limits.num_valid for token in ids):
        return f'names ids outside [0, {limits.num_valid}) in stop_ids or logit_bias'
    if len(params.stop_ids) > limits.max_stop_ids or len(params.logit_bias) > limits.max_bias:
        return (f'has {len(params.stop_ids)} stop ids and {len(params.logit_bias)} biases, but the engine has places for '
                f'{limits.max_stop_ids} and {limits.max_bias}; raise its max_stop_ids or max_bias')
    if not all(abs(bias) <= MAX_BIAS for _, bias in params.logit_bias):  # NaN too
        return f'has a bias beyond {MAX_BIAS:g}; 1e9 forces an id, -1e9 forbids it'
    if params.deadline is not None and not params.deadline > 0:
        return f'has a deadline of {params.deadline} seconds; it must be positive'
    return None


def _whole(*numbers: Any) -> bool:
    return all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers)
