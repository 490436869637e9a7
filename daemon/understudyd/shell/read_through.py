"""Local copies of blobs of read-only stores: the first load reads over the network, the next from this disk.

A copy is made after a load, one at a time and at a moderate rate. It is there whole, checked and under its
name, or not at all. The copies that were used longest ago make room for new ones.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection
from pathlib import Path

from understudyd.shell.threads import in_daemon_thread
from understudyd.store.errors import FULL_DISK
from understudyd.store.records import BlobRecord

_log = logging.getLogger(__name__)
_PIECE_BYTES = 4 * 1024 * 1024
_LEAVING_S = 5.0
_SUFFIX = ".safetensors"
_UNFINISHED = ".copying-"


class CopyFailed(Exception):
    """There is no local copy, and nothing is left of the attempt."""


class _Stopped(Exception):
    """The daemon is leaving."""


class ReadThrough:
    """`folder` holds at most `capacity_bytes`. Only the event loop calls this, but for `open`."""

    def __init__(self, folder: Path, capacity_bytes: int, rate_bytes_per_s: float) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._rate_bytes_per_s = rate_bytes_per_s
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the longest unused first
        self._queue: deque[tuple[str, int, Path]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._in_use: Collection[str] = ()

    def open(self) -> None:
        """Find the copies that are there, and clear what a dead process left. Raises `OSError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = []
        for entry in self._folder.iterdir():
            if entry.name.startswith(_UNFINISHED):
                if not _is_alive(entry.name.rpartition("-")[2]):
                    entry.unlink(missing_ok=True)
            elif entry.suffix == _SUFFIX and stat.S_ISREG((status := entry.lstat()).st_mode):
                found.append((status.st_mtime, entry.stem, status.st_size))
        self._sizes = OrderedDict((sha256, size_bytes) for _, sha256, size_bytes in sorted(found))

    @property
    def size_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(self._sizes.values())

    @property
    def is_idle(self) -> bool:
        """Nothing is being copied or waits for it."""
        return self._task is None

    def use(self, sha256: str) -> Path | None:
        """The local copy, which counts as used now; None without one."""
        if sha256 not in self._sizes:
            return None
        path = self._path(sha256)
        try:
            os.utime(path)  # the order survives a restart
        except OSError:  # somebody tidied up
            del self._sizes[sha256]
            return None
        self._sizes.move_to_end(sha256)
        return path

    def drop(self, sha256: str) -> None:
        """The copy could not be read as it should: make a new one next time."""
        if self._sizes.pop(sha256, None) is not None:
            self._path(sha256).unlink(missing_ok=True)

    def want(self, blob: BlobRecord, source: Path, in_use: Collection[str] = ()) -> None:
        """Copy a blob that was just read from `source`; those `in_use` do not make room for it."""
        size_bytes = blob.data_start_bytes + blob.size_bytes
        self._in_use = in_use
        if size_bytes > self._capacity_bytes or blob.sha256 in self._sizes or self._stop.is_set():
            return
        if all(sha256 != blob.sha256 for sha256, _, _ in self._queue):
            self._queue.append((blob.sha256, size_bytes, source))
            if self._task is None:
                self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Stop between two pieces; what is not finished is deleted."""
        self._stop.set()
        self._queue.clear()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_LEAVING_S)  # its mount may hang

    # -- copying ------------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            while self._queue and not self._stop.is_set():
                sha256, size_bytes, source = self._queue[0]
                await self._copy(sha256, size_bytes, source)
                if self._queue:
                    self._queue.popleft()
        finally:
            self._task = None

    async def _copy(self, sha256: str, size_bytes: int, source: Path) -> None:
        try:
            self._make_room(size_bytes)
            await in_daemon_thread(self._copy_file, sha256, size_bytes, source)
        except _Stopped:
            return
        except CopyFailed as error:
            _log.warning("no local copy of %s: %s", source, error)
            return
        self._sizes[sha256] = size_bytes
        _log.info("local copy of %s: %.1f MiB", source, size_bytes / 2**20)

    def _make_room(self, size_bytes: int) -> None:
        """Raises `CopyFailed` when what is in use leaves too little."""
        unused = [sha256 for sha256 in self._sizes if sha256 not in self._in_use]
        while self.size_bytes + size_bytes > self._capacity_bytes:
            if not unused:
                raise CopyFailed("the copies in use leave no room; make store.cache larger")
            self.drop(unused.pop(0))
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < size_bytes:
            raise CopyFailed(
                f"{free_bytes} bytes are free, {size_bytes} are needed; make store.cache smaller"
            )

    def _copy_file(self, sha256: str, size_bytes: int, source: Path) -> None:
        """In the thread. Raises `CopyFailed` or `_Stopped`."""
        unfinished = self._folder / f"{_UNFINISHED}{sha256}-{os.getpid()}"
        try:
            self._copy_checked(sha256, size_bytes, source, unfinished)
            unfinished.rename(self._path(sha256))
        except OSError as error:
            advice = "; free space, or make store.cache smaller" if error.errno in FULL_DISK else ""
            raise CopyFailed(f"{error.strerror or error}{advice}") from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _copy_checked(self, sha256: str, size_bytes: int, source: Path, target: Path) -> None:
        digest, done, started_at_s = hashlib.sha256(), 0, time.monotonic()
        with source.open("rb", buffering=0) as reading, target.open("wb") as writing:
            while piece := reading.read(_PIECE_BYTES):
                digest.update(piece)
                writing.write(piece)
                done += len(piece)
                ahead_s = done / self._rate_bytes_per_s if self._rate_bytes_per_s else 0.0
                if self._stop.wait(max(0.0, started_at_s + ahead_s - time.monotonic())):
                    raise _Stopped
            writing.flush()
            os.fsync(writing.fileno())
        if done != size_bytes or digest.hexdigest() != sha256:
            raise CopyFailed(f"{source.name} is not what its name says; repair that store")

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}{_SUFFIX}"


def _is_alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()
