"""Several processes as one run: how they join and end, and what they tell each other on the host, between the programs that they share."""

import asyncio
import contextlib
import pickle
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Item = TypeVar('Item')
Result = TypeVar('Result')
LEAST = 1 << 16  # bytes that are exchanged at least: a power of two each time, so that few programs are compiled

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost, and all others end


class Preempted(Exception):
    """The machine is about to be taken away; the run has been saved."""


def join() -> None:
    """Joins the other hosts of a TPU pod, or of a Slurm, Kubernetes or MPI job, as JAX finds them.

    If one of them is lost afterwards, the others end within two HEARTBEATs with a message that names it, rather than wait for it.
    """
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise ValueError(f'--distributed is for a TPU slice, a Slurm step or an MPI job, and this is none ({error}); '
                         'leave it out on a single host') from error


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function of the step that tells whether to save and end, since some process was sent SIGTERM: at the same step everywhere."""
    if jax.process_count() > 1:  # JAX's coordinator has taken the signal over
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are not this caller's business
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def exchange(value: Result) -> list[Result]:
    """What every process passed, in the order of processes. All must call it, and none goes on before all have.

    Values travel pickled: the processes of a run trust each other.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(max(LEAST, 1 << int(max(sizes) - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


async def exchanged(work: Awaitable[Result]) -> list[Result]:
    """What the work of every process comes to, in the order of processes; a RuntimeError of one is raised by all, which then can save."""
    if jax.process_count() == 1:
        return [await work]
    outcome: tuple[Result | None, RuntimeError | None]
    try:
        outcome = await work, None
    except RuntimeError as error:
        outcome = None, type(error)(f'process {jax.process_index()}: {error}')
    outcomes = await asyncio.to_thread(exchange, outcome)
    for _, failure in outcomes:
        if failure:
            raise failure
    return [result for result, _ in outcomes]  # type: ignore[misc]


async def divided(items: Sequence[Item], work: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> list[Result]:
    """What `work` makes of items, the same ones everywhere, of which each process works on its share."""
    count = jax.process_count()
    parts = await exchanged(work(items[jax.process_index() :: count]))
    return [parts[i % count][i // count] for i in range(len(items))]
