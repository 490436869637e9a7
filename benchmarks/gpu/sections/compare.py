"""The daemon beside what people run today, on the GPU: the rows of `benchmarks.compare`, real size.

Whole it takes many minutes, most of them the others', and runs only when it is named; in short it has fewer
requests and the two programs that matter most. Both want room on disk for twenty models.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.compare import measure
from benchmarks.compare_scene import Plan
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.runner import Skip

IN_SHORT = ("per_switch", "lru")
_SHORT_REQUESTS, _SHORT_STEPS = 24, 10
_MODEL_BYTES = 2.2 * GIB


def compare(bench: Bench) -> dict[str, Any]:
    """Figures by program, and whether every image is `from_pretrained`'s."""
    return _compared(bench, Plan.of(bench.device, bench.size, quick=bench.size == "tiny"))


def compare_in_short(bench: Bench) -> dict[str, Any]:
    """The same of fewer requests, images of fewer steps and `IN_SHORT` alone, for the check."""
    plan = Plan.of(bench.device, bench.size, quick=bench.size == "tiny")
    if bench.size == "real":
        plan = replace(plan, requests=_SHORT_REQUESTS, steps=_SHORT_STEPS)
    return _compared(bench, plan, IN_SHORT)


def _compared(bench: Bench, plan: Plan, programs: Sequence[str] | None = None) -> dict[str, Any]:
    needed_bytes = plan.models * bench.pick(_MODEL_BYTES, 0.0)
    if shutil.disk_usage(bench.work).free < needed_bytes:
        raise Skip(
            f"{plan.models} models need {needed_bytes / GIB:.0f} GiB on disk; choose a --work that has it"
        )
    bench.need(int((plan.resident + 2) * bench.pick(_MODEL_BYTES, 0.0)))
    folder = bench.work / "compare"
    folder.mkdir(exist_ok=True)
    try:
        found = measure(plan, folder, programs)
    finally:
        shutil.rmtree(folder)
    return found | {
        "checks": {"images_equal": found["wrong_images"] == 0},
        "targets": {"faster_than_all_others": found["throughput_ratio"] > 1},
    }
