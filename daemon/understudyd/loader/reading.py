"""One load: bytes of a file into the arena, by several threads, checked.

The loads that a checksum or a version check must catch are those whose file was cut short, damaged,
replaced or written to, before or while it is read. Everything is read through one open file, so that what is
checked is what was read.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from functools import partial

import msgspec
import xxhash

from understudyd.loader.faults import CrashPoints
from understudyd.loader.pacing import Pacer
from understudyd.loader.progress import Progress
from understudyd.loader.transport import Target
from understudyd.loader.wire import FileVersion, Load, Loaded

# Hash what was just read while it is still in the processor's cache.
_HASH_BYTES = 1024 * 1024


class ReadError(Exception):
    """The load failed; `corrupt` when the bytes are wrong rather than unreachable."""

    def __init__(self, message: str, *, corrupt: bool) -> None:
        super().__init__(message)
        self.corrupt = corrupt


class ReadCancelled(Exception):
    """The load was taken back; nothing writes for it any more."""


class Reader(msgspec.Struct, frozen=True, kw_only=True):
    """What all loads of one loader share."""

    target: Target
    arena_bytes: int
    chunk_bytes: int
    threads: int
    pacer: Pacer
    progress: Progress
    crash_points: CrashPoints


class Reading:
    """One load on its way. `run` is called once, `cancel` by any thread at any time."""

    def __init__(self, load: Load, reader: Reader) -> None:
        self.load = load
        self._reader = reader
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def cancel(self) -> None:
        """Stop between two pieces."""
        self._halt.set()

    def run(self) -> Loaded:
        """Read, check and synchronise. Raises `ReadError`, `ReadCancelled`, `OSError` or `TransportError`.

        However it ends, nothing writes for this load any more.
        """
        if self._halt.is_set():
            raise ReadCancelled
        self._check_order()
        started_at_s = time.monotonic()
        self._reader.progress.begin(self.load.load_id)
        fd = open_blob(self.load.path)
        try:
            version = version_of(fd)
            verify = self._must_verify(version)
            self._reader.crash_points.at("header")
            self._read_all(fd, verify)
            if version_of(fd) != version:
                raise ReadError(f"{self.load.path} was written to while it was read", corrupt=True)
        finally:
            os.close(fd)
            self._reader.progress.end()
        return Loaded(
            load_id=self.load.load_id,
            started_at_s=started_at_s,
            ended_at_s=time.monotonic(),
            version=version,
            verified=verify or version == self.load.expect,
        )

    def _check_order(self) -> None:
        """The parent says where to write; a slip there must not reach a neighbour's extent."""
        load = self.load
        if min(load.file_offset, load.size_bytes, load.arena_offset, load.checksum_chunk_bytes) < 0:
            raise ReadError(f"load {load.load_id} has a negative size or offset", corrupt=False)
        if load.arena_offset + load.size_bytes > self._reader.arena_bytes:
            raise ReadError(f"load {load.load_id} does not fit into the arena", corrupt=False)
        if load.xxh3 and len(load.xxh3) != -(-load.size_bytes // max(load.checksum_chunk_bytes, 1)):
            raise ReadError(
                f"load {load.load_id} has {len(load.xxh3)} checksums, not one a chunk", corrupt=False
            )

    def _must_verify(self, version: FileVersion) -> bool:
        load = self.load
        if version.size_bytes < load.file_offset + load.size_bytes:
            needed_bytes = load.file_offset + load.size_bytes
            message = f"{load.path} is truncated: {version.size_bytes} of {needed_bytes} bytes"
            raise ReadError(message, corrupt=True)
        if version == load.expect:
            return False
        if load.expect is not None and not load.xxh3:
            raise ReadError(f"{load.path} was replaced since it was verified", corrupt=True)
        return bool(load.xxh3)

    def _read_all(self, fd: int, verify: bool) -> None:
        """Every span by whichever thread is free; this thread is one of them."""
        load = self.load
        span_bytes = load.checksum_chunk_bytes if verify else self._reader.chunk_bytes
        spans = iter(range(0, load.size_bytes, span_bytes))
        thread_count = min(self._reader.threads, -(-load.size_bytes // span_bytes))
        helpers = [
            threading.Thread(target=self._read_spans, args=(fd, spans, span_bytes, verify), name=f"read {n}")
            for n in range(1, thread_count)
        ]
        for helper in helpers:
            helper.start()
        self._read_spans(fd, spans, span_bytes, verify)
        for helper in helpers:
            helper.join()
        self._reader.crash_points.at("synchronise")
        self._reader.target.synchronise()  # after a failure too: the extent will be used again
        if self._error is not None:
            raise self._error
        if self._halt.is_set():
            raise ReadCancelled

    def _read_spans(self, fd: int, spans: Iterator[int], span_bytes: int, verify: bool) -> None:
        try:
            while not self._halt.is_set():
                with self._lock:
                    start = next(spans, None)
                if start is None:
                    return
                size_bytes = min(span_bytes, self.load.size_bytes - start)
                self._read_span(
                    fd, start, size_bytes, self.load.xxh3[start // span_bytes] if verify else None
                )
        except BaseException as error:  # noqa: BLE001 a thread's boundary: `_read_all` raises it again
            with self._lock:
                self._error = self._error or error
            self._halt.set()

    def _read_span(self, fd: int, start: int, size_bytes: int, xxh3: int | None) -> None:
        """Read one span, in as many writes to the target as it takes, and compare its checksum."""
        hasher = None if xxh3 is None else xxhash.xxh3_64()
        for offset in range(start, start + size_bytes, self._reader.chunk_bytes):
            chunk_bytes = min(self._reader.chunk_bytes, start + size_bytes - offset)
            file_offset = self.load.file_offset + offset
            self._reader.target.write(
                self.load.arena_offset + offset,
                chunk_bytes,
                partial(self._fill, fd, file_offset, hasher),
            )
            self._reader.crash_points.at("copy")
            if self._halt.is_set():
                return
        if hasher is not None and hasher.intdigest() != xxh3:
            first, last = self.load.file_offset + start, self.load.file_offset + start + size_bytes
            raise ReadError(f"{self.load.path} is damaged between bytes {first} and {last}", corrupt=True)

    def _fill(self, fd: int, file_offset: int, hasher: "xxhash.xxh3_64 | None", view: memoryview) -> None:
        """Read `len(view)` bytes, a helping at a time, until done or halted."""
        helping_bytes = self._reader.pacer.helping_bytes(len(view) if hasher is None else _HASH_BYTES)
        done = 0
        while done < len(view):
            helping = view[done : done + helping_bytes]
            self._reader.pacer.spend(len(helping), self._halt)
            self._reader.crash_points.at("read")
            if self._halt.is_set():
                raise ReadCancelled
            count = os.preadv(fd, [helping], file_offset + done)
            if count == 0:
                raise ReadError(f"{self.load.path} ends at byte {file_offset + done}", corrupt=True)
            if hasher is not None:
                hasher.update(helping[:count])
            done += count
            self._reader.progress.add(count)


def open_blob(path: str) -> int:
    """Open a regular file that is no symbolic link. Raises `ReadError`, `OSError`."""
    try:
        # Without O_NONBLOCK the opening of a FIFO would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ReadError(f"{path} is a symbolic link, blobs are plain files", corrupt=False) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ReadError(f"{path} is not a regular file", corrupt=False)
    return fd


def version_of(fd: int) -> FileVersion:
    """Which bytes an open file holds, as far as its metadata tells."""
    status = os.fstat(fd)
    return FileVersion(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
