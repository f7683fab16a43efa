"""Draws are numbered, and each is made once: how several processes share them out, and what a checkpoint keeps of that.

    draw 0  1  2  3  4  5  6  7  8          process p of P takes every P-th new draw; they advance unevenly
    p=0  *     *     *     *     *          * begun
    p=1     *     .     .     .             . left: dealt anew, as soon as the processes have told each other where they are
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Told:
    """Where one process is.

    Attributes:
      draw: number behind the last new draw that it has begun, or that was dealt.
      new: its next new draw.
      again, left: what it was dealt and has not begun (see Draws).
      open: draws that it has begun and not settled.
    """

    draw: int
    new: int
    again: tuple[int, ...]
    left: tuple[int, ...]
    open: tuple[int, ...]


class Draws:
    """Those that one process makes: some that were begun before a restart, then some that were left, then new ones.

    Attributes:
      open: draws that have been begun here and neither trained nor dropped, also when collecting them failed.
    """

    def __init__(self, draw: int = 0, pending: Iterable[int] = (), left: Iterable[int] = (), process: int = 0, count: int = 1):
        """Goes on where a checkpoint was: at new draws from `draw` on, after those begun (`pending`) and passed by (`left`) before it."""
        self.open: set[int] = set()
        self._process, self._count, self._new = process, count, draw
        self._take(draw, pending, left)

    def next(self) -> tuple[int, bool]:
        """Begins a draw: its number, and whether it had been begun before a restart."""
        again = bool(self._again)
        if again or self._left:
            draw = (self._again or self._left).pop(0)
        else:
            draw, self._new = self._new, self._new + self._count
        self.open.add(draw)
        return draw, again

    def told(self) -> Told:
        """What the others must know."""
        draw = max(self._draw, self._new - self._count + 1)
        return Told(draw, self._new, tuple(self._again), tuple(self._left), tuple(self.open))

    def deal(self, told: Sequence[Told]) -> dict[str, Any]:
        """Deals anew what no process has begun, given what each has told; returns where they are, as a checkpoint keeps it."""
        draw = max(process.draw for process in told)
        again = [number for process in told for number in process.again]
        left = [number for process in told for number in (*process.left, *range(process.new, draw, self._count))]
        self._take(draw, again, left)
        return {'draw': draw, 'pending': sorted({*again, *(number for process in told for number in process.open)}), 'left': sorted(left)}

    def _take(self, draw: int, again: Iterable[int], left: Iterable[int]) -> None:
        mine = slice(self._process, None, self._count)
        self._draw, self._new = draw, draw + self._process
        self._again, self._left = sorted(again)[mine], sorted(left)[mine]
