"""What the loader tests share: blobs with known bytes, a pool with its events, a bare loader process."""

import asyncio
import contextlib
import os
import random
import selectors
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from understudy.trace import Span
from understudyd.core.events import Event, LoaderReady
from understudyd.loader import wire
from understudyd.loader.proof import PROOF_BYTES, pattern
from understudyd.shell.host_pool import HostPool
from understudyd.shell.loader_process import LoaderProcess
from understudyd.shell.loader_thread import LoaderThread
from understudyd.shell.loading import LOADER_COMMAND
from understudyd.shell.memory import Arena, CpuArena
from understudyd.shell.supervisor import LoaderPool, LoaderSettings, LoaderState, LoaderStatus, LoadTask

T = TypeVar("T")
R = TypeVar("R", bound=wire.Report)

KIB = 1024
MIB = 1024 * KIB
HEADER_BYTES = 4096
CHUNK_BYTES = 64 * KIB
DEADLINE_S = 20.0
PROOF_SEED = 41


@dataclass(frozen=True)
class Blob:
    """A file whose data section holds `data`, with one checksum for every `CHUNK_BYTES`."""

    path: Path
    data: bytes
    xxh3: tuple[int, ...]

    def load(self, load_id: int = 1, arena_offset: int = 0, **changes: object) -> wire.Load:
        return wire.Load(**self._fields(load_id, arena_offset) | changes)  # type: ignore[arg-type]

    def task(self, load_id: int = 1, arena_offset: int = 0, **changes: object) -> LoadTask:
        return LoadTask(**{"name": self.path.name} | self._fields(load_id, arena_offset) | changes)  # type: ignore[arg-type]

    def _fields(self, load_id: int, arena_offset: int) -> dict[str, object]:
        return {
            "load_id": load_id,
            "path": str(self.path),
            "file_offset": HEADER_BYTES,
            "size_bytes": len(self.data),
            "arena_offset": arena_offset,
            "checksum_chunk_bytes": CHUNK_BYTES,
            "xxh3": self.xxh3,
        }


def make_blob(path: Path, size_bytes: int = 300_000, seed: int = 0) -> Blob:
    """Random bytes behind a header."""
    generator = random.Random(seed)
    data = generator.randbytes(size_bytes)
    path.write_bytes(generator.randbytes(HEADER_BYTES) + data)
    chunks = (data[start : start + CHUNK_BYTES] for start in range(0, size_bytes, CHUNK_BYTES))
    return Blob(path, data, tuple(xxhash.xxh3_64_intdigest(chunk) for chunk in chunks))


def arena_bytes(arena: Arena, offset: int, size_bytes: int) -> bytes:
    """What is in a CPU arena, without torch."""
    return os.pread(arena.fds()[0], size_bytes, offset)


@contextlib.contextmanager
def cpu_arena(size_bytes: int = 4 * MIB) -> Iterator[CpuArena]:
    arena = CpuArena(size_bytes)
    try:
        yield arena
    finally:
        arena.close()


@contextlib.contextmanager
def cpu_host_pool(size_bytes: int = 4 * MIB) -> Iterator[HostPool]:
    pool = HostPool(size_bytes)
    try:
        yield pool
    finally:
        pool.close()


