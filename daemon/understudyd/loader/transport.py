"""Where a loader writes: the arena as this process sees it, behind one small interface."""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from understudyd.loader import linux
from understudyd.loader.wire import Attach

Fill = Callable[[memoryview], None]
"""Writes every byte of the memory it is given, or raises."""

_POPULATE_BYTES = 64 * 1024 * 1024


class TransportError(Exception):
    """The arena cannot be opened or written: this loader is of no use any more."""


class Target(Protocol):
    """The arena, open for writing."""

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """Have `fill` produce at most one chunk of bytes and take them to `offset`.

        Several threads call this at once. When it returns the bytes may still be on their way; when `fill`
        raises, none of them are.
        """

    def synchronise(self) -> None:
        """Return when every byte written so far has arrived."""

    def close(self) -> None:
        """Let go of the arena."""


def open_target(attach: Attach, fds: Sequence[int]) -> Target:
    """Open the arena that `attach` names; owns `fds` from now on. Raises `TransportError`."""
    match attach.transport:
        case "memfd" if len(fds) == 1:
            return MemfdTarget(fds[0], attach.arena_bytes)
        case "cuda" if not fds:
            from understudyd.loader.transport_cuda import open_cuda_target  # cuda-bindings takes a while

            return open_cuda_target(attach)
        case transport:
            raise TransportError(f"no transport {transport!r} with {len(fds)} file descriptors")


class MemfdTarget:
    """Shared memory: readers read straight to the final offset."""

    def __init__(self, fd: int, arena_bytes: int) -> None:
        try:
            self._mapping = mmap.mmap(fd, arena_bytes, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise TransportError(f"cannot map the arena of {arena_bytes} bytes: {error}") from error
        finally:
            os.close(fd)
        self._view = memoryview(self._mapping)
        self._closing = threading.Event()
        self._populating = threading.Thread(target=self._populate, name="populate", daemon=True)
        self._populating.start()

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """See `Target`."""
        fill(self._view[offset : offset + size_bytes])

    def synchronise(self) -> None:
        """Shared memory is coherent."""

    def close(self) -> None:
        """See `Target`. The mapping goes with its last view, which the traceback of a fault may hold."""
        self._closing.set()
        self._populating.join()
        del self._view, self._mapping

    def _populate(self) -> None:
        """Build this process's page table ahead of the first loads, which would pay 0.3 s per GB for it.

        Reading maps sixteen present pages per fault, writing one: 0.08 against 0.28 s per GB.
        """
        for start in range(0, len(self._mapping), _POPULATE_BYTES):
            size_bytes = min(_POPULATE_BYTES, len(self._mapping) - start)
            if self._closing.is_set():
                return
            try:
                linux.populate(self._mapping, start, size_bytes, linux.MADV_POPULATE_READ)
            except OSError:  # an old kernel: the readers take the faults
                return
