"""The cheapest runs of neighbours: what is cheap is cleared in thought until a run is long enough."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from understudyd.core.extents import ArenaMap, Extent

Priced = tuple[float, Extent]
"""What evicting an extent loses, and the extent."""


@dataclass(frozen=True, slots=True)
class Window:
    """A contiguous run that would fit a blob once `victims` are evicted."""

    offset: int
    size_bytes: int
    victims: tuple[Extent, ...]
    prices: tuple[float, ...]
    cost: float


@dataclass(eq=False, slots=True)
class Wanted:
    """So many bytes in one piece for less than `ceiling`; `window` is the cheapest one found."""

    size_bytes: int
    ceiling: float = math.inf
    window: Window | None = None


def cheapest_window(
    arena: ArenaMap, size_bytes: int, candidates: Iterable[Priced], limit: float = math.inf
) -> Window | None:
    """The one for `size_bytes`; None below `limit` when there is none. As `find_windows`."""
    wanted = Wanted(arena.rounded(size_bytes), limit)
    find_windows(arena, [wanted], candidates, lambda: wanted.ceiling)
    return wanted.window


def find_windows(
    arena: ArenaMap,
    wanted: Sequence[Wanted],
    candidates: Iterable[Priced],
    ceiling: Callable[[], float],
) -> None:
    """Find the cheapest window of each size, by one look at everything.

    `candidates` are what may be cleared, the cheapest first. They are drawn only up to `ceiling`, which is
    asked anew whenever a window was found: no further one can be part of anything cheaper. Meant for sizes
    that no gap alone has room for.
    """
    prices: dict[int, float] = {}
    offsets, extents, highest = arena.offsets, arena.extents, ceiling()
    sizes = [want.size_bytes for want in wanted]
    least_bytes, most_bytes = min(sizes), max(sizes)
    for price, candidate in candidates:
        if price >= highest:
            return
        prices[offset := candidate.offset] = price
        first = bisect_left(offsets, offset)
        after = first + 1
        lowest, farthest = offset + candidate.size_bytes - most_bytes, offset + most_bytes
        while first and offsets[first] > lowest and offsets[first - 1] in prices:
            first -= 1
        while after < len(offsets) and offsets[after] < farthest and offsets[after] in prices:
            after += 1
        start = extents[offsets[first - 1]].end if first else 0
        end = offsets[after] if after < len(offsets) else arena.size_bytes
        if end - start < least_bytes:
            continue
        run = [extents[offset] for offset in offsets[first:after]]
        for want in wanted:
            if end - start >= want.size_bytes and price < want.ceiling:
                _narrow(want, run, start, end, prices)
                highest = ceiling()


def _narrow(want: Wanted, run: Sequence[Extent], start: int, end: int, prices: Mapping[int, float]) -> None:
    """Part of a run, from one kept neighbour to the next, may be cheaper than what was found."""
    starts = [start, *(extent.end for extent in run)]  # of the gap, if any, before each extent
    ends = [*(extent.offset for extent in run[1:]), end]  # of the one behind it
    found: tuple[int, int] | None = None
    best = (want.ceiling, want.window.size_bytes if want.window is not None else 0)
    cost, left = 0.0, 0
    for right, extent in enumerate(run):
        cost += prices[extent.offset]
        while left < right and ends[right] - starts[left + 1] >= want.size_bytes:
            cost -= prices[run[left].offset]
            left += 1
        length = ends[right] - starts[left]
        if length >= want.size_bytes and (cost, length) < best:
            best, found = (cost, length), (left, right + 1)
    if found is None:
        return
    victims = tuple(run[slice(*found)])
    costs = tuple(prices[victim.offset] for victim in victims)
    want.window = Window(starts[found[0]], best[1], victims, costs, best[0])
    want.ceiling = best[0]
