"""Several processes as one run: how they join and end, and what they tell each other on the host, between the programs that they share."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import pickle
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src import distributed  # see _Board
from jax.experimental import multihost_utils

Item = TypeVar('Item')
Result = TypeVar('Result')
PIECE = 1 << 20  # bytes of each process that are exchanged at a time: one program for all, which takes little of a device's memory
POLL = 0.25  # seconds between two looks at what the other processes have noted
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost, and all others end


class Preempted(Exception):
    """The machine is about to be taken away; the run has been saved."""


FAILURES = (RuntimeError, ValueError, OSError, Preempted)  # of one process that all then raise, so that all can save and end alike


class Lost(Exception):
    """The first process of the run, which the others hear of each other through, is gone: nothing can be done together any more."""


def join() -> None:
    """Joins the other hosts of a TPU pod, or of a Slurm, Kubernetes or MPI job, as JAX finds them.

    If one of them is lost afterwards, the others end within two HEARTBEATs with a message that names it, rather than wait for it.
    """
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise ValueError(f'--distributed is for a TPU slice, a Slurm step or an MPI job, and this is none ({error}); '
                         'leave it out on a single host') from error
    logging.info('process %d of %d; the first one, which the others cannot do without, is at %s', jax.process_index(), jax.process_count(),
                 distributed.global_state.coordinator_address)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function of the step that tells whether to save and end, since some process was sent SIGTERM: at the same step everywhere."""
    if jax.process_count() > 1:  # JAX's coordinator has taken the signal over
        yield multihost_utils.reached_preemption_sync_point
        return
    with _sigterm() as told:
        yield lambda step: told.is_set()


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Set when this process is sent SIGTERM, which does nothing else."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are not this caller's business
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: the handler was no Python function, but JAX's


