"""The request log: one JSON line for each request that got its images, for `understudyd simulate`.

Lines are in order of arrival, as the simulator wants them: one that is finished waits here for those that
came before it. A thread writes them; whatever happens to the file, nobody waits for it. A full file becomes
`NAME.1`, and the `NAME.1` before it is gone.
"""

import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from understudy.wire import Adapter, Generate, Timings
from understudyd.recorded import TraceRequest, log_line
from understudyd.shell.adapter_keeper import Wish
from understudyd.shell.threads import in_daemon_thread

log = logging.getLogger(__name__)

MOST_HELD = 10_000
_MOST_QUEUED = 100_000
_TAIL_BYTES = 64 * 1024
_LEAVING_S = 5.0
_NO_LINE = b""


class RequestLog:
    """Appends to `path`, at most about `most_bytes` of it. Only the event loop calls this."""

    def __init__(
        self,
        path: Path,
        most_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        most_held: int = MOST_HELD,
    ) -> None:
        self._unix_s = wall_clock() - clock()  # once: what is logged must never go back in time
        self._most_held = most_held
        self._open: OrderedDict[str, bytes | None] = OrderedDict()  # by arrival; None while it has no answer
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MOST_QUEUED)
        self._lost = 0
        writer = _Writer(path, most_bytes, self._unix_s + clock())
        self._thread = threading.Thread(
            target=writer.run, args=(self._lines,), name="request log", daemon=True
        )
        self._thread.start()

    def received(self, request_id: str) -> None:
        """A client's request came."""
        self._open[request_id] = None
        if len(self._open) > self._most_held:  # one that waits for ever must not hold up the others
            self._open.popitem(last=False)
            self._pass_on()

    def finished(
        self,
        request_id: str,
        client: str,
        request: Generate,
        wish: Wish,
        steps: int,
        received_at_s: float,
        timings: Timings,
    ) -> None:
        """It got its images, after `steps` steps (0: nobody knows)."""
        line = TraceRequest(
            arrival_s=round(self._unix_s + received_at_s, 6),
            model=wish.base,
            client=client.partition("#")[0],
            loras="+".join(map(_lora, wish.adapters)),
            task=request.task or "",
            images=request.images,
            steps=max(1, steps or request.steps or 1),
            duration_s=round(timings.total_s - timings.queued_s, 6),
            priority=request.priority,
        )
        self._settle(request_id, log_line(line))

    def failed(self, request_id: str) -> None:
        """It got none, and no line."""
        self._settle(request_id, _NO_LINE)

    async def close(self) -> None:
        """Write what is finished; what still waits is not logged."""
        for line in self._open.values():
            self._offer(line)
        self._open.clear()
        self._offer(None, is_end=True)
        await in_daemon_thread(self._thread.join, _LEAVING_S)
        if self._lost:
            log.warning("%d lines of the request log were lost: its disk was too slow", self._lost)

    # -- inside -------------------------------------------------------------------------------------

    def _settle(self, request_id: str, line: bytes) -> None:
        if request_id in self._open:
            self._open[request_id] = line
            self._pass_on()

    def _pass_on(self) -> None:
        while self._open and next(iter(self._open.values())) is not None:
            self._offer(self._open.popitem(last=False)[1])

    def _offer(self, line: bytes | None, *, is_end: bool = False) -> None:
        if line or is_end:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self._lost += 1


def _lora(adapter: Adapter) -> str:
    return adapter.name if adapter.scale == 1.0 else f"{adapter.name}@{adapter.scale!r}"


class _Writer:
    """The thread's side: `run` until None comes."""

    def __init__(self, path: Path, most_bytes: int, now_unix_s: float) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._now_unix_s = now_unix_s
        self._file: BinaryIO | None = None
        self._is_broken = False

    def run(self, lines: "queue.Queue[bytes | None]") -> None:
        """Write what comes, all that is there at once."""
        is_open = True
        while is_open:
            batch = [lines.get()]
            while not lines.empty():
                batch.append(lines.get())
            is_open = batch[-1] is not None
            self._write(b"".join(line for line in batch if line is not None))
        self._close()

    def _write(self, data: bytes) -> None:
        try:
            self._append(data)
            self._is_broken = False
        except OSError as error:
            self._close()  # the next attempt removes what is half written
            if not self._is_broken:
                log.warning("the request log %s cannot be written: %s", self._path, error.strerror)
            self._is_broken = True

    def _append(self, data: bytes) -> None:
        file = self._file or self._opened()
        if file.tell() and file.tell() + len(data) > self._most_bytes:
            self._close()
            self._set_aside()
            file = self._opened()
        while data:
            data = data[file.write(data) :]

    def _opened(self) -> BinaryIO:
        """The log, ending with a whole line that is not from the future."""
        if self._path.exists() and _last_arrival_s(self._path) > self._now_unix_s:
            self._set_aside()
        self._file = file = self._path.open("ab", buffering=0)
        return file

    def _set_aside(self) -> None:
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _last_arrival_s(path: Path) -> float:
    """When the last request of a log came; what a crash or a full disk has left of a line is cut off."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        if len(whole) < len(tail):
            file.truncate(start + len(whole))
    try:
        return msgspec.json.decode(whole.splitlines()[-1], type=TraceRequest).arrival_s
    except (IndexError, msgspec.MsgspecError):
        return float("-inf")
