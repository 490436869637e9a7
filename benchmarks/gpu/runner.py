"""Runs the sections: each in a process of its own, within its time, its result written before the next.

The processes are forked from one that has imported the libraries and never touched the GPU. What a section
leaves behind, a broken CUDA context above all, goes with its process.
"""

import faulthandler
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kit import rounded, say
from understudyd.loader.linux import die_with_parent

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

Measure = Callable[["Bench"], dict[str, Any]]

_GRACE_S = 3.0


class Skip(Exception):
    """The section has no meaning here; the message says why."""


@dataclass(frozen=True, slots=True)
class Section:
    """A measurement. Its document may hold `checks` and `targets`, both name -> bool.

    A check that is false fails the run; a target is a number to hold, which slow machines may miss. It is not
    begun with less than `least_s` left.
    """

    name: str
    measure: Measure
    budget_s: float
    least_s: float = 10.0


@dataclass(slots=True)
class Results:
    """The document, written to `path` after every change."""

    path: Path
    head: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, found: dict[str, Any]) -> None:
        """One more section."""
        self.sections[name] = found
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        document = self.head | {"failed": self.failed(), "sections": self.sections}
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(rounded(document), indent=1) + "\n")
        draft.replace(self.path)

    def failed(self) -> list[str]:
        """The sections that broke and the checks that are false."""
        broken = [name for name, found in self.sections.items() if "error" in found]
        return broken + [
            f"{name}.{check}"
            for name, found in self.sections.items()
            for check, is_good in found.get("checks", {}).items()
            if not is_good
        ]


def run_all(bench: "Bench", sections: Sequence[Section], results: Results, limit_s: float) -> None:
    """Run what fits into the limit; the rest is recorded as skipped."""
    ends_at_s = time.monotonic() + limit_s
    for section in sections:
        left_s = ends_at_s - time.monotonic()
        if left_s < min(section.budget_s, section.least_s):
            results.add(section.name, {"skipped": f"no time left of {limit_s:g} s"})
            continue
        say(f"{section.name} ...")
        found = run_apart(section.name, section.measure, bench, min(section.budget_s, left_s))
        if "error" in found and left_s < section.budget_s and found["took_s"] > left_s:
            found = {"skipped": f"cut off: no time left of {limit_s:g} s"}
        say(f"  {_summary(found)}")
        results.add(section.name, found)


def run_apart(name: str, measure: Measure, bench: "Bench", budget_s: float) -> dict[str, Any]:
    """The section's document with `took_s`, or `error` and `traceback`, or `skipped`."""
    started_s = time.monotonic()
    result, stacks = bench.work / f"{name}.json", bench.work / f"{name}.stacks"
    child = multiprocessing.get_context("fork").Process(
        target=_be_child, args=(measure, bench, result, stacks, budget_s), name=name
    )
    child.start()
    child.join(budget_s + _GRACE_S)
    if child.is_alive():
        child.kill()
        child.join()
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
    else:
        took_s = time.monotonic() - started_s
        why = f"took longer than {budget_s:.0f} s" if took_s > budget_s else f"ended with {child.exitcode}"
        found = {"error": why, "traceback": stacks.read_text() if stacks.exists() else ""}
    return found | {"took_s": time.monotonic() - started_s}


def _be_child(measure: Measure, bench: "Bench", result: Path, stacks: Path, budget_s: float) -> None:
    die_with_parent()
    with stacks.open("w") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(budget_s, file=file)
        try:
            found = measure(bench)
        except Skip as skip:
            found = {"skipped": str(skip)}
        except Exception as error:  # noqa: BLE001 a section's boundary: the others still run
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        faulthandler.cancel_dump_traceback_later()
    draft = result.with_suffix(".part")
    draft.write_text(json.dumps(found))
    draft.replace(result)
    os._exit(0)  # what a section may have left running must not keep its process


def _summary(found: Mapping[str, Any]) -> str:
    if (why := found.get("error", found.get("skipped"))) is not None:
        return f"{'failed' if 'error' in found else 'skipped'}: {why}"
    wrong = [name for name, is_good in found.get("checks", {}).items() if not is_good]
    return f"{found['took_s']:.1f} s" + (f", WRONG: {', '.join(wrong)}" if wrong else "")
