"""Where loads go: the arena and the host pool as a loader sees them, behind one small interface."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from understudyd.loader import linux
from understudyd.loader.mapping import Mapping, MappingError, Populating
from understudyd.loader.proof import PROOF_AREA_BYTES
from understudyd.loader.wire import Attach, OpenArena

Fill = Callable[[memoryview], None]
"""Writes every byte of the memory it is given, or raises."""

Notify = Callable[[str], None]
"""Tell people something that does not stop the loader; callable from any thread."""


class TransportError(Exception):
    """The device or its memory cannot be opened or used: this loader is of no use any more."""


class SharingRefused(TransportError):
    """The system does not let processes share the arena: another loader would fare no better."""


class Target(Protocol):
    """The device's context and the host pool, and the arena once it was opened."""

    pool: memoryview
    """The host pool, of no bytes where there is none."""

    def open_arena(self, order: OpenArena, fds: Sequence[int]) -> None:
        """Before any other method but `close`. Raises `TransportError`."""

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """Have `fill` produce at most one chunk of bytes and take them to `offset` of the arena.

        Several threads call this at once. When it returns the bytes may still be on their way; when `fill`
        raises, none of them are.
        """

    def copy(self, arena_offset: int, pool_offset: int, size_bytes: int) -> None:
        """Take at most one chunk of bytes from the host pool to the arena.

        Several threads call this at once. When it returns the bytes may still be on their way.
        """

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A few bytes of the arena, for the proof."""

    def synchronise(self) -> None:
        """Return when every byte written and copied so far has arrived."""

    def close(self) -> None:
        """Let go of everything. Raises `TransportError` when something could not be released."""


def open_target(attach: Attach, fds: Sequence[int], notify: Notify) -> Target:
    """Open the device and the host pool that `attach` names. Raises `TransportError`."""
    try:
        pool = Mapping(fds, attach.pool_bytes) if attach.pool_bytes or fds else None
    except MappingError as error:
        raise TransportError(f"no host pool: {error}") from error
    if not attach.gpu_uuid:
        return MemfdTarget(pool)
    from understudyd.loader.transport_cuda import open_cuda_target  # cuda-bindings takes a while

    return open_cuda_target(attach, pool, notify)


class MemfdTarget:
    """The CPU device's: shared memory. Readers read straight to the final offset."""

    def __init__(self, pool: Mapping | None) -> None:
        self.pool = memoryview(b"") if pool is None else pool.view
        self._pools = () if pool is None else (pool,)
        self._pool_address = 0
        self._resources = ExitStack()
        if pool is not None:
            self._pool_address = pool.address
            self._resources.callback(pool.close)

    def open_arena(self, order: OpenArena, fds: Sequence[int]) -> None:
        """See `Target`."""
        if order.transport != "memfd":
            raise TransportError(f"no transport {order.transport!r} on the CPU device")
        try:
            arena = Mapping(fds, order.arena_bytes + PROOF_AREA_BYTES)
        except MappingError as error:
            raise TransportError(f"no arena: {error}") from error
        self._resources.callback(arena.close)
        self._arena = arena
        # Not the pool before: while the arena's pages are made, the processor is wanted elsewhere.
        self._resources.callback(Populating((arena, *self._pools)).close)

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """See `Target`."""
        fill(self._arena.view[offset : offset + size_bytes])

    def copy(self, arena_offset: int, pool_offset: int, size_bytes: int) -> None:
        """See `Target`."""
        linux.copy(self._arena.address + arena_offset, self._pool_address + pool_offset, size_bytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See `Target`."""
        return bytes(self._arena.view[offset : offset + size_bytes])

    def synchronise(self) -> None:
        """Shared memory is coherent."""

    def close(self) -> None:
        """See `Target`."""
        self._resources.close()
