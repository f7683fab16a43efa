"""Text of a completion as its ids come: characters are never split, and what may become a stop string is held back."""

import codecs
import functools
from collections.abc import Mapping, Sequence
from typing import Any

UNFINISHED = '\ufffd'  # how a tokenizer shows bytes that are not a character, or not yet
CHARACTER = 4  # most bytes of one, and so most ids


class TextStream:
    """Text of one completion. With all ids pushed, the text is decode(ids), cut before the stop string that was completed first.

    Attributes:
      stopped: whether a stop string has come; nothing is taken in after it.
      count: ids taken in, the one that completed the stop string included.
      text: everything released so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """Raises ValueError for a stop string that is empty or no text."""
        if isinstance(stop, str) or not all(isinstance(s, str) for s in stop):
            raise ValueError(f'stop={stop!r} is no list of strings; give one, of a single string too')
        if '' in stop:
            raise ValueError('a stop string is empty: it would end every completion at once; leave it out')
        self._tokenizer, self._stop, self._bytes = tokenizer, tuple(stop), byte_ids(tokenizer)
        self._longest = max(map(len, stop), default=1)
        self._ids: list[int] = []
        # Text of ids before _done has been taken in; ids from _context on are decoded again with new ones, because what a tokenizer
        # writes for an id may depend on the one before it. Both move, so the cost of an id does not grow with the completion.
        self._context = self._done = 0
        self._run: _ByteRun | None = None
        self._held, self._released = '', list[str]()
        self.stopped = False

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def text(self) -> str:
        return ''.join(self._released)

    def push(self, ids: Sequence[int]) -> str:
        """Takes in ids up to the one that completes a stop string, and returns the text that they release."""
        before = len(self._released)
        for part in [[i] for i in ids] if self._stop else [list(ids)]:
            if part and not self.stopped:
                self._ids += part
                self._follow_run(part)
                self._take(self._new_text(last=self._run is not None and self._run.text.endswith(self._stop)))
        return ''.join(self._released[before:])

    def finish(self) -> str:
        """Releases what is held back: no more ids will come."""
        before = len(self._released)
        if not self.stopped:
            self._take(self._new_text(last=True))
        if not self.stopped:
            self._release(len(self._held))
        return ''.join(self._released[before:])

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _follow_run(self, ids: Sequence[int]) -> None:
        for i in ids:
            if i not in self._bytes:
                self._run = None
                continue
            self._run = self._run or _ByteRun(self._held)
            self._run.add(self._bytes[i], self._longest)

    def _new_text(self, last: bool) -> str:
        """Text that no later id can change; all that there is if `last`, or if a stop string is in it."""
        end = len(self._ids) - (0 if last or self._run is None else self._run.length)
        if end == self._done:
            return ''
        window, before = self._decode(self._context, end), len(self._decode(self._context, self._done))
        text = window[before:]
        if last or not text.endswith(UNFINISHED) or self._first_stop(text.rstrip(UNFINISHED)):
            self._context, self._done = self._done, end
            return text
        # Bytes that are no character: what comes before the last few is settled if it is the same decoded apart.
        split = end - CHARACTER
        if split <= self._done or (head := self._decode(self._context, split)) + self._decode(split, end) != window:
            return ''
        self._context = self._done = split
        return head[before:]

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """End and start, in the text held and this, of the stop string that is completed first; of several, the longest."""
        text = self._held + text
        return min(((start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0), default=None)

    def _take(self, text: str) -> None:
        found, self._held = self._first_stop(text), self._held + text
        if found:
            self._release(found[1])
            self.stopped = True
            return
        keep = next((n for n in range(min(self._longest - 1, len(self._held)), 0, -1)
                     if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
        self._release(len(self._held) - keep)

    def _release(self, count: int) -> None:
        if count:
            self._released.append(self._held[:count])
            self._held = self._held[count:]


@functools.lru_cache(maxsize=16)
def byte_ids(tokenizer: Any) -> Mapping[int, int]:
    """Bytes by id, for a tokenizer that spells what it has no piece for in ids of one byte each (sentencepiece); else nothing."""
    names = [f'<0x{byte:02X}>' for byte in range(256)]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    there = {name: i for name, i in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == name}
    return {i: int(name[3:5], 16) for name, i in there.items() if tokenizer.decode([i]) != name}


class _ByteRun:
    """Byte ids at the end of a completion. Any later one can turn the text of all of them into UNFINISHED, so it has to wait.

    Attributes:
      length: how many.
      text: the last characters that they spell so far, after those held before; empty once they are no UTF-8.
    """

    def __init__(self, before: str):
        self.length, self.text = 0, before
        self._decoder: Any = codecs.getincrementaldecoder('utf-8')('surrogateescape')

    def add(self, byte: int, longest: int) -> None:
        """Takes in a byte; keeps `longest` characters."""
        self.length += 1
        if self._decoder is None:
            return
        new = self._decoder.decode(bytes([byte]))
        if any('\ud800' <= character <= '\udfff' for character in new):
            self.text, self._decoder = '', None
        else:
            self.text = (self.text + new)[-longest:]
