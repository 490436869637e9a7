"""The daemon beside what people run today, on the GPU: the rows of `benchmarks.compare`, real size.

It takes many minutes, most of them the others', and room on disk for twenty models: only on demand.
"""

import shutil
from typing import Any

from benchmarks.compare import measure
from benchmarks.compare_scene import Plan
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.runner import Skip

_MODEL_BYTES = 2.2 * GIB


def compare(bench: Bench) -> dict[str, Any]:
    """Figures by program, and whether every image is `from_pretrained`'s."""
    plan = Plan.of(bench.device, bench.size, quick=bench.size == "tiny")
    needed_bytes = plan.models * bench.pick(_MODEL_BYTES, 0.0)
    if shutil.disk_usage(bench.work).free < needed_bytes:
        raise Skip(
            f"{plan.models} models need {needed_bytes / GIB:.0f} GiB on disk; choose a --work that has it"
        )
    bench.need(int((plan.resident + 2) * bench.pick(_MODEL_BYTES, 0.0)))
    folder = bench.work / "compare"
    folder.mkdir()
    found = measure(plan, folder)
    return found | {
        "checks": {"images_equal": found["wrong_images"] == 0},
        "targets": {"faster_than_all_others": found["throughput_ratio"] > 1},
    }
