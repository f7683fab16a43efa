"""The in-process endpoint: any number of asyncio callers, one engine, and one thread that owns it.

    callers (event loop) --commands--> queue --> thread: engine.submit / cancel / set_weights, engine.step --call_soon--> callers
"""

import asyncio
import concurrent.futures
import contextlib
import numbers
import operator
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from qedjax.data.chat import prompt_ids, stop_ids
from qedjax.llm.client import EndpointError, Prompt
from qedjax.model.transformer import Transformer
from qedjax.rollout.engine import Engine
from qedjax.rollout.requests import Request, check_request
from qedjax.types import Completion, SamplingParams


@dataclass(eq=False)
class _Call:
    """One call under way: where its text, and last its completion or its error, are put for the caller."""

    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[str | Completion | Exception] = field(default_factory=asyncio.Queue)
    request: Request | None = None

    def put(self, result: str | Completion | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)


@dataclass(frozen=True)
class _Command:
    """Something for the thread to do, and whom to tell if it fails or is never done."""

    run: Callable[[], Any]
    fail: Callable[[Exception], Any]


class LocalEndpoint:
    """A LanguageModel over an engine that has a tokenizer. Use it as an async context manager, or close it.

    Messages become ids by the tokenizer's chat template; then `stops` hold unless the request has its own. Token ids are continued as
    they are, with the request's stop ids alone.
    """

    def __init__(self, engine: Engine, stops: tuple[int, ...] = ()):
        """Takes the engine over: nobody else may call it until the endpoint is closed.

        `stops` are the ids that end an answer to messages (data.chat.stop_ids); without any, those that the tokenizer alone tells. Raises
        ValueError for an engine without a tokenizer.
        """
        if engine.tokenizer is None:
            raise ValueError('the engine has no tokenizer: give it one to serve text')
        self._engine, self._stop_ids = engine, stops or stop_ids(engine.tokenizer)
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._calls: dict[Request, _Call] = {}
        self._error: Exception | None = None
        self._lock = threading.Lock()  # between a command that arrives and the thread's end: none is left unanswered
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
        self._thread.start()

    async def complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        """See LanguageModel."""
        return [part async for part in self._results(prompt, params, streamed=False)][-1]

    def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[str | Completion]:
        """See LanguageModel."""
        return self._results(prompt, params, streamed=True)

    async def set_weights(self, model: Transformer, version: int, **options: bool) -> None:
        """Engine.set_weights between two chunks, from the loop of any thread; returns when the new weights are in place."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def command() -> None:
            if done.set_running_or_notify_cancel():  # a caller that gave up before does not get its weights
                self._engine.set_weights(model, version, **options)
                done.set_result(None)

        self._send(_Command(command, lambda error: None if done.cancelled() else done.set_exception(error)))
        await asyncio.wrap_future(done)

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Holds the engine between two chunks: its devices are free, and what is asked for meanwhile begins all at once, in order."""
        holding: concurrent.futures.Future[None] = concurrent.futures.Future()
        released = threading.Event()

        def command() -> None:
            if holding.set_running_or_notify_cancel():
                holding.set_result(None)
                released.wait()

        self._send(_Command(command, lambda error: None if holding.cancelled() else holding.set_exception(error)))
        try:
            await asyncio.wrap_future(holding)
            yield
        finally:
            released.set()

    @property
    def queued(self) -> int:
        """Calls that the engine has not looked at yet."""
        return self._commands.qsize()

    async def close(self) -> None:
        """Ends what is under way as cancelled, and the thread."""
        with self._lock:
            self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def _results(self, prompt: Prompt, params: SamplingParams, streamed: bool) -> AsyncIterator[Any]:
        ids, params = self._encode(prompt, params)
        call = _Call(asyncio.get_running_loop())

        def command() -> None:
            call.request = self._engine.submit(ids, params, call.put if streamed else None)
            self._calls[call.request] = call

        self._send(_Command(command, call.put))
        finished = False
        try:
            while not finished:
                result = await call.results.get()
                finished = not isinstance(result, str)
                if isinstance(result, EndpointError):  # one for all: raised itself, its traceback would grow with every caller
                    raise EndpointError(*result.args) from result.__cause__
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            if not finished:  # the caller has gone
                self._send(_Command(lambda: self._give_up(call), lambda error: None))

    def _encode(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """What the engine is asked. Raises here, in the caller, also on what cannot be read: in the thread it would end the endpoint."""
        if len(prompt) and isinstance(prompt[0], numbers.Integral):  # NumPy's too
            ids = [operator.index(i) for i in prompt]
        else:
            ids = list(prompt_ids(self._engine.tokenizer, prompt))  # type: ignore[arg-type]
            params = replace(params, stop_ids=params.stop_ids or self._stop_ids)
        check_request(ids, params, self._engine.limits)
        return ids, params

    def _give_up(self, call: _Call) -> None:
        if call.request is not None:
            self._calls.pop(call.request, None)
            self._engine.cancel(call.request)

    def _send(self, command: _Command) -> None:
        """Gives the thread a command, which fails with an EndpointError if the thread has ended before."""
        with self._lock:
            if self._error is None:
                self._commands.put(command)
                return
        command.fail(self._error)

    def _run(self) -> None:
        """The thread: commands between steps; waits where there is nothing to do."""
        end = EndpointError('the endpoint is closed')
        try:
            while True:
                while self._engine.idle or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        return self._cancel_all()
                    self._obey(command)
                self._deliver()
        except Exception as error:  # not an edge, but a thread's end: its callers, who wait, are the ones to tell
            end = EndpointError(f'the engine failed: {error!r}')
            end.__cause__ = error
        finally:
            self._finish(end)

    def _obey(self, command: _Command) -> None:
        try:  # what the engine refuses is its caller's business; anything else is the end of the thread too
            command.run()
        except Exception as error:
            command.fail(error)
            if not isinstance(error, ValueError):
                raise

    def _deliver(self) -> None:
        for request in self._engine.step():
            if (call := self._calls.pop(request, None)) and request.completion:
                call.put(request.completion)

    def _cancel_all(self) -> None:
        for request in self._calls:
            self._engine.cancel(request)
        self._deliver()

    def _finish(self, end: EndpointError) -> None:
        """Answers everyone who waits: with a completion where there is one (all if the endpoint was closed), or else with the error."""
        with self._lock:
            self._error = end
        for request, call in self._calls.items():
            call.put(end if request.completion is None else request.completion)
        self._calls.clear()
        while not self._commands.empty():
            if command := self._commands.get():
                command.fail(end)