class PoolKit:
    """A pool on the running loop, the events and spans it emitted, and ways to wait for them."""

    def __init__(
        self, arena: Arena, count: int, settings: LoaderSettings, host_pool: HostPool | None = None
    ) -> None:
        self.arena = arena
        self.events: list[Event] = []
        self.spans: list[Span] = []
        self.pool = LoaderPool(
            asyncio.get_running_loop(),
            count=count,
            settings=settings,
            record=self.spans.append,
            host_pool=host_pool,
        )

    def start(self) -> None:
        self.pool.start()
        self.pool.open(self.arena, self.events.append)

    async def until(self, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Let the loop run until the condition holds."""
        async with asyncio.timeout(deadline_s):
            while not condition():
                await asyncio.sleep(0.002)

    async def first(self, kind: type[T], after: int = 0) -> T:
        """The first event of this kind at or behind index `after`."""
        await self.until(lambda: self.of(kind, after))
        return self.of(kind, after)[0]

    def of(self, kind: type[T], after: int = 0) -> list[T]:
        return [event for event in self.events[after:] if isinstance(event, kind)]

    async def in_mid_load(self, blob: Blob, load_id: int = 1) -> int:
        """Start a slow load on the first loader and wait until it has written something; the loader's pid."""
        loader_id = (await self.first(LoaderReady)).loader_id
        self.pool.start_load(loader_id, blob.task(load_id))
        await self.until(lambda: self.status_of(loader_id).bytes_done > 0)
        assert self.status_of(loader_id).state is LoaderState.LOADING
        return self.status_of(loader_id).pid

    def kill_loader(self, slot: int = 0) -> None:
        """What the pool itself does to one, behind its back."""
        loader = self.pool._slots[slot].loader
        assert loader is not None
        loader.end.kill()

    def status(self, slot: int = 0) -> LoaderStatus:
        return self.pool.status()[slot]

    def status_of(self, loader_id: int) -> LoaderStatus:
        (status,) = [status for status in self.pool.status() if status.loader_id == loader_id]
        return status


@contextlib.asynccontextmanager
async def running_pool(
    *,
    count: int = 1,
    arena_size_bytes: int = 4 * MIB,
    host_pool_bytes: int = 0,
    start: bool = True,
    **settings: object,
) -> AsyncIterator[PoolKit]:
    """A started pool; stopped and checked for leftover processes and threads on the way out."""
    chosen = {"chunk_bytes": CHUNK_BYTES, "heartbeat_s": 0.05, "stop_grace_s": 1.0} | settings
    with contextlib.ExitStack() as memory:
        arena = memory.enter_context(cpu_arena(arena_size_bytes))
        host_pool = None
        if host_pool_bytes:
            host_pool = memory.enter_context(contextlib.closing(HostPool(host_pool_bytes)))
        kit = PoolKit(arena, count, LoaderSettings(**chosen), host_pool)  # type: ignore[arg-type]
        if start:
            kit.start()
        try:
            yield kit
        finally:
            pids = {status.pid for status in kit.pool.status()} - {0, os.getpid()}
            await kit.pool.stop()
            assert not any(is_alive(pid) for pid in pids), "stop() left a loader behind"
            assert not loader_threads(), "stop() left a loader thread behind"


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Loader:
    """One loader without a pool, spoken to packet by packet: a process, or a thread of this process."""

    def __init__(
        self, arena: Arena, host_pool: HostPool | None = None, *, as_thread: bool = False, **attach: object
    ) -> None:
        self.process = LoaderThread() if as_thread else LoaderProcess(LOADER_COMMAND)
        self.arena = arena
        self.reports: list[wire.Reports] = []
        fields = {"parent_pid": 0 if as_thread else os.getpid(), "heartbeat_s": 0.02}
        if host_pool is not None:
            fields["pool_bytes"] = host_pool.size_bytes
        self.process.send(wire.Attach(**fields | attach), host_pool.fds() if host_pool else ())  # type: ignore[arg-type]

    def open(self, **changes: object) -> None:
        """Have it open the arena, where a proof is."""
        offset = self.arena.size_bytes
        self.arena.write(offset, pattern(PROOF_SEED, PROOF_BYTES))
        fields = asdict(self.arena.open_fields()) | {
            "proof_offset": offset,
            "proof_bytes": PROOF_BYTES,
            "proof_seed": PROOF_SEED,
        }
        self.process.send(wire.OpenArena(**fields | changes), self.arena.fds())  # type: ignore[arg-type]

    def read_until(self, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Collect reports until the condition holds or the loader has closed its end."""
        ends_at_s = time.monotonic() + deadline_s
        ending = ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process, selectors.EVENT_READ)
            while not condition() and not ending:
                assert selector.select(ends_at_s - time.monotonic()), f"waited in vain: {self.reports[-3:]}"
                reports, ending = self.process.receive()
                self.reports += reports

    def expect(self, kind: type[R]) -> R:
        """The first report of this kind."""
        self.read_until(lambda: self.of(kind))
        assert self.of(kind), f"the loader closed after {self.reports[-3:]}"
        return self.of(kind)[0]

    def of(self, kind: type[R]) -> list[R]:
        return [report for report in self.reports if isinstance(report, kind)]

    def wait_exited(self) -> int:
        """The exit status."""
        assert wait_readable(self.process.pidfd), "the loader did not exit"
        return self.process.reap()


def wait_readable(fd: int, deadline_s: float = DEADLINE_S) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(deadline_s))


@contextlib.contextmanager
def bare_loader(
    arena: Arena,
    host_pool: HostPool | None = None,
    *,
    as_thread: bool = False,
    opens: dict[str, object] | None = None,
    **attach: object,
) -> Iterator[Loader]:
    """A loader that has been told to open the arena, and that is surely gone afterwards."""
    loader = Loader(arena, host_pool, as_thread=as_thread, **attach)
    try:
        with contextlib.suppress(BrokenPipeError):  # one that was told to die at once
            loader.open(**opens or {})
        yield loader
    finally:
        if loader.process.fileno() >= 0:
            loader.process.kill()
            loader.wait_exited()
