"""Strikes against a daemon's loaders, at any time and fair: no blob's loads are made to kill three in a row.

Such a blob is given up, and rightly so: what is struck here is the loader, not the blob. A load that was
struck is spared until one of that name has begun and ended well since.
"""

import contextlib
import math
import os
import random
import signal
import time
from typing import Any

from benchmarks.kit import DaemonProcess
from understudy import admin

HICCUP_S = 0.3
TRACE_S = 120.0


class Strikes:
    """Signals to one loader at a time, chosen by `dice`."""

    def __init__(self, daemon: DaemonProcess, dice: random.Random) -> None:
        self._daemon = daemon
        self._dice = dice
        self._struck_at_s: dict[str, float] = {}
        self._frozen: set[int] = set()

    def kill_loader(self) -> None:
        """Frozen for a moment first, so that it is known what it was at."""
        if (row := self._choose()) is not None:
            self._signal(row, signal.SIGSTOP)
            self._signal(row, signal.SIGKILL if self._may_die(row) else signal.SIGCONT)

    def freeze_loader(self) -> None:
        """For good. One that is idle may be given any load before it is missed."""
        row = self._choose()
        if row is not None and (row["load"] or not self._struck_at_s):
            self._frozen.add(row["pid"])
            self._signal(row, signal.SIGSTOP)

    def disturb_loader(self) -> None:
        """For a moment that is no death."""
        if (row := self._choose()) is not None:
            self._signal(row, signal.SIGSTOP)
            time.sleep(HICCUP_S)
            self._signal(row, signal.SIGCONT)

    def observe(self) -> list[dict[str, Any]]:
        """Note what frozen loaders hold up and what has recovered; all that live. To be called often."""
        rows = [row for row in self._daemon.ask(admin.Loaders()) if row["pid"] and row["state"] != "lost"]
        now_s = time.monotonic()
        for row in rows:
            if row["pid"] in self._frozen and row["load"]:
                self._struck_at_s[row["load"]] = now_s
        if self._struck_at_s:
            for span in self._daemon.ask(admin.Trace(seconds=TRACE_S))["spans"]:
                name = span["name"].partition(" (")[0]
                if span["start_s"] > self._struck_at_s.get(name, math.inf):
                    del self._struck_at_s[name]
        return rows

    # -- inside ------------------------------------------------------------------------------------------

    def _choose(self) -> dict[str, Any] | None:
        """Any that is neither frozen nor at a load that is spared."""
        rows = [row for row in self.observe() if row["pid"] not in self._frozen and not self._is_spared(row)]
        return self._dice.choice(rows) if rows else None

    def _is_spared(self, row: dict[str, Any]) -> bool:
        return row["load"] in self._struck_at_s

    def _may_die(self, row: dict[str, Any]) -> bool:
        """Whether this loader, which is stopped now, is at nothing that is spared; then that is struck."""
        (now,) = [each for each in self.observe() if each["pid"] == row["pid"]] or [None]
        if now is None or self._is_spared(now):
            return False
        if now["load"]:
            self._struck_at_s[now["load"]] = time.monotonic()
        return True

    def _signal(self, row: dict[str, Any], number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was replaced meanwhile
            os.kill(row["pid"], number)
