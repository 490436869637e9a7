"""The loader pool: keeps `count` loaders at work, gives them loads, tells the core what became of them.

A loader that dies, falls silent or talks nonsense is killed, reaped and followed by a new one under a new id;
its place in the pool, the slot, keeps its number. Everything here runs on the event loop's thread.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from understudyd.core.events import (
    LoadCancelled,
    LoaderLost,
    LoaderReady,
    LoaderReaped,
    LoadFailed,
    LoadFinished,
)
from understudyd.core.types import ErrorCode
from understudyd.loader import wire
from understudyd.shell.loader_process import LoaderProcess, MalformedReport
from understudyd.shell.loading import LoaderSettings, LoaderState, LoaderStatus, LoadTask
from understudyd.shell.memory import Arena
from understudyd.shell.ports import Emit, RecordSpan

__all__ = ["LoaderPool", "LoaderSettings", "LoaderState", "LoaderStatus", "LoadTask"]

_log = logging.getLogger(__name__)

_KILLED_WITHIN_S = 10.0


@dataclass(slots=True)
class _Slot:
    """A place in the pool and its record over all the loaders that had it."""

    number: int
    loader: "_Loader | None" = None
    respawn: asyncio.TimerHandle | None = None
    quick_deaths: int = 0
    restarts: int = 0
    loads_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    last_loss: str = ""


@dataclass(slots=True)
class _Loader:
    """One process and what is known of it."""

    loader_id: int
    slot: _Slot
    process: LoaderProcess
    spawned_at_s: float
    gone: "asyncio.Future[None]"
    heard_at_s: float | None = None
    is_ready: bool = False
    is_lost: bool = False
    bytes_done: int = 0
    tasks: dict[int, LoadTask] = field(default_factory=dict)
    watch: asyncio.TimerHandle | None = None


class LoaderPool:
    """`count` loaders over one arena. Emits each load's one event, or `LoaderLost` of its loader."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        arena: Arena,
        *,
        count: int,
        settings: LoaderSettings,
        emit: Emit,
        record: RecordSpan,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._arena = arena
        self._settings = settings
        self._emit = emit
        self._record = record
        self._clock = clock
        self._slots = [_Slot(number) for number in range(count)]
        self._loaders: dict[int, _Loader] = {}
        self._next_id = 0
        self._verified: dict[str, wire.FileVersion] = {}
        self._is_stopping = False

    # -- what the daemon asks -----------------------------------------------------------------------

    def start(self) -> None:
        """Spawn the loaders; `LoaderReady` follows from each."""
        for slot in self._slots:
            self._spawn(slot)

    def start_load(self, loader_id: int, task: LoadTask) -> None:
        """Give a ready loader a load. For a loader that is gone, `LoaderLost` is the answer."""
        loader = self._loaders.get(loader_id)
        if loader is None or loader.is_lost:
            return
        order = wire.Load(
            load_id=task.load_id,
            path=task.path,
            file_offset=task.file_offset,
            size_bytes=task.size_bytes,
            arena_offset=task.arena_offset,
            checksum_chunk_bytes=task.checksum_chunk_bytes,
            xxh3=task.xxh3,
            expect=task.expect or self._verified.get(task.path),
        )
        if len(wire.encode(order)) > wire.MAX_PACKET_BYTES // 2:
            self._emit(LoadFailed(task.load_id, ErrorCode.LOAD_FAILED, f"{task.path} has too many checksums"))
            return
        loader.tasks[task.load_id] = task
        self._send(loader, order)

    def cancel_load(self, load_id: int) -> None:
        """Have a load stopped between two pieces; it still ends in one of its events."""
        for loader in self._loaders.values():
            if load_id in loader.tasks and not loader.is_lost:
                self._send(loader, wire.Cancel(load_id=load_id))

    def status(self) -> list[LoaderStatus]:
        """One entry a slot."""
        return [_status(slot) for slot in self._slots]

    async def stop(self) -> None:
        """End every loader: by order, then by force; all are reaped. Loads in hand get no event any more."""
        self._is_stopping = True
        for slot in self._slots:
            if slot.respawn is not None:
                slot.respawn.cancel()
        for loader in list(self._loaders.values()):
            self._send(loader, wire.Stop())
        if await self._all_gone_within(self._settings.stop_grace_s):
            return
        for loader in list(self._loaders.values()):
            _log.warning("loader %d (pid %d) did not stop; killing it", loader.loader_id, loader.process.pid)
            loader.process.kill()
        if not await self._all_gone_within(_KILLED_WITHIN_S):
            _log.error("%d killed loaders hang in the kernel; leaving them to it", len(self._loaders))

    async def _all_gone_within(self, seconds: float) -> bool:
        if gone := [loader.gone for loader in self._loaders.values()]:
            await asyncio.wait(gone, timeout=seconds)
        return not self._loaders

    # -- life and death -----------------------------------------------------------------------------

    def _spawn(self, slot: _Slot) -> None:
        slot.respawn = None
        settings = self._settings
        try:
            process = LoaderProcess(settings.command)
        except OSError as error:  # no memory or no process to be had now
            _log.error("cannot spawn a loader: %s", error)
            slot.quick_deaths += 1
            slot.last_loss = f"cannot be spawned: {error}"
            self._respawn_later(slot)
            return
        loader = _Loader(self._next_id, slot, process, self._clock(), self._loop.create_future())
        self._next_id += 1
        self._loaders[loader.loader_id] = slot.loader = loader
        self._loop.add_reader(process.fileno(), self._on_readable, loader)
        self._loop.add_reader(process.pidfd, self._on_exited, loader)
        attach = wire.Attach(
            **asdict(self._arena.attach_fields()),
            chunk_bytes=settings.chunk_bytes,
            reader_threads=settings.reader_threads,
            copies_in_flight=settings.copies_in_flight,
            rate_limit_bytes_per_s=settings.rate_limit_bytes_per_s,
            heartbeat_s=settings.heartbeat_s,
            parent_pid=os.getpid(),
        )
        self._send(loader, attach, self._arena.fds())
        self._watch(loader)

    def _send(self, loader: _Loader, order: wire.Order, fds: tuple[int, ...] = ()) -> None:
        try:
            loader.process.send(order, fds)
        except OSError as error:
            self._lose(loader, f"takes no orders: {error.strerror}")

    def _watch(self, loader: _Loader) -> None:
        """Wake up when the loader will have been silent, or starting, for too long."""
        loader.watch = None
        if loader.is_lost:
            return
        if (remaining_s := self._patience_ends_at_s(loader) - self._clock()) <= 0:
            self._on_readable(loader)  # this loop may have been busy while the loader spoke
            remaining_s = self._patience_ends_at_s(loader) - self._clock()
        if remaining_s <= 0:
            self._lose(loader, "is silent" if loader.is_ready else "does not come up")
        if not loader.is_lost:
            nap_s = min(remaining_s, self._settings.dead_after_s)
            loader.watch = self._loop.call_later(nap_s, self._watch, loader)

    def _patience_ends_at_s(self, loader: _Loader) -> float:
        silent = (
            float("inf") if loader.heard_at_s is None else loader.heard_at_s + self._settings.dead_after_s
        )
        late = float("inf") if loader.is_ready else loader.spawned_at_s + self._settings.start_timeout_s
        return min(silent, late)

    def _lose(self, loader: _Loader, reason: str) -> None:
        """Declare a loader dead, make sure that it is, and send for the next one at once."""
        if loader.is_lost:
            return
        loader.is_lost = True
        loader.tasks.clear()
        self._loop.remove_reader(loader.process.fileno())
        loader.process.kill()
        if self._is_stopping:
            return
        _log.warning("loader %d (pid %d) is lost: it %s", loader.loader_id, loader.process.pid, reason)
        if loader.is_ready:
            self._emit(LoaderLost(loader.loader_id, f"loader {loader.loader_id} {reason}"))
        slot = loader.slot
        slot.last_loss = reason
        lived_s = self._clock() - loader.spawned_at_s
        slot.quick_deaths = slot.quick_deaths + 1 if lived_s < self._settings.stable_after_s else 0
        self._respawn_later(slot)

    def _respawn_later(self, slot: _Slot) -> None:
        """At once the first time, then with growing pauses while loaders keep dying young."""
        doublings = slot.quick_deaths - 2
        pause_s = 0.0 if doublings < 0 else self._settings.respawn_delay_s * 2 ** min(doublings, 16)
        slot.restarts += 1
        slot.respawn = self._loop.call_later(
            min(pause_s, self._settings.respawn_delay_max_s), self._spawn, slot
        )

    def _on_exited(self, loader: _Loader) -> None:
        """The process is gone: hear its last words, then reap it."""
        while not loader.is_lost and self._on_readable(loader):
            pass
        self._loop.remove_reader(loader.process.pidfd)
        if not loader.is_lost:
            self._lose(loader, "has exited")
        if loader.watch is not None:
            loader.watch.cancel()
        status = loader.process.reap()
        del self._loaders[loader.loader_id]
        loader.gone.set_result(None)
        _log.info("loader %d (pid %d) ended with status %d", loader.loader_id, loader.process.pid, status)
        if loader.is_ready and not self._is_stopping:
            self._emit(LoaderReaped(loader.loader_id))

    # -- what loaders say ---------------------------------------------------------------------------

    def _on_readable(self, loader: _Loader) -> bool:
        """A bounded number of reports, whether there were any; the loop calls again when there are more."""
        try:
            reports, is_closed = loader.process.receive()
        except MalformedReport as error:
            self._lose(loader, f"sent a malformed report: {error}")
            return False
        for report in reports:
            if not loader.is_lost:
                self._take(loader, report)
        if is_closed:
            self._lose(loader, "closed its connection")
        return bool(reports)

    def _take(self, loader: _Loader, report: wire.Reports) -> None:
        loader.heard_at_s = self._clock()
        match report:
            case wire.Ready(wire_version=wire.WIRE_VERSION) if not loader.is_ready:
                loader.is_ready = True
                self._emit(LoaderReady(loader.loader_id))
            case wire.Ready():
                self._lose(loader, "speaks another version, or said `ready` twice")
            case wire.Heartbeat(load_id=load_id, bytes_done=bytes_done):
                loader.bytes_done = bytes_done if load_id in loader.tasks else 0
            case wire.Fatal(message=message):
                self._lose(loader, f"gave up: {message}")
            case wire.Loaded() | wire.LoadFault() | wire.LoadStopped():
                if (task := loader.tasks.pop(report.load_id, None)) is not None:
                    loader.bytes_done = 0
                    self._end_load(loader.slot, task, report)

    def _end_load(
        self, slot: _Slot, task: LoadTask, report: wire.Loaded | wire.LoadFault | wire.LoadStopped
    ) -> None:
        match report:
            case wire.Loaded(started_at_s=started_at_s, ended_at_s=ended_at_s, version=version):
                if report.verified:
                    self._verified[task.path] = version
                slot.loads_done += 1
                slot.bytes_total += task.size_bytes
                slot.rate_bytes_per_s = task.size_bytes / max(ended_at_s - started_at_s, 1e-9)
                self._record(f"loader {slot.number}", task.name, started_at_s, ended_at_s)
                self._emit(LoadFinished(task.load_id))
            case wire.LoadFault(corrupt=corrupt, message=message):
                self._verified.pop(task.path, None)
                code = ErrorCode.MODEL_CORRUPT if corrupt else ErrorCode.LOAD_FAILED
                self._emit(LoadFailed(task.load_id, code, message))
            case wire.LoadStopped():
                self._emit(LoadCancelled(task.load_id))


def _status(slot: _Slot) -> LoaderStatus:
    loader = slot.loader
    task = next(iter(loader.tasks.values()), None) if loader is not None else None
    if loader is None or loader.is_lost:
        state = LoaderState.LOST
    elif not loader.is_ready:
        state = LoaderState.STARTING
    else:
        state = LoaderState.LOADING if task is not None else LoaderState.IDLE
    return LoaderStatus(
        loader_id=-1 if loader is None else loader.loader_id,
        slot=slot.number,
        pid=0 if loader is None else loader.process.pid,
        state=state,
        load=None if task is None else task.name,
        bytes_done=0 if loader is None else loader.bytes_done,
        size_bytes=0 if task is None else task.size_bytes,
        loads_done=slot.loads_done,
        bytes_total=slot.bytes_total,
        restarts=slot.restarts,
        rate_bytes_per_s=slot.rate_bytes_per_s,
        last_loss=slot.last_loss,
    )
