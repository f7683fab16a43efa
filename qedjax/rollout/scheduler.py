"""Who gets pages and rows: admission, sharing of prompts, growth and preemption. Host code that knows no arrays on devices.

    waiting --admit--> filling (pages are held, the prompt is prefilled) --attach--> running --> ended
       ^                                                                                |
       +------------------------------ preempted (pages given back) --------------------+

Order is by arrival: the head of the queue is never overtaken, and the youngest gives way. Samples of one prompt are served together
(those that arrive within GROUP_REACH of the first), since they share its pages. A shard is one slice of the batch with its own pages.
"""

import dataclasses
import heapq

import numpy as np

from qedjax.rollout.pages import PagePool
from qedjax.rollout.requests import Request

GROUP_REACH = 1024  # arrivals by which a sample may be served early to join its group: the most that anyone is overtaken


@dataclasses.dataclass(eq=False)
class Prefix:
    """Pages that hold all ids but the last of a prompt, filled once for all who continue it. It does not outlive the weights."""

    shard: int
    tokens: np.ndarray
    pages: list[int]
    filled: int = 0
    members: list['Member'] = dataclasses.field(default_factory=list)

    @property
    def ready(self) -> bool:
        return self.filled == len(self.tokens)


@dataclasses.dataclass(eq=False)
class Member:
    """A request that has an entry in a shard's pool. `pages` holds what is its own until `prefix` is done, then all of its pages."""

    request: Request
    shard: int
    index: int
    prefix: Prefix | None
    pages: list[int]


@dataclasses.dataclass(frozen=True)
class Attached:
    """A member that may now run, and the page copy that makes the end of its prompt its own (None if that ends with a page)."""

    member: Member
    copy: tuple[int, int] | None


