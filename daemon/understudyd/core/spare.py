"""Extents that nobody waits for, sorted by what losing them costs, without ever sorting them all."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import islice

from understudyd.core.extents import Extent, Priced

_REFRESHED = 8

Entry = tuple[float, int, Extent]


class Spare:
    """Extents by price. A price stands until it is looked at again, which `refresh` does by turns."""

    def __init__(self, price_of: Callable[[Extent], float]) -> None:
        self._price_of = price_of
        self._entries: dict[Extent, Entry] = {}  # whose price is the oldest comes first
        self._sorted: list[Entry] = []

    def __iter__(self) -> Iterator[Priced]:
        """The cheapest first, older ones before younger ones of the same price."""
        return ((price, extent) for price, _, extent in self._sorted)

    def __contains__(self, extent: Extent) -> bool:
        """It is among them."""
        return extent in self._entries

    def put(self, extent: Extent) -> None:
        """It is one of them, at the price that it has now."""
        self.discard(extent)
        entry = self._entries[extent] = (self._price_of(extent), extent.generation, extent)
        insort(self._sorted, entry)

    def discard(self, extent: Extent) -> None:
        """It is not, or no more, one of them."""
        entry = self._entries.pop(extent, None)
        if entry is not None:
            del self._sorted[bisect_left(self._sorted, entry)]

    def refresh(self) -> None:
        """Look again at a few prices, those that are the oldest."""
        for extent in list(islice(self._entries, _REFRESHED)):
            self.put(extent)
