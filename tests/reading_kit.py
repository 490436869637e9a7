"""A load in this process: ordinary memory as its target, and a reader over it."""

from collections.abc import Callable, Sequence

from loader_kit import CHUNK_BYTES, MIB
from understudyd.loader.faults import CrashPoints
from understudyd.loader.pacing import Pacer, Pause
from understudyd.loader.progress import Progress
from understudyd.loader.reading import Reader
from understudyd.loader.transport import Fill
from understudyd.loader.wire import OpenArena


class MemoryTarget:
    """Ordinary memory that remembers whether it was synchronised after the last write.

    Copies from the pool happen as late as they may: what is in the pool must stay until then.
    """

    def __init__(self, size_bytes: int = 2 * MIB) -> None:
        self.memory = bytearray(b"\xee" * size_bytes)
        self.pool_memory = bytearray(b"\xdd" * size_bytes)
        self.pool = memoryview(self.pool_memory)
        self.queue: list[tuple[int, int, int]] = []
        self.before_write: Callable[[int], None] = lambda offset: None
        self.before_copy: Callable[[int], None] = lambda offset: None
        self.is_synchronised = True

    def open_arena(self, order: OpenArena, fds: Sequence[int]) -> None:
        raise AssertionError("it is open")

    def copy(self, arena_offset: int, pool_offset: int, size_bytes: int) -> None:
        self.before_copy(arena_offset)
        self.is_synchronised = False
        self.queue.append((arena_offset, pool_offset, size_bytes))

    def read(self, offset: int, size_bytes: int) -> bytes:
        return bytes(self.memory[offset : offset + size_bytes])

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        self.before_write(offset)
        self.is_synchronised = False
        fill(memoryview(self.memory)[offset : offset + size_bytes])

    def synchronise(self) -> None:
        for arena_offset, pool_offset, size_bytes in self.queue:
            self.memory[arena_offset : arena_offset + size_bytes] = self.pool[pool_offset:][:size_bytes]
        self.queue.clear()
        self.is_synchronised = True

    def close(self) -> None:
        pass


def reader(
    target: MemoryTarget, *, threads: int = 2, rate: float = 0.0, chunk_bytes: int = CHUNK_BYTES
) -> Reader:
    return Reader(
        target=target,
        arena_bytes=len(target.memory),
        chunk_bytes=chunk_bytes,
        threads=threads,
        pacer=Pacer(rate),
        pause=Pause(),
        progress=Progress(),
        crash_points=CrashPoints(),
    )
