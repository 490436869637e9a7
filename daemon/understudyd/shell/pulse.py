"""Signs of life: the service manager's watchdog is fed, its status line kept, the warm pool's index written.

The beat is the event loop's own, and it is withheld when the stage makes no progress: a daemon that answers
pings but no request is as dead as one that hangs.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from understudyd.shell.health import stage_stalled_for_s
from understudyd.shell.kept_pool import KeptPool
from understudyd.shell.notify import ServiceManager
from understudyd.shell.runtime import Runtime

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Pulse:
    """Beats from `start` to `stop`. `stalled_after_s` is the patience with a stage that makes no step."""

    def __init__(
        self,
        manager: ServiceManager,
        runtime: Runtime,
        kept: KeptPool,
        *,
        stalled_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stalled_after_s = stalled_after_s
        self._manager = manager
        self._runtime = runtime
        self._kept = kept
        self._clock = clock
        self._said = ""
        self._noted: object = None
        self._is_stalled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Beat from now on; on the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._beat_on())

    def stop(self) -> None:
        """No more."""
        if self._task is not None:
            self._task.cancel()

    def beat(self) -> None:
        """One beat. It waits for nobody: what a manager does not take now it is told at the next one."""
        if self._is_stage_alive():
            self._manager.notify("WATCHDOG=1", patience_s=0)
        status = status_line(self._runtime)
        if status != self._said and self._manager.notify(f"STATUS={status}", patience_s=0):
            self._said = status
        machine = self._runtime.machine
        if (worth := (machine.queue.arrivals, machine.residency.arrivals)) != self._noted:
            self._noted = worth
            self._kept.write(machine)

    async def _beat_on(self) -> None:
        watchdog_s = self._manager.watchdog_s
        period_s = PERIOD_S if watchdog_s is None else min(PERIOD_S, watchdog_s / 4)
        while True:
            self.beat()
            await asyncio.sleep(period_s)

    def _is_stage_alive(self) -> bool:
        idle_s = stage_stalled_for_s(self._runtime, self._clock())
        was_stalled = self._is_stalled
        self._is_stalled = idle_s > self.stalled_after_s
        if self._is_stalled and not was_stalled:
            log.critical("the stage has made no progress for %.0f s; the watchdog is fed no more", idle_s)
        return not self._is_stalled


def status_line(runtime: Runtime) -> str:
    """What `systemctl status` shows: models, the queue, what runs, the last error."""
    machine = runtime.machine
    models = machine.residency.models
    resident = sum(model.is_resident for model in models.values())
    state = "serving" if machine.is_open else "taking no requests"
    parts = [f"{state}: {resident} of {len(models)} models resident", f"{len(machine.queue)} requests wait"]
    for request_id, request in machine.running.items():
        pending = runtime.pending.get(request_id)
        step = f", step {pending.step} of {pending.steps}" if pending is not None and pending.steps else ""
        parts.append(f"running {request.model}{step}")
    if runtime.tally.last_error:
        parts.append(f"last error: {runtime.tally.last_error}")
    return "; ".join(parts).replace("\n", " ")[:400]
