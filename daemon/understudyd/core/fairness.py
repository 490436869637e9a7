"""Whose turn it is: start-time fair queueing over clients (Goyal, Vin and Cheng, SIGCOMM 1996).

A request gets a tag when it is admitted: the virtual time, or the end of its client's last one if that is
later; its own end is `cost` after its tag. So the hundredth request of one client stands behind the first of
another, and who asks for more work at once stands further behind with the next.

Virtual time is the share of the work that every client could have had: with each request that goes on deck it
advances by `cost` over the number of clients that wait. It is never behind the least tag that waits, else
clients that came later would be served for a time when they were not here. (Goyal's virtual time, the tag of
what was taken last, needs requests to be taken in order.)

Tags count within a priority; what one that comes first anyway has used is nobody else's measure.
"""

import heapq
from dataclasses import dataclass, field

from understudyd.core.types import RequestInfo

MAX_LEAD = 4
"""So many requests ahead of its turn a client may be before those that it passes press (`policy.py`)."""


@dataclass(slots=True)
class Share:
    """One client's at one priority: where its next request would start, and how many wait."""

    end: float
    waiting: int = 0


@dataclass(slots=True)
class Level:
    """Clients of one priority, while anybody waits there. `absent` have nothing waiting, by their end."""

    shares: dict[str, Share] = field(default_factory=dict)
    waiting: int = 0
    absent: list[tuple[float, str]] = field(default_factory=list)


class FairTags:
    """Hands out tags. Forgets a client that is not ahead of virtual time and has nothing waiting.

    Of those that are ahead it remembers `max_absent` at each priority.
    """

    def __init__(self, max_absent: int) -> None:
        self.virtual_time = 0.0
        self.levels: dict[int, Level] = {}
        self._max_absent = max_absent

    def admit(self, info: RequestInfo, least_tag: float | None) -> float:
        """The request's tag; `least_tag` is the least that waits."""
        self._is_at_least(least_tag)
        level = self.levels.setdefault(info.priority, Level())
        share = level.shares.setdefault(info.client, Share(self.virtual_time))
        tag = max(share.end, self.virtual_time)
        share.end = tag + info.cost
        share.waiting += 1
        level.waiting += 1
        return tag

    def take(self, info: RequestInfo, clients: int, least_tag: float | None) -> None:
        """The request goes on deck; so many clients waited, itself included."""
        self.virtual_time += info.cost / clients
        self._is_at_least(least_tag)
        self._leave(info, 0.0)

    def withdraw(self, info: RequestInfo, least_tag: float | None) -> None:
        """The request will not run: its client gets its turn back."""
        self._is_at_least(least_tag)
        self._leave(info, info.cost)

    def _is_at_least(self, least_tag: float | None) -> None:
        if least_tag is not None and least_tag > self.virtual_time:
            self.virtual_time = least_tag

    def _leave(self, info: RequestInfo, refund: float) -> None:
        level = self.levels[info.priority]
        level.waiting -= 1
        if not level.waiting:
            del self.levels[info.priority]
            if not self.levels:
                self.virtual_time = 0.0
            return
        share = level.shares[info.client]
        share.waiting -= 1
        share.end -= refund
        if not share.waiting:
            heapq.heappush(level.absent, (share.end, info.client))
        self._forget(level)

    def _forget(self, level: Level) -> None:
        """Who would get virtual time as its next tag anyway, and those least ahead of too many."""
        absent = level.absent
        while absent and (absent[0][0] <= self.virtual_time or len(absent) > self._max_absent):
            end, client = heapq.heappop(absent)
            share = level.shares.get(client)
            if share is not None and not share.waiting and share.end == end:
                del level.shares[client]