def exchange(value: Result) -> list[Result]:
    """What every process passed, in the order of processes. All must call it, and none goes on before all have.

    Values travel pickled: the processes of a run trust each other.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(-(-int(max(sizes)) // PIECE) * PIECE, np.uint8)
    padded[: len(data)] = data
    rows = np.concatenate([multihost_utils.process_allgather(piece) for piece in padded.reshape(-1, PIECE)], axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Note:
    """What a process lets the others know at any time.

    Attributes:
      number: of the exchange that it works towards.
      done: whether it has done its work for that one.
      counts: how far it is with that.
      stop: whether it was sent SIGTERM.
    """

    number: int = 0
    done: bool = False
    counts: tuple[int, ...] = ()
    stop: bool = False


class _Board:
    """The notes of all processes, kept by JAX's coordinator: whoever reads or writes there waits for nobody.

    JAX offers nothing public of the kind: what it does offer runs on the devices, and these should go on working meanwhile.
    """

    _made = itertools.count()  # runs in one process after another have boards of their own: all processes make the same ones

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client
        self._folder, self._written = f'qedjax/notes/{next(self._made)}', _Note(-1)

    def swap(self, note: _Note) -> list[_Note]:
        """Leaves the note of this process and reads those of all that have left one."""
        try:
            if note != self._written:
                text = json.dumps(dataclasses.asdict(note))
                self._client.key_value_set(f'{self._folder}/{jax.process_index()}', text, allow_overwrite=True)
                self._written = note
            rows = [json.loads(text) for _, text in self._client.key_value_dir_get(self._folder)]
        except jax.errors.JaxRuntimeError as error:  # no RuntimeError: those who save after one would wait forever
            raise Lost(f'the coordinator of this run, its first process, does not answer: {error}') from error
        return [_Note(**row | {'counts': tuple(row['counts'])}) for row in rows]


class Crew:
    """The processes of a run while they work, each by itself: how they meet, and hear of SIGTERM before the work is done.

    Who has done its share first tells so on the board and goes on with whatever else it has under way. Only when all have does anything
    that all must run together reach their devices, so no device ever waits for another process's work.

    Attributes:
      process, count: number of this one, and of all.
      hold: a context in which nothing else is put on this process's devices. Two threads, one with a program of all processes and one
        with its own, could queue them in one order on one device and in the other on the next, where both would wait forever.
    """

    def __init__(self, told: threading.Event | None = None):
        """`told` is set when this process is sent SIGTERM."""
        self.hold: Callable[[], contextlib.AbstractAsyncContextManager[Any]] = contextlib.nullcontext
        self.process, self.count = jax.process_index(), jax.process_count()
        self._told, self._note = told or threading.Event(), _Note()
        self._board, self._lock = _Board() if self.count > 1 else None, threading.Lock()

    async def exchange(self, value: Result) -> list[Result]:
        """As `exchange`, for processes that come to it at about the same time."""
        async with self.held():
            return await asyncio.to_thread(exchange, value) if self._board else [value]

    async def exchanged(self, work: Awaitable[Result]) -> list[Result]:
        """What the work of every process comes to, in the order of processes.

        What one fails with, if it is of FAILURES, is raised by all, which then can save. So is Preempted, when one was sent SIGTERM: work
        that is not done by then is cancelled.
        """
        self._note = _Note(self._note.number + 1)
        if self._board is None:
            return [await self._heeding(work)]
        outcome: tuple[Result | None, Exception | None]
        try:
            outcome = await self._heeding(work), None
        except FAILURES as error:
            kind = type(error) if isinstance(error, RuntimeError | Preempted) else ValueError  # others are not all made of one text
            outcome = None, kind(f'process {self.process}: {error}')
        self._note = dataclasses.replace(self._note, done=True)
        while sum(note.done for note in await self._here()) < self.count:
            await asyncio.sleep(POLL)
        outcomes = await self.exchange(outcome)
        for _, failure in outcomes:
            if failure:
                raise failure
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def made(self, make: Callable[[], Result]) -> Result:
        """What `make` returns here, once all have made theirs; what it fails with in one process is raised by all."""
        if self.count == 1:
            return make()
        here: list[Result] = []

        async def work() -> None:
            here.append(make())

        asyncio.run(self.exchanged(work()))
        return here[0]

    async def divided(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> list[Result]:
        """What `work` makes of items, the same ones everywhere, of which each process works on its share."""
        parts = await self.exchanged(work(items[self.process :: self.count]))
        return [parts[i % self.count][i // self.count] for i in range(len(items))]

    async def totals(self, *counts: int) -> tuple[int, ...] | None:
        """For work that is done when all together are far enough: the sums of what they count, or None once one of them has ended."""
        self._note = dataclasses.replace(self._note, counts=counts)
        notes = await self._here()
        if any(note.done for note in notes):
            return None
        return tuple(map(sum, zip(*(note.counts for note in notes if note.counts), strict=True)))

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Around what all processes run together, if there are several."""
        async with contextlib.AsyncExitStack() as stack:
            if self._board:
                with contextlib.suppress(RuntimeError):  # an engine that failed puts nothing on devices, and the others must hear of it
                    await stack.enter_async_context(self.hold())
            yield

    async def _heeding(self, work: Awaitable[Result]) -> Result:
        """What `work` comes to; Preempted, once some process was sent SIGTERM."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if any(note.stop for note in await self._notes()):
                    raise Preempted
                await asyncio.wait([task], timeout=POLL)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _here(self) -> list[_Note]:
        """Notes of the processes that are at the same exchange."""
        return [note for note in await self._notes() if note.number == self._note.number]

    async def _notes(self) -> list[_Note]:
        self._note = dataclasses.replace(self._note, stop=self._told.is_set())
        return await asyncio.to_thread(self._swap) if self._board else [self._note]

    def _swap(self) -> list[_Note]:
        assert self._board
        with self._lock:  # and the note as it is now: a thread whose caller has gone must not put an older one over it
            return self._board.swap(self._note)


@contextlib.contextmanager
def at_work() -> Iterator[Crew]:
    """The crew of a run, which hears of SIGTERM while this lasts."""
    with _sigterm() as told:  # in several processes this takes the signal over from JAX, whose notice is bound to steps
        yield Crew(told)
