"""While one request runs, the next ones' weights are on their way: an order becomes loads and folds.

Loads are started in this order: for what waits, for what an operator wants, for what is pinned, and at last,
into memory that nobody uses, for what is likely to be asked for. As long as something that waits finds no
loader or no room, nothing behind it is started; but loaders that are idle all the same bring what waits, and
then what is likely, as far as the host pool (`fetching.py`). An overlay is folded, one at a time, as soon as
what it is made of is resident.
"""

from collections.abc import Container, Iterator, Sequence
from enum import Enum

from understudyd.core.demand import Demand, is_pressing
from understudyd.core.entities import Blob, Folding, Load, Loader, Model
from understudyd.core.extents import Extent
from understudyd.core.fetching import Fetching
from understudyd.core.pace import Pace
from understudyd.core.policy import Policy
from understudyd.core.queueing import RequestQueue
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState
from understudyd.core.timely import Timely
from understudyd.core.transit import Transit
from understudyd.core.windows import Priced, cheapest_window

_MOST_NOTED = 1000


class _Lacks(Enum):
    """What keeps a model's weights from being on their way."""

    NOTHING = "nothing"
    LOADER = "loader"
    ROOM = "room"
    TURN = "turn"  # it is early, another overlay is being folded, or room was looked for at this event


