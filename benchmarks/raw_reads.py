"""The limit of a load: plain reads by threads of one process into memory that has all its pages."""

import mmap
import os
import threading
import time
from collections.abc import Iterator

from benchmarks.loaders import Source
from understudyd.loader import linux


class RawReader:
    """Plain `preadv` of a file's data section into the beginning of shared memory (`memory_fd`)."""

    def __init__(self, source: Source, memory_fd: int, chunk_bytes: int, threads: int) -> None:
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._threads = threads
        self._file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        self._memory = mmap.mmap(memory_fd, source.size_bytes)
        linux.populate(self._memory, 0, source.size_bytes, linux.MADV_POPULATE_WRITE)

    def read(self) -> float:
        """Everything once; seconds."""
        pieces = iter(range(0, self._source.size_bytes, self._chunk_bytes))
        lock = threading.Lock()
        threads = [
            threading.Thread(target=self._read_pieces, args=(pieces, lock)) for _ in range(self._threads)
        ]
        started_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - started_s

    def close(self) -> None:
        self._memory.close()
        os.close(self._file)

    def _read_pieces(self, pieces: Iterator[int], lock: threading.Lock) -> None:
        size_bytes, start_bytes = self._source.size_bytes, self._source.record.data_start_bytes
        view = memoryview(self._memory)
        while True:
            with lock:
                offset = next(pieces, None)
            if offset is None:
                return
            ends = min(offset + self._chunk_bytes, size_bytes)
            while offset < ends:
                offset += os.preadv(self._file, [view[offset:ends]], start_bytes + offset)
