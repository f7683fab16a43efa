"""Requests that reach the engine together, in order: what it computes then depends on nothing else."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from qedjax.llm.client import gather
from qedjax.llm.local import LocalEndpoint

Result = TypeVar('Result')


async def all_at_once(endpoint: LocalEndpoint, works: Sequence[Coroutine[Any, Any, Result]], requests: int) -> Sequence[Result]:
    """What the works come to, which first ask the endpoint for so many completions in all; the engine waits until they have."""
    tasks = list[asyncio.Future[Result]]()
    try:
        async with endpoint.held():
            tasks += [asyncio.ensure_future(work) for work in works]
            while endpoint.queued < requests and not any(task.done() for task in tasks):
                await asyncio.sleep(0)
    except BaseException:  # given up before all had begun
        for work in works[len(tasks) :]:
            work.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return await gather(*tasks)