class Lookahead:
    """Starts and stops loads and folds."""

    def __init__(
        self,
        policy: Policy,
        queue: RequestQueue,
        residency: Residency,
        transit: Transit,
        demand: Demand,
        timely: Timely,
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._timely = timely
        self._demand, self._wanted = demand, demand.wanted
        self._policy = policy
        self._queue = queue
        self._residency = residency
        self._transit = transit
        self._fetching = Fetching(policy, queue, residency, transit, demand, pace)
        self._no_room: dict[tuple[str, str], object] = {}
        self._settled: object = None
        self._put_off: Model | None = None
        self._guessed_at: int | None = None

    def start_loads(self, on_stage: str | None, stage_is_busy: bool, now_s: float) -> None:
        """Use idle loaders and room as well as can be."""
        is_early = self._put_off is None or self._timely.is_early(self._put_off, now_s)
        if is_early and self._settled == self._state(on_stage, stage_is_busy):
            if self._guessed_at not in (None, self._queue.arrivals):
                self._prefetch(now_s)
            return
        evictions = -1
        while evictions != self._residency.evictions:  # what was evicted may be missed: look again
            evictions = self._residency.evictions
            self._start_loads(on_stage, stage_is_busy, now_s)
            if self._pace.has_more:
                return
        self._settled = self._state(on_stage, stage_is_busy)

    def fetch(self, now_s: float) -> None:
        """Have loaders that are still idle fill the host pool."""
        if not self._timely.stage_awaits_load:
            self._fetching.start(now_s)

    def prices(self, model: Model) -> dict[Extent, float]:
        """What evicting each extent loses for a load on behalf of this model while nothing is on stage."""
        candidates = self._candidates(model, None)
        return {extent: price for price, extent in candidates}

    def stuck_on(self, stage_is_busy: bool, now_s: float) -> Model | None:
        """The model that cannot be loaded though nothing is under way that would change this."""
        if stage_is_busy or not (self._queue or self._wanted) or not self._transit.is_still():
            return None
        models = self._residency.models
        names = self._to_load(stage_is_busy, now_s) or list(self._wanted)
        model = models[names[0]] if names else None
        states = set() if model is None else {blob.state for blob in model.needed()}
        if model is None or BlobState.ABSENT not in states or BlobState.FETCHING in states:
            return None
        return None if self._residency.is_held_up(model, now_s) else model

    def cancel_needless(self, model: Model) -> None:
        """Stop loading, and folding, blobs of this model that nobody waits for."""
        for blob in model.all_blobs:
            if blob.load_id is not None and not self._is_needed(blob):
                self._residency.book.cancel(self._residency.loads[blob.load_id])
        fold = self._residency.folds.under_way
        if fold is not None and fold.overlay in model.blobs:
            self._cancel_if_needless(fold)

    # -- inside -------------------------------------------------------------------------------------

    def _state(self, on_stage: str | None, stage_is_busy: bool) -> object:
        """While this stands, whatever can be started has been."""
        return (
            self._residency.version(),
            self._queue.changes,
            self._queue.withdrawals,
            on_stage,
            stage_is_busy,
            tuple(self._wanted),
        )

    def _start_loads(self, on_stage: str | None, stage_is_busy: bool, now_s: float) -> None:
        residency, settings = self._residency, self._policy.settings
        models = residency.models
        self._guessed_at = self._put_off = None
        for name in [name for name in self._wanted if name in residency.ready]:
            del self._wanted[name]
        self._timely.stage_awaits_load = False
        if next(residency.idle_loaders(), None) is None and not residency.overlays:
            self._make_way_for_a_loader(on_stage, stage_is_busy, now_s)
            return
        for name in self._to_load(stage_is_busy, now_s):
            lacks = self._load(models[name], on_stage, now_s)
            if lacks is _Lacks.TURN:
                return
            if lacks is not _Lacks.NOTHING:
                if next(residency.idle_loaders(), None) is None:
                    self._make_way_for_a_loader(on_stage, stage_is_busy, now_s)
                else:
                    self._make_way()
                return
            if self._timely.keeps_others_waiting(models[name], now_s):
                return
        if not self._load_wanted(on_stage, now_s):
            return
        for model in residency.pinned.values():
            if not (model.name in residency.ready or model.is_unfit):
                self._load(model, on_stage, now_s)
        if self._pace.has_more:
            return
        if settings.prefetch and settings.lookahead:
            self._prefetch(now_s)

    def _to_load(self, stage_is_busy: bool, now_s: float) -> Sequence[str]:
        return self._timely.order(self._policy.to_load(self._demand, stage_is_busy), now_s)

    def _load(self, model: Model, on_stage: str | None, now_s: float) -> _Lacks:
        """Start loads, and a fold, for what the model lacks, as far as can be.

        Room lacks also while it is on its way to the host pool: what comes after waits all the same.
        """
        needed = model.needed()
        if any(blob.state is BlobState.FETCHING for blob in needed):
            return _Lacks.ROOM
        for blob in needed:
            if blob.state is not BlobState.ABSENT or blob.retry_at_s > now_s:
                continue
            if blob.is_overlay:
                lacks = self._fold(model, blob, on_stage, now_s)
            elif (loader := next(self._residency.idle_loaders(), None)) is not None:
                lacks = self._begin(model, blob, loader, on_stage, now_s)
            else:
                lacks = _Lacks.LOADER
            if lacks is not _Lacks.NOTHING:
                return lacks
        return _Lacks.NOTHING

    def _begin(self, model: Model, blob: Blob, loader: Loader, on_stage: str | None, now_s: float) -> _Lacks:
        """Start one load, if there is room for it."""
        beside = [b.info.size_bytes for b in model.blobs if b.state is BlobState.ABSENT and b is not blob]
        if (lacks := self._look_for_room(model, blob, on_stage, beside, now_s)) is not _Lacks.NOTHING:
            return lacks
        if self._transit.begin_load(blob, loader, self._candidates(model, on_stage), now_s, beside):
            return _Lacks.NOTHING
        self._note_no_room(model, blob, on_stage)
        return _Lacks.ROOM

    def _fold(self, model: Model, overlay: Blob, on_stage: str | None, now_s: float) -> _Lacks:
        """Start making an overlay, if what it is made of is there and there is room for it."""
        if not overlay.is_at_hand:
            return _Lacks.NOTHING
        if (fold := self._residency.folds.under_way) is not None:
            self._cancel_if_needless(fold)
            return _Lacks.TURN
        if (lacks := self._look_for_room(model, overlay, on_stage, (), now_s)) is not _Lacks.NOTHING:
            return lacks
        if self._transit.begin_fold(overlay, self._candidates(model, on_stage), now_s):
            return _Lacks.NOTHING
        self._note_no_room(model, overlay, on_stage)
        return _Lacks.ROOM

    def _cancel_if_needless(self, fold: Folding) -> None:
        if not self._is_needed(fold.overlay):
            self._residency.folds.cancel(fold)

    def _look_for_room(
        self, model: Model, blob: Blob, on_stage: str | None, beside: Sequence[int], now_s: float
    ) -> _Lacks:
        """Whether that is worth it, and may be done at this event. Into a gap a blob goes without."""
        arena = self._residency.arena
        if sum(map(arena.rounded, (blob.info.size_bytes, *beside))) <= arena.largest_gap_bytes:
            return _Lacks.NOTHING
        if self._timely.is_early(model, now_s):
            self._put_off = model
            return _Lacks.TURN
        if self._finds_no_room(model, blob, on_stage):
            return _Lacks.ROOM
        if not self._pace.may_go_on():
            return _Lacks.TURN
        self._pace.went_over(arena.extent_count)
        return _Lacks.NOTHING

    def _finds_no_room(self, model: Model, blob: Blob, on_stage: str | None) -> bool:
        """It found none, and nothing has changed since."""
        return self._no_room.get((model.name, blob.key)) == self._situation(model, blob, on_stage)

    def _note_no_room(self, model: Model, blob: Blob, on_stage: str | None) -> None:
        if len(self._no_room) >= _MOST_NOTED:
            self._no_room.clear()
        self._no_room[model.name, blob.key] = self._situation(model, blob, on_stage)

    def _candidates(self, model: Model, on_stage: str | None) -> Iterator[Priced]:
        """What may be evicted for it: nothing of what is loaded before it, also if it will run later."""
        candidates = self._policy.candidates(self._residency, self._demand, model.name, on_stage)
        kept = self._timely.loaded_before(model.name)
        return (found for found in candidates if found[1].blob not in kept) if kept else candidates

    def _situation(self, model: Model, blob: Blob, on_stage: str | None) -> object:
        """While this stands, a blob that found no room finds none.

        Who joins the queue, or goes on deck and is leased, makes no room; nor does time, but for who presses.
        To these, what is ready makes room as well, so they look again when one becomes it.
        """
        rank, residency = self._demand.need(model.name, on_stage), self._residency
        room: object
        if is_pressing(rank):
            room = residency.changes, residency.readiness
        else:
            residency.evictables.file()
            room = residency.evictables.arrivals + residency.arena.releases
        kept = self._timely.loaded_before(model.name)
        return blob.key, model.name, rank, room, self._queue.withdrawals, tuple(self._wanted), kept

    def _load_wanted(self, on_stage: str | None, now_s: float) -> bool:
        """False when one finds no loader or no room: nothing else may take what it waits for."""
        lacks = (self._load(self._residency.models[name], on_stage, now_s) for name in self._wanted)
        return all(lack is _Lacks.NOTHING for lack in lacks)

    def _make_way_for_a_loader(self, on_stage: str | None, stage_is_busy: bool, now_s: float) -> None:
        """All loaders are busy, as most of the time: only a load that may be stopped is worth a look."""
        if self._needless_load() is None and self._fetch_but_for(()) is None:
            return
        for name in self._to_load(stage_is_busy, now_s):
            model = self._residency.models[name]
            needed = model.needed()
            if any(blob.state is BlobState.FETCHING for blob in needed):
                return
            for blob in (blob for blob in needed if not blob.is_overlay):
                if blob.state is BlobState.ABSENT and blob.retry_at_s <= now_s:
                    self._make_way_for(model, blob, on_stage, now_s)
                    return

    def _make_way_for(self, model: Model, blob: Blob, on_stage: str | None, now_s: float) -> None:
        """Stop a load that nobody waits for; one to the host pool only if that is all that is wanting."""
        if self._is_stopping():
            return
        fetch = self._fetch_but_for(model.needed())
        if (needless := self._needless_load()) is not None:
            self._residency.book.cancel(needless)
        elif fetch is not None and self._has_room(model, blob, on_stage, now_s):
            self._residency.book.cancel(fetch)

    def _make_way(self) -> None:
        """What waits finds no room: stop a load, or the fold, that nobody waits for."""
        if not self._is_stopping() and (needless := self._needless_load()) is not None:
            self._residency.book.cancel(needless)
        elif (fold := self._residency.folds.under_way) is not None:
            self._cancel_if_needless(fold)

    def _is_stopping(self) -> bool:
        return any(load.is_cancelling for load in self._residency.loads.values())

    def _needless_load(self) -> Load | None:
        """A load into the arena that may be stopped."""
        loads = self._residency.loads.values()
        return next((x for x in loads if x.extent is not None and not self._is_needed(x.blob)), None)

    def _fetch_but_for(self, blobs: Container[Blob]) -> Load | None:
        """A load that goes no further than the host pool, of another blob than these."""
        loads = self._residency.loads.values()
        return next((x for x in loads if x.extent is None and x.blob not in blobs), None)

    def _has_room(self, model: Model, blob: Blob, on_stage: str | None, now_s: float) -> bool:
        if self._finds_no_room(model, blob, on_stage):
            return False
        arena, size_bytes = self._residency.arena, blob.info.size_bytes
        if arena.largest_gap_bytes >= arena.rounded(size_bytes):
            return True
        if self._timely.is_early(model, now_s):
            self._put_off = model
            return False
        self._pace.went_over(arena.extent_count)
        if cheapest_window(arena, size_bytes, self._candidates(model, on_stage)) is not None:
            return True
        self._note_no_room(model, blob, on_stage)
        return False

    def _is_needed(self, blob: Blob) -> bool:
        """A request waits for it, an operator wants it or it is pinned."""
        return self._demand.awaits(blob) or self._residency.is_pinned(blob)

    def _prefetch(self, now_s: float) -> None:
        """Idle loaders fill free memory with what is likeliest to be asked for; nothing is evicted."""
        residency = self._residency
        self._guessed_at = self._queue.arrivals
        if not residency.arena.largest_gap_bytes or residency.folds.under_way is not None:
            return
        if next(residency.idle_loaders(), None) is None and not residency.overlays:
            return
        for name in self._policy.forecast.ranked():
            model = residency.models[name]
            if name in residency.ready or model.is_unfit or model.was_out_of_reach:
                continue
            lacking = {b for b in model.needed() if b.state is BlobState.ABSENT}
            if any(b.retry_at_s > now_s for b in lacking):
                continue
            if (
                sum(residency.arena.rounded(b.info.size_bytes) for b in lacking)
                > residency.arena.largest_gap_bytes
            ):
                return
            residency.prepare(model, now_s)
            for blob in (b for b in model.needed() if b in lacking and b.state is BlobState.ABSENT):
                if not self._begin_guess(blob, now_s):
                    return

    def _begin_guess(self, blob: Blob, now_s: float) -> bool:
        """Load or fold it into free memory; False when that must wait, and what is less likely with it."""
        if blob.is_overlay:
            may_begin = blob.is_at_hand and self._residency.folds.under_way is None
            return may_begin and self._transit.begin_fold(blob, None, now_s)
        loader = next(self._residency.idle_loaders(), None)
        return loader is not None and self._transit.begin_load(blob, loader, None, now_s)
