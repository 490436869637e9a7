"""What the forecast has learned outlives the daemon: a small file beside the store's models.

It is written every few minutes and at the end, by a thread and by one rename. One that is damaged, or written
by another version, is ignored with a warning: the forecast then learns anew, as on the first day.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from understudyd.core.machine import Machine
from understudyd.core.remembered import DamagedDocument, field, number, rows, text
from understudyd.shell.small_file import replace_file
from understudyd.shell.threads import in_daemon_thread

log = logging.getLogger(__name__)

NAME = "forecast.json"
PERIOD_S = 300.0
MOST_BYTES = 16 * 1024 * 1024
_LEAVING_S = 5.0


class ForecastFile:
    """Reads and writes forecast.json in `folder`. Only the event loop calls this; files are for threads.

    `revive` is told the names of models that were known when it was written, and may be made known again.
    """

    def __init__(
        self,
        folder: Path,
        machine: Machine,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        period_s: float = PERIOD_S,
        revive: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._path = folder / NAME
        self._machine = machine
        self._clock = clock
        self._wall_clock = wall_clock
        self._period_s = period_s
        self._revive = revive
        self._written = 0
        self._task: asyncio.Task[None] | None = None
        self._leaving = asyncio.Event()

    async def read(self) -> None:
        """Have the machine's forecast know what the file says of models that are here; before any request."""
        try:
            found = await in_daemon_thread(_read, self._path)
            self._restore(found)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # DamagedDocument and msgspec's errors are such
            log.warning("%s is ignored, the forecast starts anew: %s", self._path, error)

    def _restore(self, found: Any) -> None:
        residency, forecast = self._machine.residency, self._machine.forecast
        last_request_unix_s = number(field(found, "last_request_unix_s"), "last_request_unix_s")
        off_s = max(0.0, self._wall_clock() - last_request_unix_s)
        document, estimates = field(found, "forecast"), found.get("estimates")
        for name in rows(field(document, "names"), "names"):
            if text(name, "a name") not in residency.models:
                self._revive(name)
        forecast.restore(document, residency.models, residency.blobs, self._clock() - off_s)
        self._written = forecast.requests
        if estimates is not None:  # as of an older file: loads and runs are timed anew
            self._machine.outlook.estimates.restore(estimates, residency.models)

    def start(self) -> None:
        """Write from now on, every few minutes."""
        self._task = asyncio.create_task(self._keep_writing())

    async def close(self) -> None:
        """Write once more."""
        if self._task is not None:
            self._leaving.set()
            try:
                async with asyncio.timeout(_LEAVING_S):
                    await self._task
            except TimeoutError:
                log.warning("%s was not written in time", self._path)

    async def _keep_writing(self) -> None:
        """One after the other, to the end: an older file must not replace a newer one."""
        while not self._leaving.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s):
                    await self._leaving.wait()
            await self._write()
        await self._write()

    async def _write(self) -> None:
        forecast = self._machine.forecast
        if forecast.requests == self._written:
            return
        idle_s = self._clock() - forecast.last_request_s
        last_request_unix_s = round(self._wall_clock() - idle_s, 3)
        copy, estimates = forecast.copy(), self._machine.outlook.estimates.document()

        def write() -> None:
            document = {
                "last_request_unix_s": last_request_unix_s,
                "forecast": copy.document(),
                "estimates": estimates,
            }
            replace_file(self._path, msgspec.json.encode(document))

        try:
            await in_daemon_thread(write)
            self._written = copy.requests
        except OSError as error:
            log.warning("the forecast cannot be kept in %s: %s", self._path, error.strerror)


def _read(path: Path) -> Any:
    """In a thread. Raises `OSError` and `ValueError`."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DamagedDocument(f"larger than {MOST_BYTES} bytes")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DamagedDocument(str(error)) from error
