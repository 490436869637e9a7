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
from understudyd.core.extents import ArenaMap, Extent
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
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo

MAX_ATTEMPTS = 3
RETRY_AFTER_S = (0.1, 0.4)

Price = Callable[[Extent], float | None]
"""What evicting an extent loses; None when it must stay."""


class Residency:
    """Models, blobs, loads, loaders and the arena's map, always consistent with each other."""

    def __init__(self, arena_bytes: int, quarantine_grace_s: float, actions: list[Action]) -> None:
        self.arena = ArenaMap(arena_bytes)
        self.models: dict[str, Model] = {}
        self.pinned: dict[str, Model] = {}
        self.blobs: dict[str, Blob] = {}
        self.loads: dict[int, Load] = {}
        self.loaders: dict[int, Loader] = {}
        self.evictions = 0
        self._grace_s = quarantine_grace_s
        self._actions = actions
        self._quarantine: list[tuple[float | None, int, Extent]] = []
        self._retrying: set[Blob] = set()
        self._next_load_id = 0

    # -- models -------------------------------------------------------------------------------------

    def add_model(self, info: ModelInfo) -> Model:
        """A model that may be asked for. Its blobs are shared with every model that has the same."""
        if info.name in self.models:
            raise IllegalEvent(f"model {info.name} exists already")
        blobs = tuple(self._blob(blob) for blob in info.blobs)
        for blob in blobs:
            blob.models.add(info.name)
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

    def required_bytes(self, model: Model) -> int:
        """Arena bytes that must exist for the model to run beside everything pinned."""
        needed = set(model.blobs).union(*(other.blobs for other in self.pinned.values()))
        return sum(self.arena.rounded(b.info.size_bytes) for b in needed)

    def pin(self, model: Model, pinned: bool) -> None:
        """Keep the model's blobs in the arena once they are there, or stop doing so."""
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
        return bool(lacking) and (not self.loaders or any(b.retry_at_s > now_s for b in lacking))

    # -- leases and eviction ------------------------------------------------------------------------

    def lease(self, model: Model, now_s: float) -> None:
        """The model's blobs stay where they are until `unlease`."""
        for blob in model.blobs:
            assert blob.extent is not None
            if blob.extent.leases == 0:
                blob.extent.life.to(ExtentState.LEASED, now_s, model.name)
            blob.extent.leases += 1
        model.leases += 1

    def unlease(self, model: Model, now_s: float) -> None:
        """One use of the model's blobs has completed on the device."""
        for blob in model.blobs:
            assert blob.extent is not None
            blob.extent.leases -= 1
            if blob.extent.leases == 0:
                blob.extent.life.to(ExtentState.READY, now_s, model.name)
        model.leases -= 1

    def evict(self, blob: Blob, now_s: float, why: str) -> None:
        """Take a resident, unleased blob out of the arena."""
        extent = blob.extent
        assert extent is not None
        extent.life.require(ExtentState.READY)
        blob.life.to(BlobState.ABSENT, now_s, why)
        self._actions.append(DropViews(blob.key, extent.generation))
        self.arena.release(extent, now_s, why)
        blob.extent = None
        self.evictions += 1

    def evictable(self, extent: Extent) -> Blob | None:
        """The blob of an extent that may be evicted: ready, with views, not leased, not pinned."""
        blob = self.blobs.get(extent.blob)
        if blob is None or blob.extent is not extent or blob.state is not BlobState.RESIDENT:
            return None
        if extent.state is not ExtentState.READY or self.is_pinned(blob):
            return None
        return blob

    # -- loads --------------------------------------------------------------------------------------

    def idle_loaders(self) -> Iterator[Loader]:
        """Loaders that take a load now."""
        return (loader for loader in self.loaders.values() if loader.life.state is LoaderState.IDLE)

    def begin_load(
        self, blob: Blob, loader: Loader, pricing: Callable[[], Price] | None, now_s: float
    ) -> bool:
        """Start loading into a gap, or into the window that is cheapest to clear; False when no room.

        `pricing` makes the price function, which costs something, only when it is needed.
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
        blob.extent = None
        blob.life.to(BlobState.ABSENT, now_s, why)
        if not blob.models:
            self.blobs.pop(blob.key, None)

    def failed(self, blob: Blob, code: ErrorCode, now_s: float) -> bool:
        """Count a load that did not end well; True when the blob is given up for now.

        Wrong bytes get one second chance (a bad read), then the blob is DAMAGED until its models are
        added anew. Anything else is tried `MAX_ATTEMPTS` times with growing pauses.
        """
        blob.failures += 1
        limit = 2 if code is ErrorCode.MODEL_CORRUPT else MAX_ATTEMPTS
        if blob.failures < limit:
            blob.retry_at_s = now_s + RETRY_AFTER_S[blob.failures - 1]
            self._retrying.add(blob)
            return False
        blob.failures, blob.retry_at_s = 0, 0.0
        if code is ErrorCode.MODEL_CORRUPT:
            blob.life.to(BlobState.DAMAGED, now_s, "checksum")
        return True

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
        blob.life.to(BlobState.RESIDENT, now_s, "views built")
        blob.failures = 0
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
        self._quarantine.append((None, loader_id, load.extent))
        blob = load.blob
        blob.extent, blob.load_id = None, None
        blob.life.to(BlobState.ABSENT, now_s, why)
        if not blob.models:
            self.blobs.pop(blob.key, None)
        return blob

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone: its quarantined extents are free after the grace period."""
        loader = self.loaders.pop(loader_id, None)
        if loader is not None:
            loader.life.to(LoaderState.GONE, now_s, "reaped")
        self._quarantine = [
            (now_s + self._grace_s if owner == loader_id else at_s, owner, extent)
            for at_s, owner, extent in self._quarantine
        ]

    def release_quarantined(self, now_s: float) -> None:
        """Free what has been quarantined long enough."""
        kept = []
        for at_s, owner, extent in self._quarantine:
            if at_s is not None and at_s <= now_s:
                self.arena.release(extent, now_s, "quarantine over")
            else:
                kept.append((at_s, owner, extent))
        self._quarantine = kept

    # -- deadlines and invariants -------------------------------------------------------------------

    def deadlines(self, now_s: float) -> Iterable[float]:
        """When quarantines end and pauses between attempts are over."""
        yield from (at_s for at_s, _, _ in self._quarantine if at_s is not None)
        self._retrying = {b for b in self._retrying if b.retry_at_s > now_s}
        yield from (b.retry_at_s for b in self._retrying)

    @property
    def has_quarantine(self) -> bool:
        """Some extent waits for its dead loader."""
        return bool(self._quarantine)
