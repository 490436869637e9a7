"""Things sorted by what they are worth, without ever sorting them all."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

LOOKED_AT = 8
"""So many keys are looked at again at a time, where they change with every request."""


class Ranking(Generic[Item]):
    """Items by key. A key stands until the item is put again, or looked at by `refresh`, by turns."""

    def __init__(self, key_of: Callable[[Item], Any]) -> None:
        self._key_of = key_of
        self._puts = 0
        self._moment: object = None
        self._entries: dict[Item, tuple[Any, int, Item]] = {}  # whose key is the oldest comes first
        self._sorted: list[tuple[Any, int, Item]] = []

    def __len__(self) -> int:
        """How many there are."""
        return len(self._sorted)

    @property
    def entries(self) -> Sequence[tuple[Any, int, Item]]:
        """Keys, ties and items, the least first: for those who count every microsecond."""
        return self._sorted

    def __iter__(self) -> Iterator[tuple[Any, Item]]:
        """Keys and items, the least first; of equal ones who was put first."""
        return ((key, item) for key, _, item in self._sorted)

    def __contains__(self, item: Item) -> bool:
        """It is among them."""
        return item in self._entries

    def put(self, item: Item) -> None:
        """It is one of them, under the key that it has now."""
        self.discard(item)
        self._puts += 1
        entry = self._entries[item] = (self._key_of(item), self._puts, item)
        insort(self._sorted, entry)

    def discard(self, item: Item) -> None:
        """It is not, or no more, one of them."""
        entry = self._entries.pop(item, None)
        if entry is not None:
            del self._sorted[bisect_left(self._sorted, entry)]

    def refresh(self, most: int, moment: object) -> None:
        """Look again at the `most` keys that are the oldest, once in a moment."""
        if self._moment == moment:
            return
        self._moment = moment
        for item in list(islice(self._entries, most)):
            self.put(item)

    def check(self) -> None:
        """Sorted, and each item once."""
        assert self._sorted == sorted(self._entries.values(), key=lambda entry: entry[:2])
