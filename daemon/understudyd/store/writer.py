"""Changing a store: one process at a time, each change visible by one rename.

What survives a crash at any point: a model is there whole or not at all. What a crash may leave is work in
`tmp/` and blobs or signatures no manifest names; the next writer clears both.
"""

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.errors import StoreError, StoreErrorCode, translated_write_errors
from understudyd.store.records import ModelRecord, SignatureRecord
from understudyd.store.store import Store

_log = logging.getLogger(__name__)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the store's lock file, which names its holder's pid. Raises `StoreError(store_locked)`."""
    with translated_write_errors(f"cannot open {path}"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(
                StoreErrorCode.STORE_LOCKED,
                f"process {holder} is writing to the store {path.parent}; try again when it is done",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class AdapterDraft:
    """An adapter ready to be published: its blob's file, and an empty folder for the manifest."""

    record: AdapterRecord
    blob: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Draft:
    """A model ready to be published: all its files lie in the writer's workspace.

    `blobs` maps sha256 to a file, `folder` holds the small files, without the manifest.
    """

    record: ModelRecord
    signatures: tuple[SignatureRecord, ...]
    blobs: dict[str, Path]
    folder: Path


class Writer:
    """What the holder of the writer lock may do. Made by `Store.writing` only."""

    def __init__(self, store: Store, keep: Collection[str] = ()) -> None:
        self._store = store
        self._keep = {store.blob_path(sha256).name for sha256 in keep}
        self._tmp = store.path / "tmp"
        self._shelf = AdapterShelf(store)

    def workspace(self) -> Path:
        """A new empty folder on the store's disk; gone when the writer is."""
        with translated_write_errors(f"cannot write to {self._tmp}"):
            self._tmp.mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._tmp))

    def publish(
        self, draft: Draft, *, replace: bool, on_step: Callable[[], None] = lambda: None
    ) -> ModelRecord:
        """Make a draft visible and durable; `on_step` is called before each change to the store.

        The same content under the same name changes nothing and returns the record that is there. Other
        content raises `StoreError(exists)` unless `replace`, which swaps the models in one step and brings
        every blob anew, so that it also repairs a store with flipped bits.
        """
        self._check_free(draft.record.name, self._shelf.names(), "an adapter")
        existing = self.find(draft.record.name)
        if existing is not None and not replace:
            if same_content(existing, draft.record):
                return existing
            raise StoreError(
                StoreErrorCode.EXISTS,
                f"there is a model {existing.name!r} with other content; choose another name, remove it "
                "first, or replace it (--replace)",
            )
        with translated_write_errors(f"cannot publish {draft.record.name}"):
            self._publish_blobs(draft.blobs, replace, on_step)
            self._publish_signatures(draft, on_step)
            target = self._store.model_folder(draft.record.name)
            self._publish_folder(draft.record, draft.folder, target, on_step)
        return draft.record

    def publish_adapter(
        self, draft: AdapterDraft, *, replace: bool, on_step: Callable[[], None] = lambda: None
    ) -> AdapterRecord:
        """`publish` for an adapter. A name is a model's or an adapter's, never both. Raises `StoreError`."""
        record = draft.record
        target = self._shelf.folder(record.name)
        self._check_free(record.name, self._store.names(), "a model")
        existing = self.find_adapter(record.name)
        if existing is not None and not replace:
            if same_adapter(existing, record):
                return existing
            raise StoreError(
                StoreErrorCode.EXISTS,
                f"there is an adapter {record.name!r} with other content; choose another name, remove it "
                "first, or replace it (--replace)",
            )
        with translated_write_errors(f"cannot publish {record.name}"):
            target.parent.mkdir(exist_ok=True)
            self._publish_blobs({record.blob.sha256: draft.blob}, replace, on_step)
            self._publish_folder(record, draft.folder, target, on_step)
        return record

    def find_adapter(self, name: str) -> AdapterRecord | None:
        """The usable adapter of this name, if there is one; a damaged one may be overwritten."""
        try:
            return self._shelf.adapter(name)
        except StoreError as error:
            if error.code in (StoreErrorCode.NOT_FOUND, StoreErrorCode.CORRUPT_STORE):
                return None
            raise

    def remove_adapter(self, name: str) -> int:
        """Delete an adapter, damaged or not; the blob bytes freed. Raises `StoreError`."""
        folder = self._shelf.folder(name)
        if not folder.is_dir():
            raise StoreError(
                StoreErrorCode.NOT_FOUND, f"the store has no adapter {name!r}; see its list of adapters"
            )
        return self._bury(folder)

    def _check_free(self, name: str, taken: Collection[str], by: str) -> None:
        if name in taken:
            raise StoreError(StoreErrorCode.EXISTS, f"{name!r} already names {by}; choose another name")

    def find(self, name: str) -> ModelRecord | None:
        """The usable model of this name, if there is one; a damaged one may be overwritten."""
        try:
            return self._store.model(name)
        except StoreError as error:
            if error.code in (StoreErrorCode.NOT_FOUND, StoreErrorCode.CORRUPT_STORE):
                return None
            raise

    def remove(self, name: str) -> int:
        """Delete a model, damaged or not, and whatever nobody uses then; the blob bytes freed."""
        folder = self._store.model_folder(name)
        if not folder.is_dir():
            raise StoreError(
                StoreErrorCode.NOT_FOUND, f"the store has no model {name!r}; see its list of models"
            )
        return self._bury(folder)

    def _bury(self, folder: Path) -> int:
        grave = self.workspace() / folder.name
        with translated_write_errors(f"cannot remove {folder.name}"):
            folder.rename(grave)  # from here on there is no such name, whatever happens
            _sync_folder(folder.parent)
            freed = self.collect_garbage()
            shutil.rmtree(grave.parent)
        return freed

    def clean(self) -> None:
        """Clear what a crashed writer left. Only whoever holds the lock may."""
        with translated_write_errors(f"cannot clean the store {self._store.path}"):
            self.empty_workspace()
            freed = self.collect_garbage()
        if freed:
            _log.info("freed %d bytes that no model used", freed)

    def empty_workspace(self) -> None:
        """Delete everything in tmp/."""
        for entry in list(self._tmp.iterdir()) if self._tmp.is_dir() else []:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def collect_garbage(self) -> int:
        """Delete blobs and signatures that no model and no adapter names; the blob bytes freed.

        Does nothing while a manifest is damaged, for what it names cannot be known, or while somebody else
        serves from this store: who runs a model that was replaced since may yet have to load its blobs.
        """
        models, damaged = self._store.scan()
        adapters, damaged_adapters = self._shelf.scan()
        if damaged or damaged_adapters:
            return 0
        components = [c for model in models.values() for c in model.components]
        blobs = {self._store.blob_path(c.blob.sha256).name for c in components}
        blobs |= {self._store.blob_path(a.blob.sha256).name for a in adapters.values()}
        with self._store.usage.exclusive() as is_alone:
            if not is_alone:
                return 0
            _delete_others(self._store.path / "signatures", {f"{c.signature}.json" for c in components})
            return _delete_others(self._store.path / "blobs", blobs | self._keep)

    # -- publishing, in the order that keeps every visible model whole ------------------------------

    def _publish_blobs(self, blobs: dict[str, Path], replace: bool, on_step: Callable[[], None]) -> None:
        for sha256, source in blobs.items():
            target = self._store.blob_path(sha256)
            if not replace and _is_file_of(target, source.stat().st_size):
                source.unlink()
                continue
            _sync_file(source)
            on_step()
            source.rename(target)
        _sync_folder(self._store.path / "blobs")

    def _publish_signatures(self, draft: Draft, on_step: Callable[[], None]) -> None:
        for signature in draft.signatures:
            target = self._store.signature_path(signature.id)
            content = _pretty_json(signature)
            if _is_file_of(target, len(content)) and target.read_bytes() == content:
                continue
            source = draft.folder.parent / target.name
            source.write_bytes(content)
            _sync_file(source)
            on_step()
            source.rename(target)
        _sync_folder(self._store.path / "signatures")

    def _publish_folder(
        self, record: msgspec.Struct, folder: Path, target: Path, on_step: Callable[[], None]
    ) -> None:
        (folder / "manifest.json").write_bytes(_pretty_json(record))
        for root, _, names in os.walk(folder):
            for name in names:
                _sync_file(Path(root, name))
            _sync_folder(Path(root))
        on_step()
        if target.exists():
            _exchange(folder, target)
        else:
            folder.rename(target)
        _sync_folder(target.parent)


