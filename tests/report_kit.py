"""Results as `make bench` keeps them, made up."""

from typing import Any

from benchmarks.report.results import GpuCheck, Machine, Results, Run

MACHINE = Machine(
    cpu="Example CPU", cores=2, memory_gib=24, is_virtual=True, kernel="6.1", python="3.11.7",
    packages={"torch": "2.11.0"},
)  # fmt: skip


def run(figures: dict[str, Any] | None = None, failure: str = "", *, began_at: str = "2026-01-02") -> Run:
    return Run(
        command="python -m benchmarks.x --json", revision="abc", began_at=began_at, wall_s=3.0,
        load_average=0.5, figures=figures, failure=failure,
    )  # fmt: skip


def results(*, cpu: str = "Example CPU", **runs: Run | tuple[Run, ...]) -> Results:
    """One run of each benchmark, or a tuple of them."""
    machine = Machine(**{name: getattr(MACHINE, name) for name in MACHINE.__struct_fields__} | {"cpu": cpu})
    several = {name: each if isinstance(each, tuple) else (each,) for name, each in runs.items()}
    return Results(host="example", machine=machine, budget_s=840.0, wall_s=600.0, runs=several)


def gpu_check(**sections: dict[str, Any]) -> GpuCheck:
    return GpuCheck(
        gpu={"name": "NVIDIA Example", "total_bytes": 80 << 30, "cuda": "12.8", "driver": 12080},
        size="real", machine={"cores": 16}, started_at="2026-03-04T05:06:07Z", sections=sections,
        revision="def",
    )  # fmt: skip
