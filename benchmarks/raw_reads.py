"""The limit of a load: plain reads by threads of one process into memory that has all its pages."""

import mmap
import os
import threading
import time

from benchmarks.loaders import Source
from understudyd.loader import linux


class RawReader:
    """Plain `preadv` of a file's data section into the beginning of shared memory (`memory_fd`).

    Each thread reads a part from its beginning to its end: from the disk that is faster than turns, from the
    page cache it is the same.
    """

    def __init__(self, source: Source, memory_fd: int, chunk_bytes: int, threads: int) -> None:
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._threads = threads
        self._file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._memory = mmap.mmap(memory_fd, source.size_bytes)
        linux.populate(self._memory, 0, source.size_bytes, linux.MADV_POPULATE_WRITE)

    def read(self) -> float:
        """Everything once; seconds."""
        part_bytes = -(-self._source.size_bytes // self._threads)
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
        os.close(self._file)

    def _read_part(self, offset: int, size_bytes: int) -> None:
        ends = min(offset + size_bytes, self._source.size_bytes)
        start_bytes = self._source.record.data_start_bytes
        view = memoryview(self._memory)
        while offset < ends:
            piece = view[offset : min(offset + self._chunk_bytes, ends)]
            offset += os.preadv(self._file, [piece], start_bytes + offset)
