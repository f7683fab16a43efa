"""The host's account of cache pages on one shard: who holds a page is a count, so samples of one prompt can share."""

from collections.abc import Iterable


class PagePool:
    """Pages 0 .. count - 1, each held by any number of owners."""

    def __init__(self, count: int):
        self._holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._tainted: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` free pages for one owner, or None if there are not as many."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for pages that are held."""
        for page in pages:
            assert self._holders[page] > 0, f'page {page} is free'
            self._holders[page] += 1

    def taint(self, pages: Iterable[int]) -> None:
        """Marks pages as holding values that are not finite: they must be zeroed before anyone else gets them."""
        self._tainted.update(pages)

    def release(self, pages: Iterable[int]) -> list[int]:
        """One owner less; returns those of the pages that are now free and tainted, which the caller must zero."""
        dirty = []
        for page in pages:
            assert self._holders[page] > 0, f'page {page} is freed twice'
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
                if page in self._tainted:
                    self._tainted.remove(page)
                    dirty.append(page)
        return dirty
