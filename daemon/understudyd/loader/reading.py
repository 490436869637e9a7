"""One load: bytes of a file into the arena, the host pool or both, by several threads, checked.

A chunk goes on to the arena as soon as it is in the host pool. What was read into the host pool before needs
no file. The loads that a checksum or a version check must catch are those whose file was cut short, damaged,
replaced or written to, before or while it is read. Everything is read through one open file, so that what is
checked is what was read.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

import msgspec
import xxhash

from understudyd.loader.faults import CrashPoints
from understudyd.loader.pacing import Pacer, Pause
from understudyd.loader.past_cache import PastCache, Read, plain
from understudyd.loader.progress import Progress
from understudyd.loader.transport import Fill, Target
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
    pause: Pause
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
        self._reader.pause.halt(self._halt)

    def run(self) -> Loaded:
        """Read, check and synchronise. Raises `ReadError`, `ReadCancelled`, `OSError` or `TransportError`.

        However it ends, nothing writes for this load any more.
        """
        if self._halt.is_set():
            raise ReadCancelled
        self._check_order()
        started_at_s = time.monotonic()
        self._reader.progress.begin(self.load.load_id)
        try:
            version, verified = self._from_pool() if self.load.from_pool else self._from_file()
        finally:
            self._reader.progress.end()
        return Loaded(
            load_id=self.load.load_id,
            started_at_s=started_at_s,
            ended_at_s=time.monotonic(),
            version=version,
            verified=verified,
        )

    def _check_order(self) -> None:
        """The parent says where to write; a slip there must not reach a neighbour's extent."""
        load = self.load
        if min(load.file_offset, load.size_bytes, load.checksum_chunk_bytes) < 0:
            raise ReadError(f"load {load.load_id} has a negative size or offset", corrupt=False)
        places = (
            ("arena", load.arena_offset, self._reader.arena_bytes),
            ("host pool", load.pool_offset, len(self._reader.target.pool)),
        )
        for name, offset, place_bytes in places:
            if offset is not None and not 0 <= offset <= place_bytes - load.size_bytes:
                raise ReadError(f"load {load.load_id} does not fit into the {name}", corrupt=False)
        ends = [load.arena_offset, load.pool_offset]
        if None in ends if load.from_pool else ends == [None, None]:
            raise ReadError(f"load {load.load_id} has nowhere to go or to come from", corrupt=False)
        if load.xxh3 and len(load.xxh3) != -(-load.size_bytes // max(load.checksum_chunk_bytes, 1)):
            raise ReadError(
                f"load {load.load_id} has {len(load.xxh3)} checksums, not one a chunk", corrupt=False
            )

    def _from_pool(self) -> tuple[None, bool]:
        """No file is touched. What is in the pool was verified, unless another daemon left it there."""
        self._reader.crash_points.at("header")
        if self.load.must_verify:
            if not self.load.xxh3:
                raise ReadError("nothing tells whether the copy in the host pool is right", corrupt=False)
            self._share_out(self.load.checksum_chunk_bytes, self._check_and_copy)
        else:
            self._share_out(self._reader.chunk_bytes, self._copy_chunk)
        return None, self.load.must_verify

    def _from_file(self) -> tuple[FileVersion, bool]:
        """Which version of the file was read and whether its bytes are known to be right."""
        fd = open_blob(self.load.path)
        try:
            version = version_of(fd)
            verify = self._must_verify(version)
            self._reader.crash_points.at("header")
            span_bytes = self.load.checksum_chunk_bytes if verify else self._reader.chunk_bytes
            with self._reads(fd) as read:
                self._share_out(span_bytes, partial(self._read_span, read, verify))
            if version_of(fd) != version:
                raise ReadError("the file was written to while it was read", corrupt=True)
        finally:
            os.close(fd)
        return version, verify or version == self.load.expect

    @contextmanager
    def _reads(self, fd: int) -> Iterator[Read]:
        """How the file is read: what stays in the host pool need not stay in the page cache, too."""
        if self.load.pool_offset is None:
            yield plain(fd)
            return
        with closing(PastCache(fd)) as past_cache:
            yield past_cache.read

    def _must_verify(self, version: FileVersion) -> bool:
        load = self.load
        if version.size_bytes < load.file_offset + load.size_bytes:
            needed_bytes = load.file_offset + load.size_bytes
            message = f"the file is truncated: {version.size_bytes} of {needed_bytes} bytes"
            raise ReadError(message, corrupt=True)
        if version == load.expect:
            return False
        if load.expect is not None and not load.xxh3:
            raise ReadError("the file was replaced since it was verified", corrupt=True)
        return bool(load.xxh3)

    def _share_out(self, span_bytes: int, take: Callable[[int, int], None]) -> None:
        """Have every span taken (start, size) by whichever thread is free; this thread is one of them."""
        thread_count = min(self._reader.threads, -(-self.load.size_bytes // span_bytes))
        stretches = self._stretches(span_bytes, thread_count)
        helpers: list[threading.Thread] = []
        with suppress(RuntimeError):  # no thread to be had: fewer do it as well
            for n in range(1, thread_count):
                helper = threading.Thread(
                    target=self._take_spans, args=(stretches, take), name=f"read {n}", daemon=True
                )
                helper.start()
                helpers.append(helper)
        self._take_spans(stretches, take)
        for helper in helpers:
            helper.join()
        self._reader.crash_points.at("synchronise")
        self._reader.target.synchronise()  # after a failure too: the extent will be used again
        if self._error is not None:
            raise self._error
        if self._halt.is_set():
            raise ReadCancelled

    def _stretches(self, span_bytes: int, thread_count: int) -> Iterator[list[tuple[int, int]]]:
        """Every span once, those together that one thread takes in a row.

        The kernel reads ahead of a thread that goes on and on, not of threads that take turns: from the disk
        long stretches are half as fast again. They shrink so that all threads end together (guided
        self-scheduling, Polychronopoulos and Kuck 1987).
        """
        size_bytes, start = self.load.size_bytes, 0
        while start < size_bytes:
            span_count = max((size_bytes - start) // (2 * thread_count) // span_bytes, 1)
            end = min(start + span_count * span_bytes, size_bytes)
            yield [(at, min(span_bytes, end - at)) for at in range(start, end, span_bytes)]
            start = end

    def _take_spans(
        self, stretches: Iterator[list[tuple[int, int]]], take: Callable[[int, int], None]
    ) -> None:
        try:
            while not self._halt.is_set():
                with self._lock:
                    stretch = next(stretches, None)
                if stretch is None:
                    return
                for start, size_bytes in stretch:
                    if self._halt.is_set():
                        return
                    take(start, size_bytes)
        except BaseException as error:  # noqa: BLE001 a thread's boundary: `_share_out` raises it again
            with self._lock:
                self._error = self._error or error
            self.cancel()

    def _read_span(self, read: Read, verify: bool, start: int, size_bytes: int) -> None:
        """Read one span, chunk by chunk, and compare its checksum."""
        hasher = xxhash.xxh3_64() if verify else None
        for offset in range(start, start + size_bytes, self._reader.chunk_bytes):
            chunk_bytes = min(self._reader.chunk_bytes, start + size_bytes - offset)
            self._read_chunk(
                offset, chunk_bytes, partial(self._fill, read, self.load.file_offset + offset, hasher)
            )
            self._reader.crash_points.at("copy")
            if self._halt.is_set():
                return
        if (
            hasher is not None
            and hasher.intdigest() != self.load.xxh3[start // self.load.checksum_chunk_bytes]
        ):
            first, last = self.load.file_offset + start, self.load.file_offset + start + size_bytes
            raise ReadError(f"the file is damaged between bytes {first} and {last}", corrupt=True)

    def _read_chunk(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """To where the load goes; through the host pool when it is to stay there."""
        arena_offset, pool_offset, target = self.load.arena_offset, self.load.pool_offset, self._reader.target
        if pool_offset is not None:
            fill(target.pool[pool_offset + offset : pool_offset + offset + size_bytes])
            if arena_offset is not None:
                target.copy(arena_offset + offset, pool_offset + offset, size_bytes)
        elif arena_offset is not None:
            target.write(arena_offset + offset, size_bytes, fill)

    def _check_and_copy(self, start: int, size_bytes: int) -> None:
        """Copy one span, chunk by chunk, and compare its checksum. The file may be as good as ever."""
        assert self.load.pool_offset is not None
        hasher = xxhash.xxh3_64()
        for offset in range(start, start + size_bytes, self._reader.chunk_bytes):
            chunk_bytes = min(self._reader.chunk_bytes, start + size_bytes - offset)
            at = self.load.pool_offset + offset
            hasher.update(self._reader.target.pool[at : at + chunk_bytes])
            self._copy_chunk(offset, chunk_bytes)
        if hasher.intdigest() != self.load.xxh3[start // self.load.checksum_chunk_bytes]:
            raise ReadError("the copy in the host pool is damaged", corrupt=False)

    def _copy_chunk(self, offset: int, size_bytes: int) -> None:
        arena_offset, pool_offset = self.load.arena_offset, self.load.pool_offset
        if arena_offset is None or pool_offset is None:
            return
        self._rest()
        self._reader.target.copy(arena_offset + offset, pool_offset + offset, size_bytes)
        self._reader.progress.add(size_bytes)
        self._reader.crash_points.at("copy")

    def _rest(self) -> None:
        """Between two pieces: sit out a pause. Raises `ReadCancelled`."""
        self._reader.pause.rest(self._halt)
        if self._halt.is_set():
            raise ReadCancelled

    def _fill(self, read: Read, file_offset: int, hasher: "xxhash.xxh3_64 | None", view: memoryview) -> None:
        """Read `len(view)` bytes, a helping at a time, until done or halted."""
        helping_bytes = self._reader.pacer.helping_bytes(len(view) if hasher is None else _HASH_BYTES)
        done = 0
        while done < len(view):
            self._reader.crash_points.at("read")
            self._rest()
            count = read(view[done : done + helping_bytes], file_offset + done)
            if count == 0:
                raise ReadError(f"the file ends at byte {file_offset + done}", corrupt=True)
            if hasher is not None:
                hasher.update(view[done : done + count])
            done += count
            self._reader.progress.add(count)
            self._reader.pacer.spend(count, self._halt)  # of short reads, what was read


def open_blob(path: str) -> int:
    """Open a regular file that is no symbolic link. Raises `ReadError`, `OSError`."""
    try:
        # Without O_NONBLOCK the opening of a FIFO would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ReadError("the file is a symbolic link, blobs are plain files", corrupt=False) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ReadError("the file is not a regular file", corrupt=False)
    return fd


def version_of(fd: int) -> FileVersion:
    """Which bytes an open file holds, as far as its metadata tells."""
    status = os.fstat(fd)
    return FileVersion(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