class Scheduler:
    """Requests, members, prefixes and pages of all shards."""

    def __init__(self, shards: int, members: int, pages: int, page_size: int, steps: int):
        self.page_size, self.steps = page_size, steps
        self.capacity = pages
        self.pools = [PagePool(pages) for _ in range(shards)]
        self.members: list[list[Member | None]] = [[None] * members for _ in range(shards)]
        self.prefixes: dict[tuple[int, bytes], Prefix] = {}
        self.dirty: list[tuple[int, int]] = []  # (shard, page) to be zeroed before the next prefill
        self.member_of: dict[Request, Member] = {}
        self._waiting: list[tuple[tuple[int, int], Request, bytes]] = []
        self._groups: dict[bytes, list[int]] = {}  # key -> [arrival of its first waiting request, number waiting]

    # The queue.

    def enqueue(self, request: Request) -> None:
        """Puts a new or preempted request in its place."""
        key = request.tokens().tobytes()
        group = self._groups.setdefault(key, [request.arrival, 0])
        if request.arrival - group[0] > GROUP_REACH:
            group[0] = request.arrival
        group[1] += 1
        heapq.heappush(self._waiting, ((min(group[0], request.arrival), request.arrival), request, key))

    def _pop(self) -> None:
        _, _, key = heapq.heappop(self._waiting)
        self._groups[key][1] -= 1
        if not self._groups[key][1]:
            del self._groups[key]

    # Admission.

    def admit(self, slots: int) -> None:
        """Gives pages and entries to the head of the queue while there are any; `slots` rows run at a time on each shard."""
        while self._waiting:
            _, request, key = self._waiting[0]
            if request.completion is None and not self._place(request, key, slots):
                break
            self._pop()
        self._drop_prefixes()

    def _place(self, request: Request, key: bytes, slots: int) -> bool:
        loads = [sum(m is not None for m in members) for members in self.members]
        shards = [s for s, load in enumerate(loads) if load < len(self.members[s])]

        def preference(shard):  # an idle row first, then the prompt's own pages, then the emptiest
            return loads[shard] >= slots, (shard, key) not in self.prefixes, loads[shard]

        return any(self._place_on(shard, request, key) for shard in sorted(shards, key=preference))

    def _place_on(self, shard: int, request: Request, key: bytes) -> bool:
        pool, size = self.pools[shard], self.page_size
        prefix = self.prefixes.get((shard, key))
        filled = request.length - 1
        own = _pages(self._reach(request), size) - filled // size
        needed = own + (_pages(filled, size) if prefix is None else 0)
        if pool.free < needed:
            self._drop_prefixes(shard, keep=key)
        pages = pool.take(needed)
        if pages is None:
            return False
        if prefix is None:
            prefix = Prefix(shard, request.tokens()[:-1], [pages.pop() for _ in range(needed - own)])
            self.prefixes[shard, key] = prefix
        index = self.members[shard].index(None)
        member = Member(request, shard, index, prefix, pages)
        prefix.members.append(member)
        self.members[shard][index] = self.member_of[request] = member
        return True

    def _reach(self, request: Request) -> int:
        """Positions that a request may come to use before the host looks again: the call that runs and the next."""
        return min(request.length + 2 * self.steps, len(request.prompt) + request.limit)

    def _drop_prefixes(self, shard: int | None = None, keep: bytes | None = None, anyway: bool = False) -> None:
        """Gives back prefixes that nobody continues or waits for; on a shard that is short of pages, or `anyway`, those waited for too."""
        for (owner, key), prefix in list(self.prefixes.items()):
            waited_for = shard is None and not anyway and key in self._groups
            if not prefix.members and key != keep and not waited_for and shard in (None, owner):
                del self.prefixes[owner, key]
                self._release(owner, prefix.pages)

    # Prefill.

    def filling(self) -> list[Prefix]:
        """Prefixes with ids still to be prefilled, the eldest request's first."""
        waiting = [prefix for prefix in self.prefixes.values() if not prefix.ready and prefix.members]
        return sorted(waiting, key=lambda prefix: prefix.members[0].request.arrival)

    def attach(self) -> list[Attached]:
        """Members whose prompt has been prefilled: they share its full pages and copy the last."""
        attached = []
        for prefix in self.prefixes.values():
            if prefix.ready:
                full = len(prefix.tokens) // self.page_size
                for member in prefix.members:
                    self.pools[prefix.shard].share(prefix.pages[:full])
                    copy = (prefix.pages[full], member.pages[0]) if full < len(prefix.pages) else None
                    member.pages, member.prefix = prefix.pages[:full] + member.pages, None
                    attached.append(Attached(member, copy))
                prefix.members = []
        return attached

    def renew(self, everyone: bool) -> None:
        """New weights: whoever has drawn nothing yet, or everyone, goes back to the queue, and no prefix outlives those that made it."""
        for member in list(self.member_of.values()):
            if everyone or member.prefix is not None or not member.request.ids:
                self.remove(member)
                self.enqueue(member.request)
        self._drop_prefixes(anyway=True)

    # Running.

    def running(self) -> list[Member]:
        """Members whose prompt is in the cache, the eldest first."""
        running = [m for members in self.members for m in members if m is not None and m.prefix is None]
        return sorted(running, key=lambda member: member.request.arrival)

    def grow(self) -> list[Request]:
        """Pages for the steps to come. Where a member cannot go on for want of one, the youngest gives way; returns those preempted."""
        gone = []
        for member in self.running():
            if self.members[member.shard][member.index] is not member:
                continue  # it has given way
            pool, wanted = self.pools[member.shard], _pages(self._reach(member.request), self.page_size)
            if pool.free < wanted - len(member.pages):
                self._drop_prefixes(member.shard)
            member.pages += pool.take(min(max(wanted - len(member.pages), 0), pool.free)) or []
            while len(member.pages) * self.page_size < member.request.length:  # not even the next id fits
                youngest = max((m for m in self.members[member.shard] if m is not None), key=lambda m: m.request.arrival)
                if youngest is member:
                    break
                gone.append(youngest.request)
                self.remove(youngest)
                member.pages += pool.take(min(1, pool.free)) or []
        return gone

    def remove(self, member: Member) -> None:
        """Takes a member out of its pool and gives its pages back."""
        self.members[member.shard][member.index] = None
        del self.member_of[member.request]
        if member.prefix is not None:
            member.prefix.members.remove(member)
        self._release(member.shard, member.pages)

    def taint(self, member: Member) -> None:
        """Has a member's pages zeroed before anyone else gets them."""
        self.pools[member.shard].taint(member.pages)

    def _release(self, shard: int, pages: list[int]) -> None:
        self.dirty += [(shard, page) for page in self.pools[shard].release(pages)]


def _pages(positions: int, size: int) -> int:
    return -(-positions // size)
