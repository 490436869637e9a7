"""Loads as orders to a loader, and their reports as events of the core."""

import logging

from understudyd.core.events import Event, LoadCancelled, LoadFailed, LoadFinished
from understudyd.core.types import ErrorCode
from understudyd.loader import wire
from understudyd.shell.loader_life import Slot
from understudyd.shell.loading import PLAIN_ROUTE, LoadTask
from understudyd.shell.ports import RecordSpan

_log = logging.getLogger(__name__)

Ending = wire.Loaded | wire.LoadFault | wire.LoadStopped


class LoadBook:
    """Remembers which file versions were verified, and writes finished loads into the timeline."""

    def __init__(self, record: RecordSpan) -> None:
        self._record = record
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
            return LoadFailed(task.load_id, ErrorCode.LOAD_FAILED, f"{task.path} has too many checksums")
        return order

    def ended(self, slot: Slot, task: LoadTask, report: Ending) -> Event:
        """The load's one event."""
        match report:
            case wire.Loaded(started_at_s=started_at_s, ended_at_s=ended_at_s, version=version):
                if report.verified and version is not None:
                    self._verified[task.path] = version
                slot.loaded(task.size_bytes, ended_at_s - started_at_s)
                name = task.name if task.route == PLAIN_ROUTE else f"{task.name} ({task.route})"
                self._record(f"loader {slot.number}", name, started_at_s, ended_at_s)
                return LoadFinished(task.load_id)
            case wire.LoadFault(corrupt=corrupt, message=message):
                if task.must_verify:
                    _log.warning("%s: %s; it is read from disk instead", task.name, message)
                self._verified.pop(task.path, None)
                code = ErrorCode.MODEL_CORRUPT if corrupt else ErrorCode.LOAD_FAILED
                return LoadFailed(task.load_id, code, message)
            case wire.LoadStopped():
                return LoadCancelled(task.load_id)
