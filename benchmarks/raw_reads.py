"""The limit of a load: plain reads by threads of one process into memory that has all its pages."""

import mmap
import os
import threading
import time

from benchmarks.loaders import Source
from understudyd.loader import linux

_BLOCK_BYTES = 4096  # what O_DIRECT wants


class RawReader:
    """Plain `preadv` of a file's data section into the beginning of shared memory (`memory_fd`).

    Each thread reads a part from its beginning to its end: from the disk that is faster than turns, from the
    page cache it is the same. With `direct` past the page cache (O_DIRECT), but for the last bytes.
    """

    def __init__(
        self, source: Source, memory_fd: int, chunk_bytes: int, threads: int, *, direct: bool = False
    ) -> None:
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._threads = threads
        self._file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._main_file = self._file
        if direct:
            self._main_file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._memory = mmap.mmap(memory_fd, source.size_bytes)
        linux.populate(self._memory, 0, source.size_bytes, linux.MADV_POPULATE_WRITE)

    def read(self) -> float:
        """Everything once; seconds."""
        part_bytes = -(-self._source.size_bytes // self._threads // _BLOCK_BYTES) * _BLOCK_BYTES
        starts = range(0, self._source.size_bytes, part_bytes)
        threads = [threading.Thread(target=self._read_part, args=(start, part_bytes)) for start in starts]
        started_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - started_s

    def close(self) -> None:
        self._memory.close()
        for file in {self._file, self._main_file}:
            os.close(file)

    def _read_part(self, offset: int, size_bytes: int) -> None:
        ends = min(offset + size_bytes, self._source.size_bytes)
        whole_ends = ends // _BLOCK_BYTES * _BLOCK_BYTES
        self._read(self._main_file, offset, whole_ends)
        self._read(self._file, whole_ends, ends)

    def _read(self, file: int, offset: int, ends: int) -> None:
        start_bytes = self._source.record.data_start_bytes
        with memoryview(self._memory) as view:
            while offset < ends:
                piece = view[offset : min(offset + self._chunk_bytes, ends)]
                offset += os.preadv(file, [piece], start_bytes + offset)
