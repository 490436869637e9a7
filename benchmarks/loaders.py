"""A loader pool on an event loop of its own, for programs that give loads and wait. No torch here."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from understudyd.core.events import (
    Event,
    LoaderLost,
    LoaderReady,
    LoadFailed,
    LoadFinished,
)
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import Arena
from understudyd.shell.supervisor import LoaderPool, LoaderSettings, LoaderStatus, LoadTask
from understudyd.store.blob_writer import CHECKSUM_CHUNK_BYTES
from understudyd.store.records import BlobRecord

T = TypeVar("T")
MakeTask = Callable[[int], LoadTask]
"""A load for this id."""

PATIENCE_S = 60.0
DEFAULTS = LoaderSettings()


class LoadTrouble(Exception):
    """A load did not end well, or a loader did not come up."""


@dataclass(frozen=True, slots=True)
class Source:
    """A blob's file and how it is loaded."""

    path: Path
    record: BlobRecord

    @property
    def size_bytes(self) -> int:
        """Length of the data section."""
        return self.record.size_bytes

    def is_at(self, content: "np.ndarray[Any, np.dtype[np.uint8]]") -> bool:
        """Whether these bytes are the blob's, by its checksums."""
        pieces = (
            content[at : at + self.record.chunk_bytes]
            for at in range(0, len(content), self.record.chunk_bytes)
        )
        return self.record.xxh3 == tuple(xxhash.xxh3_64_intdigest(piece.data) for piece in pieces)

    def at(self, arena_offset: int | None, **route: Any) -> "MakeTask":
        """Loads of it to this place; `route` is what else `task` takes."""
        return lambda load_id: self.task(load_id, arena_offset, **route)

    def task(
        self,
        load_id: int,
        arena_offset: int | None = 0,
        pool_offset: int | None = None,
        from_pool: bool = False,
    ) -> LoadTask:
        """A load of the whole blob."""
        return LoadTask(
            load_id=load_id,
            name=self.path.name,
            path=str(self.path),
            file_offset=self.record.data_start_bytes,
            size_bytes=self.record.size_bytes,
            arena_offset=arena_offset,
            pool_offset=pool_offset,
            from_pool=from_pool,
            checksum_chunk_bytes=self.record.chunk_bytes,
            xxh3=self.record.xxh3,
        )


