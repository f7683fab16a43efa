"""Text of a completion as its ids come: characters are never split, and what may become a stop string is held back."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = '\ufffd'  # how a tokenizer shows bytes that are not a character, or not yet


class TextStream:
    """Text of one completion. With all ids pushed, the text is decode(ids), cut before the stop string that was completed first.

    Attributes:
      stopped: whether a stop string has come; nothing is taken in after it.
      count: ids taken in, the one that completed the stop string included.
      text: everything released so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        """Raises ValueError for an empty stop string."""
        if '' in stop:
            raise ValueError('a stop string is empty: it would end every completion at once; leave it out')
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Text of ids before _done has been taken in; ids from _context on are decoded again with new ones, because what a tokenizer
        # writes for an id may depend on the one before it. Both move, so the cost of an id does not grow with the completion.
        self._context = self._done = 0
        self._held = self.text = ''
        self.stopped = False

    @property
    def count(self) -> int:
        return len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """Takes in ids up to the one that completes a stop string, and returns the text that they release."""
        before = len(self.text)
        for part in [[i] for i in ids] if self._stop else [list(ids)]:
            if part and not self.stopped:
                self._ids += part
                self._take(self._new_text())
        return self.text[before:]

    def finish(self) -> str:
        """Releases what is held back: no more ids will come."""
        before = len(self.text)
        if not self.stopped:
            self._take(self._new_text(last=True))
        if not self.stopped:
            self._release(len(self._held))
        return self.text[before:]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _new_text(self, last: bool = False) -> str:
        window = self._decode(self._context, len(self._ids))
        if window.endswith(UNFINISHED) and not last:
            return ''
        new = window[len(self._decode(self._context, self._done)) :]
        self._context, self._done = self._done, len(self._ids)
        return new

    def _take(self, text: str) -> None:
        self._held += text
        found = [(self._held.find(stop) + len(stop), self._held.find(stop)) for stop in self._stop if stop in self._held]
        if found:
            self._release(min(found)[1])
            self.stopped = True
            return
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        keep = next((n for n in range(min(longest, len(self._held)), 0, -1)
                     if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
        self._release(len(self._held) - keep)

    def _release(self, count: int) -> None:
        self.text, self._held = self.text + self._held[:count], self._held[count:]
