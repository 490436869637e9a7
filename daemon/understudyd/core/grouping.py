"""Sorted entries in named groups, and the first of every group, sorted: nothing is sorted per event."""

from bisect import bisect_left, insort
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry", bound=tuple[Any, ...])


class Grouped(Generic[Entry]):
    """Entries are tuples, and no two are equal. A group is never empty; `heads` has each one's first.

    `changes` counts those of `heads`.
    """

    __slots__ = ("changes", "groups", "heads")

    def __init__(self) -> None:
        self.groups: dict[str, list[Entry]] = {}
        self.heads: list[Entry] = []
        self.changes = 0

    def first(self, name: str) -> Entry | None:
        """The first entry of a group."""
        group = self.groups.get(name)
        return None if group is None else group[0]

    def has(self, name: str, entry: Entry) -> bool:
        """The entry is in this group."""
        group = self.groups.get(name)
        if group is None:
            return False
        index = bisect_left(group, entry)
        return index < len(group) and group[index] == entry

    def add(self, name: str, entry: Entry) -> bool:
        """One more; whether it is the first of its group."""
        group = self.groups.get(name)
        if group is None:
            self.groups[name] = [entry]
            insort(self.heads, entry)
            self.changes += 1
            return True
        head = group[0]
        insort(group, entry)
        if entry < head:
            self._replace(head, entry)
            return True
        return False

    def remove(self, name: str, entry: Entry) -> bool:
        """One fewer; whether any is left in its group."""
        group = self.groups[name]
        index = bisect_left(group, entry)
        del group[index]
        if not group:
            del self.groups[name], self.heads[bisect_left(self.heads, entry)]
            self.changes += 1
            return False
        if not index:
            self._replace(entry, group[0])
        return True

    def _replace(self, head: Entry, new: Entry) -> None:
        del self.heads[bisect_left(self.heads, head)]
        insort(self.heads, new)
        self.changes += 1

    def check(self) -> None:
        """Groups are sorted, and the heads are theirs."""
        assert all(group and group == sorted(group) for group in self.groups.values())
        assert self.heads == sorted(group[0] for group in self.groups.values())