def same_content(one: ModelRecord, other: ModelRecord) -> bool:
    """Whether two records describe the same model, however and whenever they came into the store."""

    def facts(record: ModelRecord) -> ModelRecord:
        return msgspec.structs.replace(record, dtype="", source="", added_at_unix_s=0.0)

    return facts(one) == facts(other)


def same_adapter(one: AdapterRecord, other: AdapterRecord) -> bool:
    """Whether two records describe the same adapter, however and whenever they came into the store."""

    def facts(record: AdapterRecord) -> AdapterRecord:
        return msgspec.structs.replace(record, source="", added_at_unix_s=0.0, bases=(), base_model="")

    return facts(one) == facts(other)


def _pretty_json(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"


def _is_file_of(path: Path, size_bytes: int) -> bool:
    """Whether there is a regular file (no link) of this length."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size_bytes


def _delete_others(folder: Path, keep: set[str]) -> int:
    freed = 0
    for entry in list(folder.iterdir()):
        if entry.name not in keep and not entry.is_dir():
            freed += entry.lstat().st_size
            entry.unlink()
    return freed


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


_sync_folder = _sync_file  # a folder's entries are synced through its descriptor, too


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (Linux `renameat2`); in two steps where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    other.rename(one.with_name(one.name + ".old"))
    one.rename(other)
