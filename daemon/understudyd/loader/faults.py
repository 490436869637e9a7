"""Where tests make a loader die, freeze or hang: named points that a loader passes on its way.

`UNDERSTUDY_LOADER_CRASH_AT` holds `[action:]point[:n]`: at the n-th passage (default the first) of `point`
the loader kills itself (`kill`, the default), freezes (`stop`) or blocks this thread for ever (`stall`).
"""

import os
import signal
import threading

ENVIRONMENT_VARIABLE = "UNDERSTUDY_LOADER_CRASH_AT"
POINTS = ("spawn", "open", "header", "read", "copy", "synchronise", "report", "idle")
_ACTIONS = ("kill", "stop", "stall")


class CrashPoints:
    """Counts passages. Without a specification every call returns at once."""

    def __init__(self, specification: str = "") -> None:
        fields = specification.split(":") if specification else [""]
        self._action = fields.pop(0) if fields[0] in _ACTIONS else "kill"
        self._point = fields.pop(0)
        self._passages_left = int(fields.pop(0)) if fields else 1
        if fields or (self._point and self._point not in POINTS):
            raise ValueError(f"{specification!r} is not [action:]point[:n] with a point of {POINTS}")

    def at(self, point: str) -> None:
        """A thread has come to `point`."""
        if point != self._point:
            return
        self._passages_left -= 1
        if self._passages_left == 0:
            self._strike()

    def _strike(self) -> None:
        match self._action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":  # sent to the process, it might leave this thread a moment to go on
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            case _:
                threading.Event().wait()
