"""Where tests make a loader die, freeze, hang or crawl: named points that a loader passes on its way.

`UNDERSTUDY_LOADER_CRASH_AT` holds `[action:]point[:n][@path]`: at the n-th passage (default the first) of
`point` the loader kills itself (`kill`, the default), freezes (`stop`), blocks this thread for ever (`stall`)
or takes 0.2 s for this and every later passage (`slow`). With `@path` only that loader strikes which manages
to create this file: one of all, and never its successors. A value `@path` alone names a file that holds all
this; it is read again at every passage, so that loaders that live already can be struck. No file, no strike.
"""

import os
import signal
import threading
import time
from pathlib import Path

ENVIRONMENT_VARIABLE = "UNDERSTUDY_LOADER_CRASH_AT"
POINTS = ("spawn", "open", "header", "read", "copy", "synchronise", "report", "idle")
_ACTIONS = ("kill", "stop", "stall", "slow")
_SLOW_S = 0.2


class CrashPoints:
    """Counts passages. Without a specification every call returns at once."""

    def __init__(self, specification: str = "") -> None:
        self._lock = threading.Lock()
        self._source = Path(specification[1:]) if specification.startswith("@") else None
        self._obey("" if self._source else specification)

    def _obey(self, specification: str) -> None:
        self._specification = specification
        rule, _, self._claim_path = specification.partition("@")
        fields = rule.split(":") if rule else [""]
        self._action = fields.pop(0) if fields[0] in _ACTIONS else "kill"
        self._point = fields.pop(0) if fields else ""
        self._passages_left = int(fields.pop(0)) if fields else 1
        self._is_slow = False
        if fields or self._point not in (POINTS if specification else ("",)):
            raise ValueError(f"{specification!r} is not [action:]point[:n][@path] with a point of {POINTS}")

    def at(self, point: str) -> None:
        """A thread has come to `point`."""
        if self._source is not None:
            self._follow(self._source)
        if point != self._point:
            return
        with self._lock:
            self._passages_left -= 1
            strikes = self._passages_left == 0 and self._is_claimed()
        if strikes:
            self._strike()
        if self._is_slow:
            time.sleep(_SLOW_S)

    def _follow(self, source: Path) -> None:
        """Obey the file; whenever it changes, passages are counted anew."""
        with self._lock:
            try:
                specification = source.read_text()
            except FileNotFoundError:
                specification = ""
            if specification != self._specification:
                self._obey(specification)

    def _is_claimed(self) -> bool:
        """Whether this loader is the one that strikes."""
        if not self._claim_path:
            return True
        try:
            os.close(os.open(self._claim_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
        except FileExistsError:
            return False
        return True

    def _strike(self) -> None:
        match self._action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":  # sent to the process, it might leave this thread a moment to go on
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            case "slow":
                self._is_slow = True
            case _:
                threading.Event().wait()
