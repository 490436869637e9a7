"""Host copies of blobs: what lies in the host pool, one copy over the bus away from the arena.

A copy is made while its blob is loaded, or ahead of time when a loader has nothing better to do. It stays
when the blob leaves the arena, until something worth more needs its place.
"""

import math
from collections.abc import Iterable, Iterator

from understudyd.core.demand import Demand
from understudyd.core.entities import Blob, Load
from understudyd.core.evictables import Evictables
from understudyd.core.extents import ArenaMap, Extent
from understudyd.core.quarantine import Quarantine
from understudyd.core.states import ExtentState
from understudyd.core.windows import cheapest_window


class HostCopies:
    """The host pool's map. `changes` counts what may make a difference to what can be copied."""

    def __init__(
        self, pool_bytes: int, quarantine_grace_s: float, demand: Demand, evictables: Evictables
    ) -> None:
        self.pool = ArenaMap(pool_bytes)
        self._demand, self._evictables = demand, evictables
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
            self._evictables.mark([blob])
        return copy

    def worth(self, blob: Blob) -> float:
        """The chance that a copy of the blob saves a read; infinite while somebody waits for it."""
        return math.inf if self._demand.is_coming(blob) else self._demand.chance(blob)

    def make(self, blob: Blob, limit: float, now_s: float) -> Extent | None:
        """A copy to be filled: a gap, or a window of copies that are worth less than `limit` together."""
        if not self.pool.size_bytes:
            return None
        copy = self.pool.allocate(blob.info.size_bytes, blob.key)
        if copy is None and limit > 0.0:
            copy = self._replace(blob, limit, now_s)
        blob.copy = copy
        return copy

    def _replace(self, blob: Blob, limit: float, now_s: float) -> Extent | None:
        self._evictables.file()
        self._evictables.copies.refresh(self._demand.looked_at, self._demand.moment)
        window = cheapest_window(self.pool, blob.info.size_bytes, self._evictables.copies, limit)
        if window is None:
            return None
        for victim in window.victims:
            self.drop(self._evictables.blob_of(victim), now_s, f"room for {blob.key[:12]}")
            self.evictions += 1
        return self.pool.allocate(blob.info.size_bytes, blob.key)

    def adopt(self, blob: Blob, offset: int, now_s: float) -> None:
        """A copy that another daemon made, to be checked by the first load; nothing where it cannot be."""
        if blob.copy is not None:
            return
        copy = self.pool.allocate_at(offset, blob.info.size_bytes, blob.key)
        if copy is not None:
            copy.is_proved = False
            copy.life.to(ExtentState.READY, now_s, "found in the pool")
            blob.copy = copy
            self.changes += 1
            self._evictables.mark([blob])

    def drop(self, blob: Blob, now_s: float, why: str) -> None:
        """Forget a copy that no load uses; harmless without one."""
        if blob.copy is not None and blob.copy.state in (ExtentState.READY, ExtentState.FILLING):
            self.pool.release(blob.copy, now_s, why)
            blob.copy = None
            self.changes += 1
            self._evictables.mark([blob])

    def clear(self, blobs: Iterable[Blob], now_s: float) -> None:
        """Forget every copy that no load uses."""
        for blob in blobs:
            if blob.copy is not None and blob.copy.state is ExtentState.READY:
                self.drop(blob, now_s, "operator")

    def load_finished(self, load: Load, now_s: float) -> None:
        """The copy is complete, or no longer read."""
        if load.copy is None:
            return
        if load.from_pool:
            load.copy.is_proved = True
            self._give_back(load.blob, load.copy, now_s)
        else:
            load.copy.life.to(ExtentState.READY, now_s, f"load {load.id}")
            self.changes += 1
            self._evictables.mark([load.blob])

    def load_ended_empty(self, load: Load, now_s: float, why: str) -> None:
        """A copy that was being made is of no use."""
        if load.copy is not None and load.from_pool:
            self._give_back(load.blob, load.copy, now_s)
        elif load.copy is not None:
            self.drop(load.blob, now_s, why)

    def loader_lost(self, load: Load, now_s: float, why: str) -> None:
        """A copy that was being made may still be written to; one that was read is as good as before."""
        if load.copy is not None and load.from_pool:
            self._give_back(load.blob, load.copy, now_s)
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

    def _give_back(self, blob: Blob, copy: Extent, now_s: float) -> None:
        copy.leases -= 1
        if copy.leases == 0:
            copy.life.to(ExtentState.READY, now_s, "the load has ended")
            self._evictables.mark([blob])
