"""Runs made-up sections as the GPU check runs its own: `python tests/gpu_check_child.py OUT`."""

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu import runner
from benchmarks.gpu.runner import Results, Section, Skip, run_all


def work(bench: Any) -> dict[str, Any]:
    return {"figure": 1 / 3, "checks": {"good": True}}


def raise_an_error(bench: Any) -> dict[str, Any]:
    raise ValueError("broken on purpose")


def look_back(bench: Any) -> dict[str, Any]:
    """What is on disk while this section runs."""
    return {"seen": sorted(json.loads(bench.out.read_text())["sections"]), "checks": {"bad": False}}


def hang(bench: Any) -> dict[str, Any]:
    threading.Event().wait()
    return {}


def die(bench: Any) -> dict[str, Any]:
    sys.exit(3)


def skip(bench: Any) -> dict[str, Any]:
    raise Skip("not here")


def main() -> None:
    out = Path(sys.argv[1])
    runner._GRACE_S = 0.5
    bench = SimpleNamespace(work=out.parent, out=out)
    results = Results(out, {"gpu": None})
    functions = (work, raise_an_error, look_back, die, skip)
    sections = [Section(function.__name__, function, 20.0) for function in functions]
    run_all(bench, sections, results, 60.0)  # type: ignore[arg-type]
    run_all(bench, [Section("hang", hang, 0.5)], results, 60.0)  # type: ignore[arg-type]
    run_all(bench, [Section("cut", hang, 20.0, least_s=0.1)], results, 0.5)  # type: ignore[arg-type]
    run_all(bench, [Section("late", work, 20.0)], results, 0.0)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
