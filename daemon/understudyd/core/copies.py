"""Host copies of blobs: what lies in the host pool, one copy over the bus away from the arena.

A copy is made while its blob is loaded, or ahead of time when a loader has nothing better to do. It stays
when the blob leaves the arena, until something worth more needs its place.
"""

from collections.abc import Callable, Iterator, Mapping

from understudyd.core.entities import Blob, Load
from understudyd.core.extents import ArenaMap, Extent
from understudyd.core.quarantine import Quarantine
from understudyd.core.states import ExtentState

Worth = Callable[[Blob], float]
"""What a blob's copy is worth: the chance that it saves a read; infinite while somebody counts on it."""


class HostCopies:
    """The host pool's map. `changes` counts what may make a difference to what can be copied."""

    def __init__(self, pool_bytes: int, quarantine_grace_s: float, worth: Worth) -> None:
        self.pool = ArenaMap(pool_bytes)
        self.worth = worth
        self.evictions = 0
        self.changes = 0
        self._quarantine = Quarantine(quarantine_grace_s)

    def borrow(self, blob: Blob, now_s: float) -> Extent | None:
        """The blob's copy, which stays until the load that reads it has ended; None without one."""
        copy = blob.copy
        if copy is None or not blob.has_copy:
            return None
        copy.leases += 1
        if copy.leases == 1:
            copy.life.to(ExtentState.LEASED, now_s, "read by a load")
        return copy

    def make(self, blob: Blob, blobs: Mapping[str, Blob], limit: float, now_s: float) -> Extent | None:
        """A copy to be filled: a gap, or a window of copies that are worth less than `limit` together."""
        if not self.pool.size_bytes:
            return None
        copy = self.pool.allocate(blob.info.size_bytes, blob.key)
        if copy is None and limit > 0.0:
            copy = self._replace(blob, blobs, limit, now_s)
        blob.copy = copy
        return copy

    def _replace(self, blob: Blob, blobs: Mapping[str, Blob], limit: float, now_s: float) -> Extent | None:
        ready = [extent for extent in self.pool if extent.state is ExtentState.READY]
        worths = {extent: self.worth(blobs[extent.blob]) for extent in ready}
        prices = {extent: price for extent, price in worths.items() if price != float("inf")}
        window = self.pool.cheapest_window(blob.info.size_bytes, prices)
        if window is None or window.cost >= limit:
            return None
        for victim in window.victims:
            self.drop(blobs[victim.blob], now_s, f"room for {blob.key[:12]}")
            self.evictions += 1
        return self.pool.allocate(blob.info.size_bytes, blob.key)

    def drop(self, blob: Blob, now_s: float, why: str) -> None:
        """Forget a copy that no load uses; harmless without one."""
        if blob.copy is not None and blob.copy.state in (ExtentState.READY, ExtentState.FILLING):
            self.pool.release(blob.copy, now_s, why)
            blob.copy = None
            self.changes += 1

    def load_finished(self, load: Load, now_s: float) -> None:
        """The copy is complete, or no longer read."""
        if load.copy is None:
            return
        if load.from_pool:
            self._give_back(load.copy, now_s)
        else:
            load.copy.life.to(ExtentState.READY, now_s, f"load {load.id}")
            self.changes += 1

    def load_ended_empty(self, load: Load, now_s: float, why: str) -> None:
        """A copy that was being made is of no use."""
        if load.copy is not None and load.from_pool:
            self._give_back(load.copy, now_s)
        elif load.copy is not None:
            self.drop(load.blob, now_s, why)

    def loader_lost(self, load: Load, now_s: float, why: str) -> None:
        """A copy that was being made may still be written to; one that was read is as good as before."""
        if load.copy is not None and load.from_pool:
            self._give_back(load.copy, now_s)
        elif load.copy is not None:
            load.copy.life.to(ExtentState.QUARANTINED, now_s, why)
            self._quarantine.hold(load.copy, load.loader_id)
            load.blob.copy = None

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone: what it may have been writing to is free after the grace period."""
        self._quarantine.loader_reaped(loader_id, now_s)

    def pass_time(self, now_s: float) -> None:
        """Free what has been quarantined long enough."""
        for extent in self._quarantine.release(now_s):
            self.pool.release(extent, now_s, "quarantine over")
            self.changes += 1

    def deadlines(self) -> Iterator[float]:
        """When quarantines end."""
        return self._quarantine.deadlines()

    def _give_back(self, copy: Extent, now_s: float) -> None:
        copy.leases -= 1
        if copy.leases == 0:
            copy.life.to(ExtentState.READY, now_s, "the load has ended")