def noise_file(path: Path, size_bytes: int, seed: int = 0) -> Source:
    """A file of random bytes with its checksums, loaded whole."""
    words = np.random.default_rng(seed).integers(0, 1 << 64, -(-size_bytes // 8), dtype=np.uint64)
    data = words.view(np.uint8)[:size_bytes]
    data.tofile(path)
    pieces = (
        data[start : start + CHECKSUM_CHUNK_BYTES] for start in range(0, size_bytes, CHECKSUM_CHUNK_BYTES)
    )
    record = BlobRecord(
        sha256="",
        data_start_bytes=0,
        size_bytes=size_bytes,
        chunk_bytes=CHECKSUM_CHUNK_BYTES,
        xxh3=tuple(xxhash.xxh3_64_intdigest(piece) for piece in pieces),
    )
    return Source(path, record)


class Loaders:
    """`count` loaders, spawned on a thread that lives until `close`."""

    def __init__(
        self,
        *,
        count: int = 1,
        settings: LoaderSettings = DEFAULTS,
        host_pool: HostPool | None = None,
        gpu_uuid: str = "",
    ) -> None:
        self.events: list[tuple[float, Event]] = []
        self._count = count
        self._changed = threading.Condition()
        self._on_event: Callable[[Event], None] = lambda event: None
        self._next_load_id = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="loaders", daemon=True)
        self._thread.start()
        self.pool = self._call(
            lambda: LoaderPool(
                self._loop,
                count=count,
                settings=settings,
                record=lambda span: None,
                host_pool=host_pool,
                gpu_uuid=gpu_uuid,
            )
        )

    # -- life ---------------------------------------------------------------------------------------

    def start(self) -> float:
        """Spawn them and wait until each has its device context; seconds."""
        started_s = time.monotonic()
        self._call(self.pool.start)
        asyncio.run_coroutine_threadsafe(self.pool.attached(), self._loop).result(PATIENCE_S)
        return time.monotonic() - started_s

    def open(self, arena: Arena) -> float:
        """Have them open and prove the arena; seconds until the last is ready. Raises `LoadTrouble`."""
        started_s = time.monotonic()
        self._call(lambda: self.pool.open(arena, self._emit))
        self.wait(lambda: len(self.ready()) == self._count, "the loaders are ready")
        return time.monotonic() - started_s

    def close(self) -> None:
        """Stop and reap them."""
        asyncio.run_coroutine_threadsafe(self.pool.stop(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def kill(self, loader_id: int) -> float:
        """SIGKILL; the moment it was sent."""
        pid = next(status.pid for status in self.status() if status.loader_id == loader_id)
        os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    # -- what there is ------------------------------------------------------------------------------

    def status(self) -> list[LoaderStatus]:
        """One entry a loader."""
        return self._call(self.pool.status)

    def ready(self) -> list[int]:
        """The loaders that are at work, by id."""
        events = [event for _, event in self.events]
        lost = {event.loader_id for event in events if isinstance(event, LoaderLost)}
        ready = [event.loader_id for event in events if isinstance(event, LoaderReady)]
        return [loader_id for loader_id in ready if loader_id not in lost]

    def of(self, kind: type[T]) -> list[tuple[float, T]]:
        """The events of a kind with their moments, in order."""
        return [(at_s, event) for at_s, event in self.events if isinstance(event, kind)]

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Return when the condition holds; looked at after each event. Raises `LoadTrouble`."""
        with self._changed:
            if self._changed.wait_for(condition, timeout_s):
                return
        losses = [status.last_loss for status in self.status() if status.last_loss]
        raise LoadTrouble(f"waited {timeout_s:g} s in vain until {what}; last losses: {losses}")

    # -- loads --------------------------------------------------------------------------------------

    def start_load(self, make: MakeTask, loader_id: int) -> int:
        """Give a loader a load; its id."""
        load_id = self._new_load_id()
        self._call(lambda: self.pool.start_load(loader_id, make(load_id)))
        return load_id

    def load(self, makes: Sequence[MakeTask]) -> float:
        """Share the loads out and wait for all of them; seconds. Raises `LoadTrouble`."""
        loaders = self.ready()
        started_s = time.monotonic()
        open_ids = {self.start_load(make, loaders[i % len(loaders)]) for i, make in enumerate(makes)}
        self.wait(lambda: self._all_finished(open_ids), f"{len(open_ids)} loads are done")
        ended_s = max(at_s for at_s, event in self.of(LoadFinished) if event.load_id in open_ids)
        return ended_s - started_s

    @contextlib.contextmanager
    def kept_busy(self, makes: Sequence[MakeTask]) -> Iterator[list[int]]:
        """Every loader repeats its load for as long as the block lasts, with one more always in hand.

        `makes` has one load a loader, all of different places. Yields the sizes of the loads that finished.
        """
        done: list[int] = []
        sizes: dict[int, tuple[int, MakeTask, int]] = {}
        is_over = threading.Event()

        def again(loader_id: int, make: MakeTask) -> None:
            load_id = self._new_load_id()
            task = make(load_id)
            sizes[load_id] = (loader_id, make, task.size_bytes)
            self.pool.start_load(loader_id, task)

        def on_event(event: Event) -> None:
            if isinstance(event, LoadFinished) and (known := sizes.pop(event.load_id, None)) is not None:
                done.append(known[2])
                if not is_over.is_set():
                    again(known[0], known[1])

        self._on_event = on_event
        for loader_id, make in zip(self.ready(), makes, strict=True):
            for _ in range(2):
                self._call(partial(again, loader_id, make))
        try:
            yield done
        finally:
            is_over.set()
            self.wait(lambda: not sizes, "the last loads are done")

    # -- inside -------------------------------------------------------------------------------------

    def _new_load_id(self) -> int:
        self._next_load_id += 1
        return self._next_load_id

    def _all_finished(self, load_ids: set[int]) -> bool:
        for _, event in self.events:
            if isinstance(event, LoadFailed) and event.load_id in load_ids:
                raise LoadTrouble(event.message)
        return load_ids <= {event.load_id for _, event in self.of(LoadFinished)}

    def _emit(self, event: Event) -> None:
        self._on_event(event)
        with self._changed:
            self.events.append((time.monotonic(), event))
            self._changed.notify_all()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(PATIENCE_S)


@contextlib.contextmanager
def running_loaders(
    arena: Arena,
    *,
    count: int = 1,
    settings: LoaderSettings = DEFAULTS,
    host_pool: HostPool | None = None,
    gpu_uuid: str = "",
) -> Iterator[Loaders]:
    """Loaders that are ready, and gone afterwards."""
    loaders = Loaders(count=count, settings=settings, host_pool=host_pool, gpu_uuid=gpu_uuid)
    try:
        loaders.start()
        loaders.open(arena)
        yield loaders
    finally:
        loaders.close()
