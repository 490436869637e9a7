"""Runs benchmarks one after the other, each a process of its own with a time limit. None ends the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.kit import say
from benchmarks.report.machine import ROOT
from benchmarks.report.publishing import publishable, without_places
from benchmarks.report.results import Figures, Run

_GRACE_S = 5.0  # to remove temporary folders; daemons and loaders go with who started them
_LEAST_S = 10.0
_LONGEST_REASON = 160


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark in its short form: `python ARGUMENTS`, repeated while there is time.

    `hidden` arguments come last and are told as NAME only: a path of this machine's.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    repeats: int = 1
    hidden: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As one types it."""
        shown = [*self.arguments, *(["--peers-python", "PYTHON"] if self.hidden else [])]
        return " ".join(["python", *shown])


class Clock:
    """What is left of a budget in seconds."""

    def __init__(self, budget_s: float) -> None:
        self._began_s = time.monotonic()
        self.budget_s = budget_s

    @property
    def spent_s(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began_s

    @property
    def left_s(self) -> float:
        """Negative when it is overdrawn."""
        return self.budget_s - self.spent_s


def run_all(
    cases: Sequence[Case], clock: Clock, revision: str, logs: Path, keep: Callable[[str, Run], None]
) -> None:
    """Every case once, then again those that are worth it and fit; `keep` is told of each run at once.

    Repetitions go through all cases in turn, so that they are minutes apart: what others do to the machine
    differs.
    """
    logs.mkdir(parents=True, exist_ok=True)
    took_s: dict[str, float] = {}
    for number in range(max((case.repeats for case in cases), default=0)):
        for case in cases:
            if number and not (case.repeats > number and took_s.get(case.name, 1e9) < clock.left_s):
                continue
            say(f"{case.name}, {number + 1} of {case.repeats}; {clock.left_s:.0f} s left")
            run = run_once(case, clock, revision, logs)
            say(f"  {run.failure or 'done'}, {run.wall_s:.0f} s")
            if run.figures is not None:
                took_s[case.name] = run.wall_s
            if not number or run.figures is not None:
                keep(case.name, run)


def run_once(case: Case, clock: Clock, revision: str, logs: Path) -> Run:
    """One repetition; what went wrong is in it."""
    limit_s = min(case.limit_s, clock.left_s)
    began_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    load_average, began_s = os.getloadavg()[0], time.monotonic()
    figures: Figures | None = None
    if limit_s < min(_LEAST_S, case.limit_s):
        failure = f"no time left of {clock.budget_s:.0f} s"
    else:
        figures, failure = _outcome(case, limit_s, logs)
    return Run(
        command=case.command,
        revision=revision,
        began_at=began_at,
        wall_s=round(time.monotonic() - began_s, 1),
        load_average=round(load_average, 2),
        figures=figures,
        failure=failure,
    )


def _outcome(case: Case, limit_s: float, logs: Path) -> tuple[Figures | None, str]:
    """Its figures, and what was wrong."""
    out, errors = logs / f"{case.name}.out", logs / f"{case.name}.err"
    command = [sys.executable, *case.arguments, *case.hidden]
    with out.open("wb") as out_file, errors.open("wb") as errors_file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out_file, stderr=errors_file,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None, f"took longer than {limit_s:.0f} s"
        finally:
            _end(process)
    figures = _figures(out.read_text())
    if status:
        return figures, f"ended with status {status}: {_last_line(errors.read_text())}"
    return figures, "" if figures is not None else "printed no figures"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """It and what it started in its session are gone afterwards."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def _figures(text: str) -> Figures | None:
    """The whole output as JSON, or its last line."""
    for candidate in (text, text.strip().rpartition("\n")[2]):
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(candidate)
            if isinstance(found, dict):
                return {name: publishable(value) for name, value in found.items()}
    return None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return without_places(lines[-1])[:_LONGEST_REASON] if lines else "it said nothing"
