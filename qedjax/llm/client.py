"""The protocol that every language-model endpoint speaks: the local engine, our server and a remote API are interchangeable."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from qedjax.types import Completion, Message, SamplingParams

Prompt = Sequence[Message] | Sequence[int]  # chat messages, or the token ids to continue, which nobody touches


class EndpointError(RuntimeError):
    """The endpoint cannot serve any more, whatever is asked of it. A request that it refuses is a ValueError instead."""


class RequestFailed(RuntimeError):
    """This request got no answer, however often it was tried; others may."""


class LanguageModel(Protocol):
    """An endpoint. Any number of calls may be under way; cancelling one (asyncio) gives up its request and no other."""

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """The completion of a prompt.

        Raises ValueError for a request that cannot be served, RequestFailed if it got no answer, EndpointError if nothing can be served.
        """
        ...

    def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[str | Completion]:
        """Text as it comes, never half a character and never part of a stop string; last the whole completion."""
        ...

    async def close(self) -> None:
        """Ends what is under way and gives back what the endpoint holds."""
        ...


async def gather(*awaitables) -> Sequence:
    """Their results; when one fails, the others are cancelled before its error is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
