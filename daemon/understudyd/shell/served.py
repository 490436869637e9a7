"""The models that are served: what each name stands for, and the editions that somebody still uses."""

from itertools import count
from pathlib import Path

from understudyd.core.types import BlobInfo, ModelInfo
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.places import BlobPlaces
from understudyd.store.records import ModelRecord
from understudyd.store.union import FoundModel, StoreUnion


class ServedModels:
    """`records` by name; `editions` by key, see `ModelInfo.key`. To the stage this is its store.

    Changed by the event loop's thread only, read by the stage's, too: nothing is changed while it is walked.
    """

    def __init__(self, stores: StoreUnion, settings: ModelSettings) -> None:
        self.records: dict[str, ModelRecord] = {}
        self.editions: dict[str, FoundModel] = {}
        self.places = BlobPlaces()
        self._keys: dict[str, str] = {}
        self._settings = settings
        self.signature = stores.signature

    # -- what the stage reads, by key ---------------------------------------------------------------

    def model(self, key: str) -> ModelRecord:
        """One edition's record. Raises KeyError when it is not served any more."""
        return self.editions[key].record

    def models(self) -> dict[str, ModelRecord]:
        """A copy, because the original may change while the caller walks it."""
        return {key: edition.record for key, edition in self.editions.copy().items()}

    def model_folder(self, key: str) -> Path:
        """Where the edition's small files are, or were before it was replaced."""
        edition = self.editions[key]
        return edition.home.model_folder(edition.record.name)

    # -- editions -----------------------------------------------------------------------------------

    def current(self, name: str) -> FoundModel:
        """What the name stands for. Raises KeyError."""
        return self.editions[self._keys[name]]

    def current_key(self, name: str) -> str:
        """The edition that the name stands for. Raises KeyError."""
        return self._keys[name]

    def enter(self, found: FoundModel) -> ModelInfo:
        """Keep an edition under a number that no other of its name has; returns what the core is told."""
        record = found.record
        blobs = tuple(BlobInfo(c.blob.sha256, c.blob.size_bytes) for c in record.components)
        max_batch = self._settings.of(record.name).max_batch
        infos = (ModelInfo(record.name, blobs, number, max_batch) for number in count())
        info = next(info for info in infos if info.key not in self.editions)
        self.editions[info.key] = found
        for component in record.components:
            self.places.claim(component.blob, f"{record.name} {component.name}", found.home)
        return info

    def adopt(self, name: str, key: str) -> None:
        """From now on the name stands for this edition."""
        self._keys[name] = key
        self.records[name] = self.editions[key].record

    def forget_name(self, name: str) -> FoundModel:
        """The name stands for nothing any more; returns its last edition."""
        del self.records[name]
        return self.forget(self._keys.pop(name))

    def forget(self, key: str) -> FoundModel:
        """Nobody uses this edition any more."""
        gone = self.editions.pop(key)
        for component in gone.record.components:
            self.places.release(component.blob.sha256)
        return gone
