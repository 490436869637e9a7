"""What is in the arena, what is on its way, and who moves it.

`Residency` keeps models, blobs, loads and loaders consistent with each other and with the arena's map,
and appends the actions that make the world follow. It decides nothing: the machine says what to load
and prices evictions (`policy.py`).
"""

from collections.abc import Callable, Iterable, Iterator

from understudyd.core.actions import (
    Action,
    BuildViews,
    CancelLoad,
    DropViews,
    ForgetModel,
    PrepareModel,
    RetireModel,
    StartLoad,
)
from understudyd.core.entities import Blob, Load, Loader, Model
from understudyd.core.extents import ArenaMap, Extent, Prices
from understudyd.core.quarantine import Quarantine
from understudyd.core.retries import Retries
from understudyd.core.states import (
    BLOB_TABLE,
    LOADER_TABLE,
    PARTS_TABLE,
    BlobState,
    ExtentState,
    IllegalEvent,
    Lifecycle,
    LoaderState,
    PartsState,
)
from understudyd.core.types import BlobInfo, ModelInfo


class Residency:
    """Models, blobs, loads, loaders and the arena's map, always consistent with each other.

    `ready` are the models that can go on deck, as `Model.is_ready` says; it is asked of very many at every
    event. `changes` counts what may make room: while it stands, what found no room finds none.
    """

    def __init__(self, arena_bytes: int, quarantine_grace_s: float, actions: list[Action]) -> None:
        self.arena = ArenaMap(arena_bytes)
        self.models: dict[str, Model] = {}
        self.ready: dict[str, Model] = {}
        self.pinned: dict[str, Model] = {}
        self.blobs: dict[str, Blob] = {}
        self.loads: dict[int, Load] = {}
        self.loaders: dict[int, Loader] = {}
        self.evictions = 0
        self.retries = Retries()
        self.leases = 0
        self.changes = 0
        self._actions = actions
        self._quarantine = Quarantine(quarantine_grace_s)
        self._next_load_id = 0

    # -- models -------------------------------------------------------------------------------------

    def add_model(self, info: ModelInfo, now_s: float) -> Model:
        """A model that may be asked for. Its blobs are shared with every model that has the same."""
        if info.name in self.models:
            raise IllegalEvent(f"model {info.name} exists already")
        for known in (self.blobs[blob.key].info for blob in info.blobs if blob.key in self.blobs):
            if known not in info.blobs:
                raise IllegalEvent(f"blob {known.key[:12]} of {info.name} has another size than before")
        blobs = tuple(self._blob(blob) for blob in info.blobs)
        for blob in blobs:
            blob.models.add(info.name)
            if blob.state is BlobState.DAMAGED:
                blob.life.to(BlobState.ABSENT, now_s, f"{info.name} was added anew")
        parts = Lifecycle(f"parts of {info.name}", PartsState.UNPREPARED, PARTS_TABLE)
        model = self.models[info.name] = Model(info, blobs, parts)
        return model

    def _blob(self, info: BlobInfo) -> Blob:
        blob = self.blobs.get(info.key)
        if blob is None:
            life = Lifecycle(f"blob {info.key[:12]}", BlobState.ABSENT, BLOB_TABLE)
            blob = self.blobs[info.key] = Blob(info, life)
        return blob

    def retire_if_unused(self, model: Model, now_s: float) -> bool:
        """Let go of a retiring model nobody uses; blobs that no model is left for leave the arena."""
        if not model.retiring or model.leases or model.parts.state is PartsState.PREPARING:
            return False
        del self.models[model.name]
        self.ready.pop(model.name, None)
        for blob in model.blobs:
            blob.models.discard(model.name)
            if not blob.models:
                self._abandon(blob, now_s)
        self._actions += [ForgetModel(model.name), RetireModel(model.name)]
        return True

    def _abandon(self, blob: Blob, now_s: float) -> None:
        """No model has this blob any more. A load or views under way end first, by their own events."""
        if blob.state is BlobState.RESIDENT:
            self.evict(blob, now_s, "no model left")
        elif blob.state is BlobState.LOADING and blob.load_id is not None:
            self.cancel_load(self.loads[blob.load_id])
        if blob.state in (BlobState.ABSENT, BlobState.DAMAGED):
            self.blobs.pop(blob.key, None)

    def prepare(self, model: Model, now_s: float) -> None:
        """Have the model's small parts built, once."""
        if model.parts.state is PartsState.UNPREPARED:
            model.parts.to(PartsState.PREPARING, now_s)
            self._actions.append(PrepareModel(model.name))

    def parts_prepared(self, model: Model, now_s: float) -> None:
        """The model's small parts are at hand."""
        model.parts.to(PartsState.PREPARED, now_s)
        self._note_ready([model])

    def _note_ready(self, models: Iterable[Model]) -> None:
        self.ready |= {model.name: model for model in models if model.is_ready}

    def required_bytes(self, model: Model) -> int:
        """Arena bytes that must exist for the model to run beside everything pinned."""
        needed = set(model.blobs).union(*(other.blobs for other in self.pinned.values()))
        return sum(self.arena.rounded(b.info.size_bytes) for b in needed)

    def pin(self, model: Model, pinned: bool) -> None:
        """Keep the model's blobs in the arena once they are there, or stop doing so."""
        self.changes += 1
        if pinned:
            self.pinned[model.name] = model
        else:
            self.pinned.pop(model.name, None)

    def is_pinned(self, blob: Blob) -> bool:
        """A pinned model has this blob."""
        return not self.pinned.keys().isdisjoint(blob.models)

    def is_held_up(self, model: Model, now_s: float) -> bool:
        """Nothing can be done for the model now: a pause after a failed load, or no loader lives."""
        lacking = [b for b in model.blobs if b.state is BlobState.ABSENT]
        return bool(lacking) and (not self._has_loader() or any(b.retry_at_s > now_s for b in lacking))

    def _has_loader(self) -> bool:
        """Some loader lives. A lost one is still known until it is reaped."""
        return any(x.life.state in (LoaderState.IDLE, LoaderState.BUSY) for x in self.loaders.values())

    # -- leases and eviction ------------------------------------------------------------------------

    def lease(self, model: Model, now_s: float) -> None:
        """The model's blobs stay where they are until `unlease`."""
        for blob in model.blobs:
            assert blob.extent is not None
            if blob.extent.leases == 0:
                blob.extent.life.to(ExtentState.LEASED, now_s, model.name)
            blob.extent.leases += 1
        model.leases += 1
        self.leases += 1

    def unlease(self, model: Model, now_s: float) -> None:
        """One use of the model's blobs has completed on the device."""
        for blob in model.blobs:
            assert blob.extent is not None
            blob.extent.leases -= 1
            if blob.extent.leases == 0:
                blob.extent.life.to(ExtentState.READY, now_s, model.name)
        model.leases -= 1
        self.leases -= 1
        self.changes += 1

    def evict(self, blob: Blob, now_s: float, why: str) -> None:
        """Take a resident, unleased blob out of the arena."""
        extent = blob.extent
        assert extent is not None
        extent.life.require(ExtentState.READY)
        blob.life.to(BlobState.ABSENT, now_s, why)
        self._actions.append(DropViews(blob.key, extent.generation))
        self.arena.release(extent, now_s, why)
        blob.extent = None
        for name in blob.models:
            self.ready.pop(name, None)
        self.evictions += 1
        self.changes += 1

    def evictable(self, extent: Extent) -> Blob | None:
        """The blob of an extent that may be evicted: ready, with views, not leased, not pinned."""
        if extent.life.state is not ExtentState.READY:
            return None
        blob = self.blobs.get(extent.blob)
        if blob is None or blob.extent is not extent or blob.life.state is not BlobState.RESIDENT:
            return None
        return None if self.pinned and self.is_pinned(blob) else blob

    def make_room(self, model: Model, now_s: float) -> bool:
        """Against fragmentation: evict all that may be evicted, if then the model's blobs find room.

        For when nothing is under way. What is pinned stays, and may leave no gap that is large enough.
        """
        sizes = {
            b.key: b.info.size_bytes for b in model.blobs if b.extent is None or self.evictable(b.extent)
        }
        if not self.arena.would_fit(sizes.values(), kept=lambda extent: self.evictable(extent) is None):
            return False
        for extent in list(self.arena):
            blob = self.evictable(extent)
            if blob is not None:
                self.evict(blob, now_s, "fragmentation")
        return True

    # -- loads --------------------------------------------------------------------------------------

    def idle_loaders(self) -> Iterator[Loader]:
        """Loaders that take a load now."""
        return (loader for loader in self.loaders.values() if loader.life.state is LoaderState.IDLE)

    def begin_load(
        self, blob: Blob, loader: Loader, pricing: Callable[[], Prices] | None, now_s: float
    ) -> bool:
        """Start loading into a gap, or into the window that is cheapest to clear; False when no room.

        `pricing` prices what may be evicted, which costs something, only when it is needed.
        """
        extent = self.arena.allocate(blob.info.size_bytes, blob.key)
        if extent is None and pricing is not None:
            window = self.arena.cheapest_window(blob.info.size_bytes, pricing())
            if window is not None:
                for victim in window.victims:
                    self.evict(self.blobs[victim.blob], now_s, f"room for {blob.key[:12]}")
                extent = self.arena.allocate(blob.info.size_bytes, blob.key)
                assert extent is not None
        if extent is None:
            return False
        self._next_load_id += 1
        load = Load(self._next_load_id, blob, loader.id, extent, now_s)
        blob.life.to(BlobState.LOADING, now_s, f"load {load.id}")
        loader.life.to(LoaderState.BUSY, now_s, f"load {load.id}")
        blob.extent, blob.load_id, loader.load_id = extent, load.id, load.id
        self.loads[load.id] = load
        self._actions.append(
            StartLoad(load.id, loader.id, blob.key, extent.offset, blob.info.size_bytes, extent.generation)
        )
        return True

    def cancel_load(self, load: Load) -> None:
        """Ask the loader to stop between two chunks."""
        if not load.is_cancelling:
            load.is_cancelling = True
            self._actions.append(CancelLoad(load.id))

    def load(self, load_id: int) -> Load:
        """The load of that id. Raises `IllegalEvent` when there is none."""
        if load_id not in self.loads:
            raise IllegalEvent(f"load {load_id} is not under way")
        return self.loads[load_id]

    def load_finished(self, load: Load, now_s: float) -> None:
        """The bytes are there; the views follow, unless nobody wants the blob any more."""
        blob, extent = load.blob, load.extent
        extent.life.to(ExtentState.READY, now_s, f"load {load.id}")
        blob.life.to(BlobState.VIEWING, now_s, f"load {load.id}")
        self._end_load(load, now_s)
        if blob.models:
            self._actions.append(BuildViews(blob.key, extent.offset, extent.generation))
        else:
            self._drop_extent(blob, now_s, "no model left")

    def load_ended_empty(self, load: Load, now_s: float, why: str) -> None:
        """The load was cancelled or failed and its loader writes no more: the extent is free again."""
        self._end_load(load, now_s)
        self._drop_extent(load.blob, now_s, why)

    def _end_load(self, load: Load, now_s: float) -> None:
        del self.loads[load.id]
        load.blob.load_id = None
        loader = self.loaders[load.loader_id]
        loader.load_id = None
        loader.life.to(LoaderState.IDLE, now_s, f"load {load.id} ended")

    def _drop_extent(self, blob: Blob, now_s: float, why: str) -> None:
        assert blob.extent is not None
        self.arena.release(blob.extent, now_s, why)
        self.changes += 1
        blob.extent = None
        blob.life.to(BlobState.ABSENT, now_s, why)
        if not blob.models:
            self.blobs.pop(blob.key, None)

    # -- views --------------------------------------------------------------------------------------

    def viewing(self, key: str, generation: int) -> Blob:
        """The blob whose views of that generation are being built. Raises `IllegalEvent`."""
        blob = self.blobs.get(key)
        if blob is None or blob.extent is None or blob.extent.generation != generation:
            raise IllegalEvent(f"no views of {key[:12]} generation {generation} are being built")
        blob.life.require(BlobState.VIEWING)
        return blob

    def views_built(self, blob: Blob, now_s: float) -> None:
        """The blob is resident."""
        self.changes += 1
        blob.life.to(BlobState.RESIDENT, now_s, "views built")
        self.retries.start_anew(blob)
        self._note_ready(self.models[name] for name in sorted(blob.models))
        if not blob.models:
            self._abandon(blob, now_s)

    def views_failed(self, blob: Blob, now_s: float, why: str) -> None:
        """The extent is of no use."""
        assert blob.extent is not None
        self._actions.append(DropViews(blob.key, blob.extent.generation))
        self._drop_extent(blob, now_s, why)

    # -- loaders ------------------------------------------------------------------------------------

    def loader_ready(self, loader_id: int) -> None:
        """A new loader takes loads."""
        if loader_id in self.loaders:
            raise IllegalEvent(f"loader {loader_id} is known already: {self.loaders[loader_id].life.story()}")
        life = Lifecycle(f"loader {loader_id}", LoaderState.IDLE, LOADER_TABLE)
        self.loaders[loader_id] = Loader(loader_id, life)

    def loader_lost(self, loader_id: int, now_s: float, why: str) -> Blob | None:
        """Quarantine what the loader may still be writing to; returns the blob it was loading.

        A loader that never became ready is not known here: nothing to do.
        """
        loader = self.loaders.get(loader_id)
        if loader is None:
            return None
        loader.life.to(LoaderState.LOST, now_s, why)
        if loader.load_id is None:
            return None
        load = self.loads.pop(loader.load_id)
        loader.load_id = None
        load.extent.life.to(ExtentState.QUARANTINED, now_s, why)
        self._quarantine.hold(load.extent, loader_id)
        blob = load.blob
        blob.extent, blob.load_id = None, None
        blob.life.to(BlobState.ABSENT, now_s, why)
        if not blob.models:
            self.blobs.pop(blob.key, None)
        return blob

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone: its quarantined extents are free after the grace period."""
        loader = self.loaders.get(loader_id)
        if loader is not None:
            loader.life.to(LoaderState.GONE, now_s, "reaped")
            del self.loaders[loader_id]
        self._quarantine.loader_reaped(loader_id, now_s)

    # -- time ---------------------------------------------------------------------------------------

    def pass_time(self, now_s: float) -> None:
        """Free what has been quarantined long enough; forget pauses that are over."""
        for extent in self._quarantine.release(now_s):
            self.arena.release(extent, now_s, "quarantine over")
            self.changes += 1
        self.retries.pass_time(now_s)

    def deadlines(self) -> Iterator[float]:
        """When quarantines end and pauses between attempts are over."""
        yield from self._quarantine.deadlines()
        yield from self.retries.deadlines()

    def is_still(self) -> bool:
        """A loader is idle, and nothing under way will make room: no load, lease, view or quarantine."""
        return (
            not self.loads
            and not self.leases
            and not self._quarantine
            and next(self.idle_loaders(), None) is not None
            and not any(b.state is BlobState.VIEWING for b in self.blobs.values())
        )
