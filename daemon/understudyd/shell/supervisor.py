"""The loader pool: keeps `count` loaders at work, gives them loads, tells the core what became of them.

A loader that dies, falls silent, gets stuck or talks nonsense is killed, reaped and followed by a new one
under a new id; its place in the pool, the slot, keeps its number. Everything here runs on the event loop's
thread.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict

from understudy.trace import Record
from understudyd.core.events import LoaderLost, LoaderReady, LoaderReaped, LoadFailed
from understudyd.loader import wire
from understudyd.loader.proof import PROOF_BYTES, holds, pattern
from understudyd.shell.hand_over import HandOver
from understudyd.shell.host_pool import HostPool
from understudyd.shell.load_book import LoadBook
from understudyd.shell.loader_life import Loader, Slot
from understudyd.shell.loading import LoaderSettings, LoaderState, LoaderStatus, LoadTask
from understudyd.shell.memory import Arena, ArenaError
from understudyd.shell.meter import LoadMeter
from understudyd.shell.ports import Emit

__all__ = ["LoaderPool", "LoaderSettings", "LoaderState", "LoaderStatus", "LoadTask"]

_log = logging.getLogger(__name__)

_KILLED_WITHIN_S = 10.0
_LAST_CALL_S = 0.2  # the whole machine may have stood still, and the loader a moment longer


class LoaderPool:
    """`count` loaders over one arena. Emits each load's one event, or `LoaderLost` of its loader.

    The arena comes later than the loaders (`open`): its `auto` size is what their contexts leave.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        count: int,
        settings: LoaderSettings,
        record: Record,
        host_pool: HostPool | None = None,
        gpu_uuid: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hand_over = HandOver(settings)
        self._loop = loop
        self._arena: Arena | None = None
        self._host_pool = host_pool
        self._gpu_uuid = gpu_uuid
        self._settings = settings
        self._emit: Emit = _to_nobody
        self._attached = asyncio.Event()
        self._book = LoadBook(record, clock)
        self._clock = clock
        self._slots = [Slot(number) for number in range(count)]
        self._loaders: dict[int, Loader] = {}
        self._next_id = 0
        self._is_paused = False
        self._is_stopping = False

    # -- what the daemon asks -----------------------------------------------------------------------

    def start(self) -> None:
        """Spawn the loaders. They come up as far as they can without the arena."""
        for slot in self._slots:
            self._spawn(slot)

    async def attached(self) -> None:
        """Return when every loader has its device context or has shown that it gets none, or time is up."""
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                await self._attached.wait()
        except TimeoutError:
            _log.warning("not every loader has come up within %g s", self._settings.start_timeout_s)

    def open(self, arena: Arena, emit: Emit) -> None:
        """The arena stands: `emit` hears `LoaderReady` from each loader that has opened and proved it.

        Raises `ArenaError` when loaders may only be processes and the arena cannot be shared with any.
        """
        self.hand_over.look_at(arena)
        self._arena, self._emit = arena, emit
        for loader in list(self._loaders.values()):
            if self.hand_over.by_threads and not loader.end.is_thread:
                self._lose(loader, "is a process, which cannot reach this arena")
            elif loader.is_attached:
                self._open(loader, arena)

    def pause(self, is_paused: bool) -> None:
        """Have every loader rest between two pieces, or go on; those that come later too."""
        self._is_paused = is_paused
        for loader in list(self._loaders.values()):
            loader.progressed_at_s = self._clock()
            if loader.is_ready and not loader.is_lost:
                self._send(loader, wire.Pause(is_paused=is_paused))

    def start_load(self, loader_id: int, task: LoadTask) -> None:
        """Give a ready loader a load. For a loader that is gone, `LoaderLost` is the answer."""
        loader = self._loaders.get(loader_id)
        if loader is None or loader.is_lost:
            return
        match self._book.order(task):
            case LoadFailed() as failed:
                self._emit(failed)
            case order:
                if not loader.tasks:
                    loader.progressed_at_s = self._clock()
                loader.tasks[task.load_id] = task
                self._send(loader, order)

    def cancel_load(self, load_id: int) -> None:
        """Have a load stopped between two pieces; it still ends in one of its events."""
        for loader in self._loaders.values():
            if load_id in loader.tasks and not loader.is_lost:
                self._send(loader, wire.Cancel(load_id=load_id))

    @property
    def meter(self) -> LoadMeter:
        """What was loaded so far, for the metrics."""
        return self._book.meter

    def status(self) -> list[LoaderStatus]:
        """One entry a slot."""
        return [slot.status() for slot in self._slots]

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
            _log.warning("loader %d (pid %d) did not stop; killing it", loader.loader_id, loader.end.pid)
            loader.end.kill()
        can_be_killed = not all(loader.end.is_thread for loader in self._loaders.values())
        if not await self._all_gone_within(_KILLED_WITHIN_S if can_be_killed else 0.0):
            _log.error("%d loaders hang in the kernel; leaving them to it", len(self._loaders))

    async def _all_gone_within(self, seconds: float) -> bool:
        if gone := [loader.gone for loader in self._loaders.values()]:
            await asyncio.wait(gone, timeout=seconds)
        return not self._loaders

    # -- coming up ----------------------------------------------------------------------------------

    def _spawn(self, slot: Slot) -> None:
        slot.respawn = None
        try:
            end = self.hand_over.spawn()
        except OSError as error:  # no memory or no process to be had now
            _log.error("cannot spawn a loader: %s", error)
            self._respawn(slot, f"cannot be spawned: {error}", lived_s=0.0)
            return
        now_s = self._clock()
        loader = Loader(self._next_id, slot, end, now_s, self._loop.create_future(), asked_at_s=now_s)
        self._next_id += 1
        self._loaders[loader.loader_id] = slot.loader = loader
        self._loop.add_reader(end.fileno(), self._on_readable, loader)
        self._loop.add_reader(end.pidfd, self._on_ended, loader)
        self._attach(loader)
        self._watch(loader, now_s)

    def _attach(self, loader: Loader) -> None:
        settings, pool = self._settings, self._host_pool
        order = wire.Attach(
            gpu_uuid=self._gpu_uuid,
            pool_bytes=0 if pool is None else pool.size_bytes,
            chunk_bytes=settings.chunk_bytes,
            reader_threads=settings.reader_threads,
            copies_in_flight=settings.copies_in_flight,
            rate_limit_bytes_per_s=settings.rate_limit_bytes_per_s,
            heartbeat_s=settings.heartbeat_s,
            parent_pid=0 if loader.end.is_thread else os.getpid(),
        )
        self._send(loader, order, () if pool is None else pool.fds())

    def _note_attached(self) -> None:
        """Nobody need be waited for once the first attempt of every slot has gone well or ill."""
        loaders = [slot.loader for slot in self._slots]
        if all(x is None or x.is_attached or x.is_lost for x in loaders):
            self._attached.set()

    def _open(self, loader: Loader, arena: Arena) -> None:
        """Have a loader open the arena, with a proof to be found there."""
        seed, offset = self._proof(loader, arena)
        try:
            arena.write(offset, pattern(seed, PROOF_BYTES))
        except ArenaError as error:
            self._lose(loader, f"cannot be given a proof: {error}")
            return
        fields = asdict(self.hand_over.open_fields(arena))
        order = wire.OpenArena(**fields, proof_offset=offset, proof_bytes=PROOF_BYTES, proof_seed=seed)
        loader.asked_at_s = self._clock()
        self._send(loader, order, arena.fds())

    def _proof(self, loader: Loader, arena: Arena) -> tuple[int, int]:
        """The seed, which no other loader has, and the place of the slot's proof."""
        return 2 * loader.loader_id, arena.size_bytes + loader.slot.number * PROOF_BYTES

    def _check_proof(self, loader: Loader, arena: Arena) -> str:
        """What is wrong with the proof that the loader says it has written, if anything."""
        seed, offset = self._proof(loader, arena)
        try:
            is_there = holds(arena.read(offset, PROOF_BYTES), seed + 1)
        except ArenaError as error:
            return f"has a proof that cannot be read: {error}"
        return "" if is_there else "wrote its proof elsewhere than into the arena"

    def _welcome(self, loader: Loader, arena: Arena) -> None:
        """The loader has opened the arena, as it says."""
        if missing := self._check_proof(loader, arena):
            self._refused(loader, missing)
            return
        loader.asked_at_s, loader.is_ready = None, True
        if self._is_paused:
            self._send(loader, wire.Pause(is_paused=True))
        self._emit(LoaderReady(loader.loader_id))

    def _refused(self, loader: Loader, reason: str) -> None:
        """The loader cannot share the arena, and no other process is likely to."""
        if not loader.end.is_thread:
            self.hand_over.refused(f"a loader {reason}")
        self._lose(loader, reason)

    # -- life and death -----------------------------------------------------------------------------

    def _send(self, loader: Loader, order: wire.Order, fds: tuple[int, ...] = ()) -> None:
        try:
            loader.end.send(order, fds)
        except OSError as error:
            self._lose(loader, f"takes no orders: {error.strerror}")

    def _watch(self, loader: Loader, due_at_s: float) -> None:
        """Wake up when patience with the loader will have ended."""
        settings = self._settings
        ends_at_s, reason = loader.patience(settings, self._is_paused)
        if ends_at_s <= self._clock():
            self._on_readable(loader)  # this loop may have been busy while the loader spoke
            ends_at_s, reason = loader.patience(settings, self._is_paused)
        if loader.is_lost:
            return
        now_s = self._clock()
        nap_s = min(ends_at_s - now_s, settings.dead_after_s)
        if nap_s <= 0 and loader.end.is_thread and now_s > due_at_s + settings.heartbeat_s:
            nap_s = 2 * settings.heartbeat_s  # what held up this thread may have held up that one
        elif nap_s <= 0 and not loader.is_on_notice:
            nap_s, loader.is_on_notice = _LAST_CALL_S, True
        elif nap_s > 0:
            loader.is_on_notice = False
        if nap_s <= 0:
            self._lose(loader, reason)
        else:
            loader.watch = self._loop.call_later(nap_s, self._watch, loader, now_s + nap_s)

    def _lose(self, loader: Loader, reason: str) -> None:
        """Declare a loader dead, make sure that it is, and send for the next one at once."""
        if loader.is_lost:
            return
        loader.is_lost = True
        for task in loader.tasks.values():
            self._book.lost(loader.slot, task)
        loader.tasks.clear()
        self._loop.remove_reader(loader.end.fileno())
        loader.end.kill()
        if loader.watch is not None:
            loader.watch.cancel()
        if self._is_stopping:
            return
        _log.warning("loader %d (pid %d) is lost: it %s", loader.loader_id, loader.end.pid, reason)
        if loader.end.is_thread:
            loader.watch = self._loop.call_later(self._settings.stop_grace_s, _say_it_hangs, loader)
        if loader.is_ready:
            self._emit(LoaderLost(loader.loader_id, f"loader {loader.loader_id} {reason}"))
        self._respawn(loader.slot, reason, self._clock() - loader.spawned_at_s)

    def _respawn(self, slot: Slot, reason: str, lived_s: float) -> None:
        pause_s = slot.died(reason, lived_s, self._settings)
        self._note_attached()
        slot.respawn = self._loop.call_later(pause_s, self._spawn, slot)

    def _on_ended(self, loader: Loader) -> None:
        """The loader is gone: hear its last words, then reap it."""
        while not loader.is_lost and self._on_readable(loader):
            pass
        self._loop.remove_reader(loader.end.pidfd)
        self._lose(loader, "has ended")
        if loader.watch is not None:
            loader.watch.cancel()
        status = loader.end.reap()
        del self._loaders[loader.loader_id]
        loader.gone.set_result(None)
        _log.info("loader %d (pid %d) ended with status %d", loader.loader_id, loader.end.pid, status)
        if loader.is_ready and not self._is_stopping:
            self._emit(LoaderReaped(loader.loader_id))

    # -- what loaders say ---------------------------------------------------------------------------

    def _on_readable(self, loader: Loader) -> bool:
        """A bounded number of reports, whether there were any; the loop calls again when there are more."""
        reports, ending = loader.end.receive()
        for report in reports:
            if not loader.is_lost:
                self._take(loader, report)
        if ending:
            self._lose(loader, ending)
        return bool(reports)

    def _take(self, loader: Loader, report: wire.Reports) -> None:
        loader.heard_at_s = self._clock()
        match report:
            case wire.Attached(wire_version=wire.WIRE_VERSION) if not loader.is_attached:
                loader.asked_at_s, loader.is_attached = None, True
                self._note_attached()
                if self._arena is not None:
                    self._open(loader, self._arena)
            case wire.Ready() if self._arena is not None and loader.is_attached and not loader.is_ready:
                self._welcome(loader, self._arena)
            case wire.Attached() | wire.Ready():
                self._lose(loader, "speaks another version, or came up twice")
            case wire.Heartbeat(load_id=load_id, bytes_done=bytes_done):
                loader.beats(load_id, bytes_done, self._clock())
            case wire.Notice(message=message):
                _log.warning("loader %d: %s", loader.loader_id, message)
            case wire.Fatal(message=message, is_refused=is_refused):
                lose = self._refused if is_refused else self._lose
                lose(loader, f"gave up: {message}")
            case wire.Loaded() | wire.LoadFault() | wire.LoadStopped():
                if (task := loader.tasks.pop(report.load_id, None)) is not None:
                    loader.bytes_done, loader.progressed_at_s = 0, self._clock()
                    self._emit(self._book.ended(loader.slot, task, report))


def _to_nobody(event: object) -> None:
    """Before the arena stands there is nothing to tell."""


def _say_it_hangs(loader: Loader) -> None:
    _log.error(
        "loader %d is a thread that hangs and cannot be killed: what it was loading to stays out of use "
        "until it ends",
        loader.loader_id,
    )
