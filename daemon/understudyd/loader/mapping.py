"""Shared memory of the parent's as a loader sees it: a mapped memfd."""

import ctypes
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

from understudyd.loader import linux

_POPULATE_BYTES = 64 * 1024 * 1024


class MappingError(Exception):
    """The memory cannot be mapped."""


class Mapping:
    """The first `size_bytes` of the one memfd in `fds`, to be read and written: a `view` and an `address`.

    The descriptor stays its owner's. Raises `MappingError`.
    """

    def __init__(self, fds: Sequence[int], size_bytes: int) -> None:
        if len(fds) != 1 or size_bytes <= 0:
            raise MappingError(f"{size_bytes} bytes of shared memory with {len(fds)} file descriptors")
        try:
            self._mapping = mmap.mmap(fds[0], size_bytes, mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as error:
            raise MappingError(f"cannot map {size_bytes} bytes of shared memory: {error}") from error
        self.size_bytes = size_bytes
        self.view = memoryview(self._mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def close(self) -> None:
        """Unmap it, or have it unmapped with its last view, which the traceback of a fault may hold."""
        self.view.release()
        with suppress(BufferError):
            self._mapping.close()

    def populate(self, start: int, size_bytes: int) -> None:
        """Build this process's page table for a part of it. Raises `OSError`.

        Reading maps sixteen present pages per fault, writing one: 0.08 against 0.28 s per GB.
        """
        linux.populate(self._mapping, start, size_bytes, linux.MADV_POPULATE_READ)


class Populating:
    """Builds the page tables of `mappings`, one after the other, in the background.

    The first loads would pay 0.3 s per GB for it. Close it before the mappings.
    """

    def __init__(self, mappings: Sequence[Mapping]) -> None:
        self._mappings = mappings
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the rest to the readers."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        for mapping in self._mappings:
            for start in range(0, mapping.size_bytes, _POPULATE_BYTES):
                if self._closing.is_set():
                    return
                try:
                    mapping.populate(start, min(_POPULATE_BYTES, mapping.size_bytes - start))
                except OSError:  # an old kernel: the readers take the faults
                    return
