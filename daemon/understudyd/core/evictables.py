"""What may leave the arena and the host pool, filed by who would miss it, and what is in neither.

Going over hundreds of extents whenever one is wanted takes longer than anybody should wait. So whatever may
change a blob's place only marks the blob, and whoever wants an extent has those blobs filed anew first.
"""

from collections.abc import Iterable, Mapping

from understudyd.core.demand import Demand
from understudyd.core.entities import Blob, Model
from understudyd.core.extents import Extent
from understudyd.core.ranking import Ranking
from understudyd.core.states import BlobState, ExtentState

RELOAD_FROM_POOL = 0.2
"""A load from the host pool counts so much of one from disk; to fold anew from what is at hand, too."""
_ONLY_TO_FOLD_ANEW = 0.1
"""So much counts the load of an adapter all of whose overlays are there."""


class Evictables:
    """Extents that may be evicted: ready, with views, neither leased nor pinned.

    `spare` are those that nobody waits for, `partial` those that only models wait for which lack others
    still. What a ready model waits for is found by its model (`policy.py`). `copies` are copies in the host
    pool that are not about to be read. `arrivals` counts who joined `spare` or `partial`.

    `away` are blobs of models, the likeliest first, that are nowhere and not on their way.
    """

    def __init__(
        self,
        demand: Demand,
        models: Mapping[str, Model],
        pinned: Mapping[str, Model],
    ) -> None:
        self._demand, self._models, self._pinned = demand, models, pinned
        self._blobs: dict[Extent, Blob] = {}
        self._marked: dict[Blob, None] = {}
        self.arrivals = 0
        self._extents: dict[Blob, Extent] = {}
        self._copies: dict[Blob, Extent] = {}
        self.spare: Ranking[Extent] = Ranking(self._price)
        self.partial: Ranking[Extent] = Ranking(lambda extent: demand.soonest(self._blobs[extent]))
        self.copies: Ranking[Extent] = Ranking(lambda copy: demand.chance(self._blobs[copy]))
        self.away: Ranking[Blob] = Ranking(lambda blob: -demand.chance(blob))

    def mark(self, blobs: Iterable[Blob]) -> None:
        """Something about these blobs may have changed."""
        for blob in blobs:
            self._marked[blob] = None

    def file(self) -> int:
        """File anew what was marked; returns how many that were."""
        for name in self._demand.turned():
            if name in self._models:
                self.mark(self._models[name].blobs)
                self.mark(self._models[name].adapters)
        for blob in self._marked:
            if blob.extent is not None or blob in self._extents:
                self._file_extent(blob)
            if blob.copy is not None or blob in self._copies:
                self._file_copy(blob)
            if _is_away(blob):
                self.away.put(blob)
            else:
                self.away.discard(blob)
        count = len(self._marked)
        self._marked.clear()
        return count

    def blob_of(self, extent: Extent) -> Blob:
        """The blob of a filed extent."""
        return self._blobs[extent]

    def may_leave(self, blob: Blob) -> bool:
        """It is in the arena and may be evicted."""
        extent = blob.extent
        if extent is None or extent.life.state is not ExtentState.READY:
            return False
        if blob.life.state is not BlobState.RESIDENT:
            return False
        return not self._pinned or self._pinned.keys().isdisjoint(blob.users)

    # -- inside -------------------------------------------------------------------------------------

    def _price(self, extent: Extent) -> float:
        blob = self._blobs[extent]
        price = self._demand.chance(blob)
        if blob.sources:
            adapters = blob.sources[1:]
            is_at_hand = all(b.state is BlobState.RESIDENT or b.has_copy for b in adapters)
            return price * RELOAD_FROM_POOL if is_at_hand else price
        if blob.overlays and all(overlay.is_made for overlay in blob.overlays.values()):
            price *= _ONLY_TO_FOLD_ANEW
        return price * RELOAD_FROM_POOL if blob.has_copy else price

    def _file_extent(self, blob: Blob) -> None:
        filed = self._extents.pop(blob, None)
        if filed is not None and filed is not blob.extent:
            self._drop(filed)
        extent = blob.extent
        if extent is None:
            return
        if not self.may_leave(blob):
            self._drop(extent)
            return
        self._extents[blob], self._blobs[extent] = extent, blob
        was_spare, was_partial = extent in self.spare, extent in self.partial
        if not self._demand.awaits(blob):
            self.partial.discard(extent)
            if not was_spare:
                self.spare.put(extent)
                self.arrivals += 1
            return
        self.spare.discard(extent)
        if self._demand.ready_awaits(blob):
            self.partial.discard(extent)
        else:
            self.partial.put(extent)
            self.arrivals += not (was_spare or was_partial)

    def _drop(self, extent: Extent) -> None:
        self.spare.discard(extent)
        self.partial.discard(extent)
        self._blobs.pop(extent, None)

    def _file_copy(self, blob: Blob) -> None:
        copy, filed = blob.copy, self._copies.pop(blob, None)
        if filed is not None and filed is not copy:
            self.copies.discard(filed)
            self._blobs.pop(filed, None)
        if copy is None:
            return
        if copy.life.state is not ExtentState.READY or self._demand.is_coming(blob):
            self.copies.discard(copy)
            self._blobs.pop(copy, None)
            return
        self._copies[blob], self._blobs[copy] = copy, blob
        if copy not in self.copies:
            self.copies.put(copy)

    def check(self, blobs: Iterable[Blob]) -> None:
        """What is not marked lies where it belongs, and nothing else is filed."""
        stale = self._marked.keys() | {
            blob
            for name in self._demand.unseen()
            if name in self._models
            for blob in (*self._models[name].blobs, *self._models[name].adapters)
        }
        for blob in (blob for blob in blobs if blob not in stale):
            assert (blob in self.away) == _is_away(blob), f"{blob.key}: away"
            is_awaited = self._demand.awaits(blob)
            if (extent := blob.extent) is not None:
                may_leave, missed = self.may_leave(blob), is_awaited and self._demand.ready_awaits(blob)
                assert (extent in self.spare) == (may_leave and not is_awaited), f"{blob.key}: spare"
                assert (extent in self.partial) == (may_leave and is_awaited and not missed), blob.key
            if (copy := blob.copy) is not None:
                is_free = copy.life.state is ExtentState.READY and not self._demand.is_coming(blob)
                assert (copy in self.copies) == is_free, f"{blob.key}: copy"
        filed = {blob.extent for blob in self._extents} | {blob.copy for blob in self._copies}
        self.away.check()
        for ranking in (self.spare, self.partial, self.copies):
            ranking.check()
            assert all(extent in filed or self._blobs[extent] in stale for _, extent in ranking)


def _is_away(blob: Blob) -> bool:
    is_nowhere = blob.copy is None and blob.life.state is BlobState.ABSENT
    return is_nowhere and bool(blob.models) and not blob.is_overlay
