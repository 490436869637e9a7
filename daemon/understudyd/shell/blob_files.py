"""Which file a load reads: the local store's, a local copy, or a read-only store's.

Nothing here touches a read-only store: its mount may hang, and this runs on the event loop. A store whose
last load failed comes after the others that have the blob.
"""

from dataclasses import dataclass
from pathlib import Path

from understudyd.core.actions import StartLoad
from understudyd.core.events import Event, LoadCancelled, LoaderLost, LoadFailed, LoadFinished
from understudyd.shell.places import BlobPlace
from understudyd.shell.read_through import ReadThrough
from understudyd.store.store import Store


@dataclass(frozen=True, slots=True)
class _Read:
    load_id: int
    place: BlobPlace
    path: Path
    store: Store | None  # the read-only store that is read
    is_copy: bool


class BlobFiles:
    """Chooses files for loads, follows how they end, and has copies made of what came from afar."""

    def __init__(self, own: Store, cache: ReadThrough | None) -> None:
        self.cache = cache
        self._own = own
        self._reads: dict[int, _Read] = {}  # by loader, which has one load at a time
        self._failing: set[Path] = set()

    def choose(self, order: StartLoad, place: BlobPlace) -> Path:
        """The file that this load is to read."""
        read = self._choose(order, place)
        self._reads[order.loader_id] = read
        return read.path

    def _choose(self, order: StartLoad, place: BlobPlace) -> _Read:
        sha256 = place.record.sha256
        path = self._own.blob_path(sha256)
        afar = [store for store in place.homes if store is not self._own]
        if order.from_pool or not afar or path.exists():
            return _Read(order.load_id, place, path, None, is_copy=False)
        copy = self.cache.use(sha256) if self.cache is not None else None
        if copy is not None:
            return _Read(order.load_id, place, copy, None, is_copy=True)
        store = min(afar, key=lambda store: store.path in self._failing)
        return _Read(order.load_id, place, store.blob_path(sha256), store, is_copy=False)

    def follow(self, event: Event) -> None:
        """Learn from how loads end; other events are ignored."""
        match event:
            case LoadFinished(load_id=load_id):
                self._finished(self._pop(load_id))
            case LoadFailed(load_id=load_id):
                self._failed(self._pop(load_id))
            case LoadCancelled(load_id=load_id):
                self._pop(load_id)
            case LoaderLost(loader_id=loader_id):
                self._reads.pop(loader_id, None)
            case _:
                pass

    def _pop(self, load_id: int) -> _Read | None:
        loader_id = next((i for i, read in self._reads.items() if read.load_id == load_id), None)
        return None if loader_id is None else self._reads.pop(loader_id)

    def _finished(self, read: _Read | None) -> None:
        if read is None or read.store is None:
            return
        self._failing.discard(read.store.path)
        if self.cache is not None:
            in_use = {r.place.record.sha256 for r in self._reads.values()}
            self.cache.want(read.place.record, read.path, in_use)

    def _failed(self, read: _Read | None) -> None:
        if read is None:
            return
        if read.store is not None:
            self._failing.add(read.store.path)
        elif read.is_copy and self.cache is not None:
            self.cache.drop(read.place.record.sha256)
