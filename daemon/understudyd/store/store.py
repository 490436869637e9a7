"""Reading a store folder: which models it has, their records, where their bytes are.

Nothing here is locked: models appear and disappear by one rename, so a reader sees a model whole or not
at all. Whoever wants to change the store takes `Store.writing()`, one process at a time.
The layout is described in `understudyd.store.records`.
"""

import logging
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from understudyd.store.errors import StoreError, StoreErrorCode, translated_write_errors
from understudyd.store.records import FORMAT_VERSION, BlobRecord, ModelRecord, SignatureRecord
from understudyd.store.usage import Usage

if TYPE_CHECKING:
    from understudyd.store.writer import Writer

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE_ID = re.compile(r"[0-9a-f]{32}")
_FOLDERS = ("blobs", "signatures", "models", "tmp")
_Record = TypeVar("_Record", ModelRecord, SignatureRecord)


def check_name(name: str) -> str:
    """Return `name` if it may name a model. Raises `StoreError(bad_name)`."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            StoreErrorCode.BAD_NAME,
            f"{name!r:.80} cannot name a model: use 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit",
        )
    return name


def is_store(folder: Path) -> bool:
    """Whether `folder` is laid out as a store is."""
    return all((folder / name).is_dir() for name in _FOLDERS)


class Store:
    """A store folder. Safe to use while another process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.usage = Usage(path / "serving.lock")
        self._signatures: dict[str, SignatureRecord] = {}
        self._model_decoder = msgspec.json.Decoder(ModelRecord)
        self._signature_decoder = msgspec.json.Decoder(SignatureRecord)

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> Self:
        """Open the store at `path`; a writable one is created when it is not there.

        Raises `StoreError`: `not_found`, or `disk_full`/`io_error` when it cannot be created.
        """
        if writable:
            with translated_write_errors(f"cannot create the store {path}"):
                for folder in _FOLDERS:
                    (path / folder).mkdir(parents=True, exist_ok=True)
        elif not (path / "models").is_dir():
            raise StoreError(
                StoreErrorCode.NOT_FOUND,
                f"there is no store at {path}; add a model first (understudyd ingest --store {path} ...)",
            )
        return cls(path)

    # -- where things are --------------------------------------------------------------------------

    def blob_path(self, sha256: str) -> Path:
        """Where the blob of this content is, whether or not it exists."""
        if not _SHA256.fullmatch(sha256):
            raise StoreError(StoreErrorCode.CORRUPT_STORE, f"{sha256!r:.80} is no blob's name")
        return self.path / "blobs" / f"{sha256}.safetensors"

    def signature_path(self, signature_id: str) -> Path:
        """Where the signature of this id is, whether or not it exists."""
        if not _SIGNATURE_ID.fullmatch(signature_id):
            raise StoreError(StoreErrorCode.CORRUPT_STORE, f"{signature_id!r:.80} is no signature's id")
        return self.path / "signatures" / f"{signature_id}.json"

    def model_folder(self, name: str) -> Path:
        """The folder of a model's manifest and small files, whether or not it exists."""
        return self.path / "models" / check_name(name)

    # -- what there is -----------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every model's name, sorted, the damaged ones included."""
        return sorted(entry.name for entry in (self.path / "models").iterdir() if _NAME.fullmatch(entry.name))

    def models(self) -> dict[str, ModelRecord]:
        """Every usable model by name. Damaged ones are logged and left out; see `damaged`."""
        found, damaged = self.scan()
        for name, why in damaged.items():
            _log.warning("model %s is left out: %s", name, why)
        return found

    def damaged(self) -> dict[str, str]:
        """Why each model that `models` leaves out cannot be used."""
        return self.scan()[1]

    def scan(self) -> tuple[dict[str, ModelRecord], dict[str, str]]:
        """`models` and `damaged` in one walk, without logging."""
        found: dict[str, ModelRecord] = {}
        damaged: dict[str, str] = {}
        for name in self.names():
            try:
                found[name] = self.model(name)
            except StoreError as error:
                if error.code is not StoreErrorCode.NOT_FOUND:  # removed since it was listed
                    damaged[name] = error.message
        return found, damaged

    def model(self, name: str) -> ModelRecord:
        """Read one model's manifest, afresh each time: this is also how a reader follows a change.

        Raises `StoreError`: `bad_name`, `not_found`, or `corrupt_store` when its manifest cannot be read, a
        signature is missing or a blob file is missing, of the wrong length or no regular file.
        """
        folder = self.model_folder(name)
        if not folder.is_dir():
            raise StoreError(
                StoreErrorCode.NOT_FOUND, f"the store has no model {name!r}; see its list of models"
            )
        record = self.manifest(name)
        for component in record.components:
            self.signature(component.signature)
            self._check_blob(component.blob)
        return record

    def manifest(self, name: str) -> ModelRecord:
        """A model's manifest as it is now, whatever it names. Raises `StoreError`."""
        record = self._read(self.model_folder(name) / "manifest.json", self._model_decoder)
        if record.name != name:
            raise _damaged(f"the manifest of {name} names {record.name!r:.80}")
        return record

    def signature(self, signature_id: str) -> SignatureRecord:
        """The shape of a component; cached, because a signature never changes. Raises `StoreError`."""
        if signature_id not in self._signatures:
            record = self._read(self.signature_path(signature_id), self._signature_decoder)
            if record.id != signature_id:
                raise _damaged(f"the signature {signature_id} names itself {record.id!r:.80}")
            self._signatures[signature_id] = record
        return self._signatures[signature_id]

    # -- changing it -------------------------------------------------------------------------------

    @contextmanager
    def writing(self, keep: Collection[str] = ()) -> "Iterator[Writer]":
        """Hold the writer lock: clears what a crash left behind, then yields the `Writer`.

        Blobs named in `keep` stay, though no model has them.
        Raises `StoreError(store_locked)` at once when another writer is at work.
        """
        from understudyd.store.writer import Writer, writer_lock  # readers need no writer

        with writer_lock(self.path / "writer.lock"):
            writer = Writer(self, keep)
            writer.clean()
            try:
                yield writer
            finally:
                writer.empty_workspace()

    def remove(self, name: str, keep: Collection[str] = ()) -> int:
        """Delete a model and whatever only it used, but for the blobs `keep`; the bytes freed.

        Raises `StoreError`.
        """
        with self.writing(keep) as writer:
            return writer.remove(name)

    def clean(self, keep: Collection[str] = ()) -> None:
        """Delete what no model uses, but for the blobs `keep`. Raises `StoreError`."""
        with self.writing(keep):
            pass  # it begins with that

    # -- inside ------------------------------------------------------------------------------------

    def _read(self, path: Path, decoder: "msgspec.json.Decoder[_Record]") -> _Record:
        try:
            record = decoder.decode(path.read_bytes())
        except OSError as error:
            raise _damaged(f"{path.name} cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise _damaged(f"{path.name} is not what the store wrote ({error})") from error
        if record.format_version != FORMAT_VERSION:
            raise _damaged(
                f"{path.name} has format {record.format_version}, this release reads {FORMAT_VERSION}"
            )
        return record

    def _check_blob(self, blob: BlobRecord) -> None:
        path = self.blob_path(blob.sha256)
        try:
            status = path.lstat()
        except OSError as error:
            raise _damaged(f"the blob {path.name} cannot be read ({error.strerror})") from error
        expected = blob.data_start_bytes + blob.size_bytes
        if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
            raise _damaged(f"the blob {path.name} is no file of {expected} bytes")


def _damaged(why: str) -> StoreError:
    return StoreError(StoreErrorCode.CORRUPT_STORE, f"{why}; remove the model and add it again")
