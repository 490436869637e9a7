"""Loads as orders to a loader, and their reports as events of the core."""

import logging
from collections.abc import Callable

from understudy.trace import CANCELLED, FAILED, LOST, Record, Span
from understudyd.core.events import Event, LoadCancelled, LoadFailed, LoadFinished
from understudyd.core.types import ErrorCode
from understudyd.loader import wire
from understudyd.shell.loader_life import Slot
from understudyd.shell.loading import LoadTask
from understudyd.shell.meter import LoadMeter

_log = logging.getLogger(__name__)

Ending = wire.Loaded | wire.LoadFault | wire.LoadStopped


class LoadBook:
    """Remembers which file versions were verified, and writes ended loads into timeline and meter."""

    def __init__(self, record: Record, clock: Callable[[], float]) -> None:
        self.meter = LoadMeter()
        self._record = record
        self._clock = clock
        self._begun_at_s: dict[int, float] = {}
        self._verified: dict[str, wire.FileVersion] = {}

    def order(self, task: LoadTask) -> wire.Load | LoadFailed:
        """What the loader is told, or why it cannot be told that."""
        order = wire.Load(
            load_id=task.load_id,
            path=task.path,
            file_offset=task.file_offset,
            size_bytes=task.size_bytes,
            arena_offset=task.arena_offset,
            pool_offset=task.pool_offset,
            from_pool=task.from_pool,
            must_verify=task.must_verify,
            checksum_chunk_bytes=task.checksum_chunk_bytes,
            xxh3=task.xxh3,
            expect=task.expect or self._verified.get(task.path),
        )
        if len(wire.encode(order)) > wire.MAX_PACKET_BYTES // 2:
            return LoadFailed(task.load_id, ErrorCode.LOAD_FAILED, _told(task, "it has too many checksums"))
        self._begun_at_s[task.load_id] = self._clock()
        return order

    def ended(self, slot: Slot, task: LoadTask, report: Ending) -> Event:
        """The load's one event."""
        begun_at_s = self._begun_at_s.pop(task.load_id)
        match report:
            case wire.Loaded(started_at_s=started_at_s, ended_at_s=ended_at_s, version=version):
                if report.verified and version is not None:
                    self._verified[task.path] = version
                slot.loaded(task.size_bytes, ended_at_s - started_at_s)
                self._note(slot, task, started_at_s, ended_at_s)
                return LoadFinished(task.load_id)
            case wire.LoadFault(corrupt=corrupt, message=message):
                if task.must_verify:
                    _log.warning("%s: %s; it is read from disk instead", task.name, message)
                else:
                    why = "is damaged" if corrupt else "cannot be loaded"
                    _log.warning("%s %s: %s (%s)", task.name, why, message, task.path)
                self._verified.pop(task.path, None)
                self._note(slot, task, begun_at_s, self._clock(), FAILED)
                code = ErrorCode.MODEL_CORRUPT if corrupt else ErrorCode.LOAD_FAILED
                return LoadFailed(task.load_id, code, _told(task, message, corrupt))
            case wire.LoadStopped():
                self._note(slot, task, begun_at_s, self._clock(), CANCELLED)
                return LoadCancelled(task.load_id)

    def lost(self, slot: Slot, task: LoadTask) -> None:
        """Its loader is."""
        self._note(slot, task, self._begun_at_s.pop(task.load_id), self._clock(), LOST)

    def _note(
        self, slot: Slot, task: LoadTask, started_at_s: float, ended_at_s: float, outcome: str = ""
    ) -> None:
        lane, route = f"loader {slot.number}", task.route
        self.meter.ended(route, task.size_bytes, ended_at_s - started_at_s, outcome)
        self._record(
            Span(lane, task.name, started_at_s, ended_at_s, task.size_bytes, route=route, outcome=outcome)
        )


def _told(task: LoadTask, message: str, is_damaged: bool = False) -> str:
    """For a client, who may be far away: the blob and what to do; the path is in the log only."""
    what = f"{task.name} (blob {task.blob})"
    if is_damaged:
        return f"{what} is damaged: {message}; add the model again with --replace"
    return f"{what} cannot be loaded: {message}; try again later, or add the model again with --replace"
