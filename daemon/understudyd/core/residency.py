"""What is in the arena: placed, viewed, leased, moved, evicted.

`Residency` keeps models and blobs consistent with each other and with the arena's map, and appends the
actions that make the world follow. It decides nothing: the machine says what to load (`transit.py`) and
prices evictions (`policy.py`), the catalogue which models there are (`catalogue.py`).
"""

from collections.abc import Iterable, Sequence

from understudyd.core.actions import (
    Action,
    BuildViews,
    DropViews,
    MoveExtent,
    PrepareModel,
)
from understudyd.core.copies import HostCopies
from understudyd.core.decisions import Decisions
from understudyd.core.demand import Demand
from understudyd.core.entities import Blob, Model
from understudyd.core.evictables import Evictables
from understudyd.core.extents import ArenaMap, Extent
from understudyd.core.folding import Folds
from understudyd.core.loads import Loads
from understudyd.core.placement import cheapest
from understudyd.core.retries import Retries
from understudyd.core.states import (
    BLOB_TABLE,
    BlobState,
    ExtentState,
    IllegalEvent,
    Lifecycle,
    PartsState,
)
from understudyd.core.types import BlobInfo
from understudyd.core.windows import Priced


class Residency:
    """Models, blobs and the arena's map, always consistent with each other.

    `book` has the loads under way and the loaders, `folds` the overlay that is being made. `ready` are the
    models that can go on deck, as `Model.is_ready` says; it is asked of very many at every event. `changes`
    counts what may make room: while it stands, what found no room finds none. `replacements` counts models
    that stand for other blobs now, `losses` evicted blobs of which nothing is left but the file. Of the blobs
    that came because they were likely, `guesses_used` were used and `guesses_wasted` evicted before.
    """

    def __init__(
        self,
        arena_bytes: int,
        pool_bytes: int,
        quarantine_grace_s: float,
        actions: list[Action],
        demand: Demand,
        decisions: Decisions | None = None,
    ) -> None:
        self.arena = ArenaMap(arena_bytes)
        self.models: dict[str, Model] = {}
        self.ready = demand.ready
        self.pinned: dict[str, Model] = {}
        self.blobs: dict[str, Blob] = {}
        self.overlays: dict[str, Blob] = {}
        self.evictables = Evictables(demand, self.models, self.pinned)
        self.copies = HostCopies(pool_bytes, quarantine_grace_s, demand, self.evictables)
        self.book = Loads(actions, decisions)
        self.loads = self.book.under_way
        self.loaders = self.book.loaders
        self.idle_loaders = self.book.idle_loaders
        self.folds = Folds(actions, decisions)
        self.evictions = self.losses = 0
        self.guesses_used = self.guesses_wasted = 0
        self.arrivals = 0
        self.readiness = 0
        self.retries = Retries()
        self.leases = 0
        self.changes = 0
        self.replacements = 0
        self._actions = actions
        self._decisions = decisions
        self._demand = demand

    # -- models -------------------------------------------------------------------------------------

    def blob(self, info: BlobInfo) -> Blob:
        """The blob of this content; a new one is nowhere."""
        blob = self.blobs.get(info.key)
        if blob is None:
            life = Lifecycle(f"blob {info.key[:12]}", BlobState.ABSENT, BLOB_TABLE)
            blob = self.blobs[info.key] = Blob(info, life)
            if info.made_of:
                self.overlays[info.key] = blob
        return blob

    def abandon(self, blob: Blob, now_s: float) -> None:
        """No model has this blob any more. Leases, a load, views end first, by their own events."""
        if blob.state is BlobState.RESIDENT:
            assert blob.extent is not None
            if not blob.extent.leases:
                self.evict(blob, now_s, "no model left")
        elif blob.load_id is not None:
            self.book.cancel(self.loads[blob.load_id])
        elif blob.state is BlobState.FOLDING:
            assert self.folds.under_way is not None
            self.folds.cancel(self.folds.under_way)
        self.forget_if_unused(blob, now_s)

    def forget_if_unused(self, blob: Blob, now_s: float) -> None:
        """No model has it and it is nowhere: it leaves no trace."""
        if not blob.models and blob.state in (BlobState.ABSENT, BlobState.DAMAGED):
            self.copies.drop(blob, now_s, "no model left")
            self.blobs.pop(blob.key, None)
            self.overlays.pop(blob.key, None)
            for source in blob.sources:
                source.overlays.pop(blob.key, None)

    def prepare(self, model: Model, now_s: float) -> None:
        """Have the model's small parts built, once."""
        if model.parts.state is PartsState.UNPREPARED:
            model.parts.to(PartsState.PREPARING, now_s)
            self._actions.append(PrepareModel(model.key))

    def note_ready(self, models: Iterable[Model]) -> None:
        """Something about these models has changed: those that can go on deck now are in `ready`."""
        for model in models:
            if model.is_ready and model.name not in self.ready:
                self.ready[model.name] = model
                self.readiness += 1
                self._demand.mark(model.name)

    def no_longer_ready(self, name: str) -> None:
        """The model cannot go on deck any more."""
        if self.ready.pop(name, None) is not None:
            self.readiness += 1
            self._demand.mark(name)

    def version(self) -> object:
        """While it is the same, nothing else can be loaded, and nothing else is ready."""
        book, folds, pauses = self.book.changes, self.folds.changes, self.retries.pauses
        changes = (self.changes, self.arrivals, self.evictions, self.readiness)
        return (*changes, book, folds, pauses, len(self.models))

    def required_bytes(self, model: Model) -> int:
        """Arena bytes that must exist for the model to run beside everything pinned."""
        models = (model, *self.pinned.values())
        needed = {blob for one in models for blob in one.all_blobs}
        return sum(self.arena.rounded(b.info.size_bytes) for b in needed)

    def pin(self, model: Model, pinned: bool) -> None:
        """Keep the model's blobs in the arena once they are there, or stop doing so."""
        self.changes += 1
        self.evictables.mark(model.blobs)
        self.evictables.mark(model.adapters)
        if pinned:
            self.pinned[model.name] = model
        else:
            self.pinned.pop(model.name, None)

    def is_pinned(self, blob: Blob) -> bool:
        """A pinned model needs this blob."""
        return bool(self.pinned) and not self.pinned.keys().isdisjoint(blob.users)

    def is_held_up(self, model: Model, now_s: float) -> bool:
        """Nothing can be done for the model now: a pause after a failed load, or no loader lives."""
        lacking = [b for b in model.needed() if b.state is BlobState.ABSENT]
        if any(b.retry_at_s > now_s for b in lacking):
            return True
        return any(not b.is_overlay for b in lacking) and not self.book.has_loader()

    # -- leases and eviction ------------------------------------------------------------------------

    def lease(self, model: Model, now_s: float) -> None:
        """The model's blobs stay where they are until `unlease`."""
        for blob in model.blobs:
            self.hold(blob, now_s, model.key)
        model.leases += 1
        self.leases += 1

    def unlease(self, model: Model, now_s: float) -> None:
        """One use of the model's blobs has completed on the device."""
        for blob in model.blobs:
            self.release(blob, now_s, model.key)
        model.leases -= 1
        self.leases -= 1

    def hold(self, blob: Blob, now_s: float, why: str) -> None:
        """A resident blob stays where it is until `release`, once for each time."""
        extent = blob.extent
        assert extent is not None
        if extent.leases == 0:
            extent.life.to(ExtentState.LEASED, now_s, why)
            self.evictables.mark([blob])
        extent.leases += 1
        if blob.is_guess:
            blob.is_guess = False
            self.guesses_used += 1

    def release(self, blob: Blob, now_s: float, why: str) -> None:
        """One use of the blob is over."""
        extent = blob.extent
        assert extent is not None
        extent.leases -= 1
        self.changes += 1
        if extent.leases == 0:
            extent.life.to(ExtentState.READY, now_s, why)
            self.evictables.mark([blob])
            if not blob.models:
                self.abandon(blob, now_s)

    def evict(self, blob: Blob, now_s: float, why: str) -> None:
        """Take a resident, unleased blob out of the arena."""
        if self._decisions is not None:
            self._decisions.evicted([(blob, None)], "", why)
        self._take_out(blob, now_s, why)

    def _take_out(self, blob: Blob, now_s: float, why: str) -> None:
        extent = blob.extent
        assert extent is not None
        extent.life.require(ExtentState.READY)
        blob.life.to(BlobState.ABSENT, now_s, why)
        self._actions.append(DropViews(blob.key, extent.generation))
        self.arena.release(extent, now_s, why)
        blob.extent = None
        self.evictables.mark(blob.sources)
        self._no_longer_ready(blob)
        self.evictions += 1
        self.guesses_wasted += blob.is_guess
        self.losses += not (blob.has_copy or blob.is_overlay)
        self.changes += 1

    def _no_longer_ready(self, blob: Blob) -> None:
        self.evictables.mark([blob])
        if not blob.overlays:  # nobody runs with an adapter
            for name in blob.models:
                self.no_longer_ready(name)

    def evictable(self, extent: Extent) -> Blob | None:
        """The blob of an extent that may be evicted: ready, with views, not leased, not pinned."""
        blob = self.blobs.get(extent.blob)
        return (
            blob if blob is not None and blob.extent is extent and self.evictables.may_leave(blob) else None
        )

    def begin_move(self, blob: Blob, now_s: float) -> None:
        """Move a resident, unleased blob down into the gap before it."""
        extent = blob.extent
        assert extent is not None
        blob.life.to(BlobState.MOVING, now_s, "moving")
        self._actions.append(DropViews(blob.key, extent.generation))
        self._no_longer_ready(blob)
        offset, size_bytes = extent.offset, extent.size_bytes
        self.arena.begin_slide(extent, now_s)
        self._actions.append(MoveExtent(blob.key, offset, extent.offset, size_bytes, extent.generation))

    def moving(self, key: str, generation: int) -> Blob:
        """The blob that is being moved. Raises `IllegalEvent`."""
        return self._in_state(key, generation, BlobState.MOVING)

    def moved(self, blob: Blob, now_s: float) -> None:
        """The bytes are at their new place; views follow."""
        assert blob.extent is not None
        self.arena.end_slide(blob.extent, self.arena.rounded(blob.info.size_bytes), now_s)
        self.changes += 1
        blob.life.to(BlobState.VIEWING, now_s, "moved")
        self._view_or_drop(blob, blob.extent, now_s)

    def move_failed(self, blob: Blob, now_s: float, why: str) -> None:
        """The bytes are lost, the blob must be loaded again."""
        self.drop_extent(blob, now_s, why)

    # -- room ---------------------------------------------------------------------------------------

    def place(
        self, blob: Blob, candidates: Iterable[Priced] | None, now_s: float, beside: Sequence[int]
    ) -> Extent | None:
        """A gap, or the window that is cheapest to clear of `candidates`, with room for those `beside` it."""
        arena, size_bytes = self.arena, blob.info.size_bytes
        extent = arena.allocate(size_bytes, blob.key, sum(map(arena.rounded, beside)))
        if extent is not None or candidates is None:
            return extent
        window, room_bytes = cheapest(arena, size_bytes, beside, candidates)
        if not room_bytes and (extent := arena.allocate(size_bytes, blob.key)) is not None:
            return extent
        if window is None:
            if self._decisions is not None:
                self._decisions.found_no_room(blob, arena.free_bytes, arena.largest_gap_bytes)
            return None
        victims = [self.blobs[victim.blob] for victim in window.victims]
        if self._decisions is not None:
            self._decisions.evicted(zip(victims, window.prices), blob.key, "", window.cost)
        for victim in victims:
            self._take_out(victim, now_s, f"room for {blob.key[:12]}")
        return arena.allocate(size_bytes, blob.key, room_bytes)

    def drop_extent(self, blob: Blob, now_s: float, why: str) -> None:
        """What is, or was to be, in the blob's place is of no use, and nobody writes there."""
        if blob.extent is not None:
            self.arena.release(blob.extent, now_s, why)
            self.changes += 1
            blob.extent = None
        blob.life.to(BlobState.ABSENT, now_s, why)
        self.evictables.mark((blob, *blob.sources))
        self.forget_if_unused(blob, now_s)

    # -- views --------------------------------------------------------------------------------------

    def viewing(self, key: str, generation: int) -> Blob:
        """The blob whose views of that generation are being built. Raises `IllegalEvent`."""
        return self._in_state(key, generation, BlobState.VIEWING)

    def _in_state(self, key: str, generation: int, state: BlobState) -> Blob:
        blob = self.blobs.get(key)
        if blob is None or blob.extent is None or blob.extent.generation != generation:
            raise IllegalEvent(f"{key[:12]} has no extent of generation {generation}")
        blob.life.require(state)
        return blob

    def filled(self, blob: Blob, now_s: float, why: str) -> None:
        """The bytes are there; the views follow, unless nobody wants the blob any more."""
        assert blob.extent is not None
        blob.extent.life.to(ExtentState.READY, now_s, why)
        blob.life.to(BlobState.VIEWING, now_s, why)
        self.evictables.mark(blob.sources)
        self._view_or_drop(blob, blob.extent, now_s)

    def _view_or_drop(self, blob: Blob, extent: Extent, now_s: float) -> None:
        if blob.models:
            self._actions.append(BuildViews(blob.key, extent.offset, extent.generation))
        else:
            self.drop_extent(blob, now_s, "no model left")

    def views_built(self, blob: Blob, now_s: float) -> None:
        """The blob is resident."""
        self.changes += 1
        self.arrivals += 1
        blob.life.to(BlobState.RESIDENT, now_s, "views built")
        self.evictables.mark([blob])
        self.retries.start_anew(blob)
        self.note_ready(self.models[name] for name in sorted(blob.models))
        if not blob.models:
            self.abandon(blob, now_s)

    def views_failed(self, blob: Blob, now_s: float, why: str) -> None:
        """The extent is of no use."""
        assert blob.extent is not None
        self._actions.append(DropViews(blob.key, blob.extent.generation))
        self.drop_extent(blob, now_s, why)
