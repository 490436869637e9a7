"""Extents that a dead loader may still be writing to: out of use until it is reaped and a while after."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from understudyd.core.extents import Extent


@dataclass(slots=True)
class _Case:
    extent: Extent
    loader_id: int
    over_at_s: float | None = None


@dataclass(slots=True)
class Quarantine:
    """`grace_s` counts from the reaping: a copy of a dead process may still be in flight on the device."""

    grace_s: float
    _cases: list[_Case] = field(default_factory=list)

    def __len__(self) -> int:
        """How many extents are held."""
        return len(self._cases)

    def hold(self, extent: Extent, loader_id: int) -> None:
        """The loader was lost while it filled the extent."""
        self._cases.append(_Case(extent, loader_id))

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone for good."""
        for case in self._cases:
            if case.loader_id == loader_id:
                case.over_at_s = now_s + self.grace_s

    def release(self, now_s: float) -> list[Extent]:
        """Let go of the extents whose time is over."""
        over = [c.extent for c in self._cases if c.over_at_s is not None and c.over_at_s <= now_s]
        if over:
            self._cases = [c for c in self._cases if c.over_at_s is None or c.over_at_s > now_s]
        return over

    def deadlines(self) -> Iterator[float]:
        """When `release` will have something."""
        return (case.over_at_s for case in self._cases if case.over_at_s is not None)
