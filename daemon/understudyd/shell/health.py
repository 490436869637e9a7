"""Whether the daemon is alive, and whether it takes requests: what a probe asks."""

import time
from collections.abc import Callable

from understudyd.shell.runtime import Runtime


class Health:
    """`state` is the daemon's own, as `status` says it; `stalled_after_s` the patience with the stage.

    That the event loop turns is shown by being asked: a probe of one that hangs gets no answer.
    """

    def __init__(
        self,
        runtime: Runtime,
        state: Callable[[], str],
        stalled_after_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runtime = runtime
        self._state = state
        self._stalled_after_s = stalled_after_s
        self._clock = clock

    def illness(self) -> str:
        """Why it should be restarted; "" while it is well."""
        idle_s = stage_stalled_for_s(self._runtime, self._clock())
        if idle_s <= self._stalled_after_s():
            return ""
        return f"stalled: the stage has made no progress for {idle_s:.0f} s"

    def unreadiness(self) -> str:
        """Why no requests should be sent; "" while they are taken."""
        state = self._state()
        if state == "starting":
            return "starting: `understudyctl status` says how far it is"
        if state != "ready" or not self._runtime.machine.is_open:
            return f"{'draining' if state == 'ready' else state}: no requests are taken"
        return self.illness()


def stage_stalled_for_s(runtime: Runtime, now_s: float) -> float:
    """How long the stage has made no step although it has something to run; 0 when it has nothing."""
    machine = runtime.machine
    return now_s - runtime.stage_moved_at_s if machine.running or machine.on_deck else 0.0
