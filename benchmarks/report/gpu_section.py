"""A GPU check as a section of the page: what it was to hold, then every figure."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report.markdown import prose, table
from benchmarks.report.picking import Found, number
from benchmarks.report.results import Figures, GpuCheck, Run
from benchmarks.report.versus import versus_of_what_there_is

_APART = ("targets", "checks", "error", "skipped", "traceback")


def gpu_section(check: GpuCheck) -> str:
    """Its markdown."""
    total_gib = check.gpu.get("total_bytes", 0) / 2**30
    head = (
        f"`make gpu-check`, {check.started_at[:10]} at {check.revision or 'unknown sources'}: "
        f"{total_gib:.0f} GiB, CUDA {check.gpu.get('cuda')}, driver {check.gpu.get('driver')}, "
        f"{check.machine.get('cores')} cores. Models of {check.size} size."
    )
    wrong = f"Wrong: {', '.join(check.failed)}." if check.failed else "Every check held."
    verdicts = [
        [f"`{name}`", what.replace("_", " "), word]
        for name, found in check.sections.items()
        for what, word in _verdicts(found)
    ]
    rows = [
        [f"`{name}`", f"`{path}`", text]
        for name, found in check.sections.items()
        for path, text in _figures({key: value for key, value in found.items() if key not in _APART})
    ]
    parts = [f"## On {check.gpu.get('name', 'a GPU')}", prose(head), prose(wrong)]
    parts += [text] if (text := versus_of_what_there_is(_as_benchmarks(check))) else []
    parts += [table(["section", "to hold", ""], verdicts)] if verdicts else []
    parts += [table(["section", "figure", ""], rows)] if rows else []
    return "\n\n".join(parts)


def _as_benchmarks(check: GpuCheck) -> Found:
    """The sections that say what `benchmarks.compare` and `benchmarks.load` say on the CPU."""
    compared = check.sections.get("compare", check.sections.get("serving", {}))
    return Found(
        {"compare": [as_run(check, compared)], "load": [as_run(check, check.sections.get("peers", {}))]}
    )


def as_run(check: GpuCheck, figures: Figures) -> Run:
    """Figures of a check as those of a benchmark."""
    return Run(
        command="make gpu-check", revision=check.revision, began_at=check.started_at, wall_s=0.0,
        load_average=0.0, figures=figures,
    )  # fmt: skip


def _verdicts(found: Figures) -> Iterator[tuple[str, str]]:
    if (why := found.get("error")) is not None:
        yield "the section", f"**failed**: {why}"
    if (why := found.get("skipped")) is not None:
        yield "the section", f"skipped: {why}"
    for what, is_met in found.get("targets", {}).items():
        yield what, "met" if is_met else "**missed**"
    for what, is_good in found.get("checks", {}).items():
        yield what, "right" if is_good else "**wrong**"


def _figures(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value)
        case list():
            return ", ".join(map(_text, value))
        case _:
            return str(value)
