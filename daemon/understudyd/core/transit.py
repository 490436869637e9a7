"""What is on its way to the arena or to the host pool, and what becomes of it.

The lookahead decides what is loaded or folded; here a load or a fold is started, with a place of its own, and
ended, in one of its events. What a dead loader may still be writing to is in quarantine.
"""

from collections.abc import Iterable, Iterator, Sequence

from understudyd.core.decisions import Decisions
from understudyd.core.entities import Blob, Folding, Load, Loader
from understudyd.core.quarantine import Quarantine
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState, ExtentState
from understudyd.core.windows import Priced


class Transit:
    """Loads and folds from their start to their end. It decides nothing."""

    def __init__(
        self, residency: Residency, quarantine_grace_s: float, decisions: Decisions | None = None
    ) -> None:
        self._residency = residency
        self._copies = residency.copies
        self._book = residency.book
        self._quarantine = Quarantine(quarantine_grace_s)
        self._decisions = decisions

    # -- starting -----------------------------------------------------------------------------------

    def begin_load(
        self,
        blob: Blob,
        loader: Loader,
        candidates: Iterable[Priced] | None,
        now_s: float,
        beside: Sequence[int] = (),
    ) -> bool:
        """Start loading into a gap, or into the window that is cheapest to clear; False when no room.

        `candidates` may be evicted. Blobs of these sizes `beside` it will follow. The load comes from the
        blob's host copy, or leaves one behind if that is worth more than what it replaces.
        """
        extent = self._residency.place(blob, candidates, now_s, beside)
        if extent is None:
            return False
        copy = self._copies.borrow(blob, now_s)
        from_pool = copy is not None
        if copy is None:
            copy = self._copies.make(blob, self._copies.worth(blob), now_s)
        load = self._book.start(blob, loader, extent, copy, from_pool, now_s)
        self._tell(load, is_likely=candidates is None)
        blob.extent, blob.is_guess = extent, candidates is None
        blob.life.to(BlobState.LOADING, now_s, f"load {load.id}")
        self._residency.evictables.mark([blob])
        return True

    def begin_fetch(self, blob: Blob, loader: Loader, limit: float, now_s: float) -> bool:
        """Start bringing a blob to the host pool only, for copies worth less than `limit`; False: no room."""
        copy = self._copies.make(blob, limit, now_s)
        if copy is None:
            return False
        load = self._book.start(blob, loader, None, copy, False, now_s)
        self._tell(load, is_likely=True)
        blob.life.to(BlobState.FETCHING, now_s, f"load {load.id}")
        self._residency.evictables.mark([blob])
        return True

    def begin_fold(self, overlay: Blob, candidates: Iterable[Priced] | None, now_s: float) -> bool:
        """Start making an overlay whose sources are resident; False when there is no room for it.

        None of its sources may be among the `candidates` for eviction. They stay until the fold has ended.
        """
        residency = self._residency
        extent = residency.place(overlay, candidates, now_s, ())
        if extent is None:
            return False
        for blob in overlay.sources:
            residency.hold(blob, now_s, f"fold of {overlay.key[:12]}")
        residency.folds.start(overlay, extent, now_s)
        if self._decisions is not None:
            is_pinned = residency.is_pinned(overlay)
            self._decisions.folding(overlay, is_pinned=is_pinned, is_likely=candidates is None)
        overlay.extent, overlay.is_guess = extent, candidates is None
        overlay.life.to(BlobState.FOLDING, now_s, f"generation {extent.generation}")
        return True

    def _tell(self, load: Load, *, is_likely: bool) -> None:
        if self._decisions is not None:
            is_pinned = self._residency.is_pinned(load.blob)
            self._decisions.loading(load, is_pinned=is_pinned, is_likely=is_likely)

    # -- ending -------------------------------------------------------------------------------------

    def load_finished(self, load: Load, now_s: float) -> None:
        """The bytes are there; the views follow, unless nobody wants the blob any more."""
        blob, extent = load.blob, load.extent
        self._copies.load_finished(load, now_s)
        self._book.end(load, now_s)
        if extent is None:
            blob.life.to(BlobState.ABSENT, now_s, "in the host pool")
            self._residency.retries.start_anew(blob)
            self._residency.forget_if_unused(blob, now_s)
        else:
            self._residency.filled(blob, now_s, f"load {load.id}")

    def load_ended_empty(self, load: Load, now_s: float, why: str) -> None:
        """The load was cancelled or failed and its loader writes no more: its extents are free again."""
        self._copies.load_ended_empty(load, now_s, why)
        self._book.end(load, now_s)
        self._residency.drop_extent(load.blob, now_s, why)

    def load_failed(self, load: Load, now_s: float, why: str) -> None:
        """As `load_ended_empty`; a host copy that could not be read is not tried again."""
        self.load_ended_empty(load, now_s, why)
        if load.from_pool:
            self._copies.drop(load.blob, now_s, why)

    def fold_finished(self, fold: Folding, now_s: float) -> None:
        """The overlay is there; the views follow, unless nobody wants it any more."""
        self._end_fold(fold, now_s)
        self._residency.filled(fold.overlay, now_s, "folded")

    def fold_ended_empty(self, fold: Folding, now_s: float, why: str) -> None:
        """The fold was cancelled or failed, and the stage writes no more."""
        self._end_fold(fold, now_s)
        self._residency.drop_extent(fold.overlay, now_s, why)

    def _end_fold(self, fold: Folding, now_s: float) -> None:
        self._residency.folds.end()
        for blob in fold.sources:
            self._residency.release(blob, now_s, f"fold of {fold.overlay.key[:12]}")

    def loader_lost(self, loader_id: int, now_s: float, why: str) -> Blob | None:
        """Quarantine what the loader may still be writing to; returns the blob it was loading."""
        load = self._book.loader_lost(loader_id, now_s, why)
        if load is None:
            return None
        if load.extent is not None:
            load.extent.life.to(ExtentState.QUARANTINED, now_s, why)
            self._quarantine.hold(load.extent, loader_id)
        self._copies.loader_lost(load, now_s, why)
        load.blob.extent = None
        load.blob.life.to(BlobState.ABSENT, now_s, why)
        self._residency.evictables.mark([load.blob])
        self._residency.forget_if_unused(load.blob, now_s)
        return load.blob

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone: its quarantined extents are free after the grace period."""
        self._book.loader_reaped(loader_id, now_s)
        self._quarantine.loader_reaped(loader_id, now_s)
        self._copies.loader_reaped(loader_id, now_s)

    # -- time ---------------------------------------------------------------------------------------

    def pass_time(self, now_s: float) -> None:
        """Free what has been quarantined long enough; forget pauses that are over."""
        for extent in self._quarantine.release(now_s):
            self._residency.arena.release(extent, now_s, "quarantine over")
            self._residency.changes += 1
        self._copies.pass_time(now_s)
        self._residency.retries.pass_time(now_s)

    def deadlines(self) -> Iterator[float]:
        """When quarantines end and pauses between attempts are over."""
        yield from self._quarantine.deadlines()
        yield from self._copies.deadlines()
        yield from self._residency.retries.deadlines()

    def is_still(self) -> bool:
        """A loader is idle, and nothing will make room: no load, fold, lease, view, move or quarantine.

        What is on its way to the host pool only makes no room in the arena.
        """
        residency = self._residency
        return (
            all(load.extent is None for load in self._book.under_way.values())
            and residency.folds.under_way is None
            and not residency.leases
            and not self._quarantine
            and next(self._book.idle_loaders(), None) is not None
            and not any(self._is_settling(extent.blob) for extent in residency.arena)
        )

    def _is_settling(self, key: str) -> bool:
        """Its views are being built, or it is being moved: then it has an extent, as few of all blobs do."""
        blob = self._residency.blobs.get(key)
        return blob is not None and blob.state in (BlobState.VIEWING, BlobState.MOVING)
