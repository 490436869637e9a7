"""docs/benchmarks.md from results alone: the same files give the same text."""

from benchmarks.report.goals import GPU, goals
from benchmarks.report.gpu_section import as_run, gpu_section
from benchmarks.report.layout import section
from benchmarks.report.markdown import prose, table
from benchmarks.report.picking import Found
from benchmarks.report.results import GpuCheck, Kept, Machine, Results, Run
from benchmarks.report.sections import SECTIONS
from benchmarks.report.versus import versus

_TITLE = "# Benchmarks"
_HEAD = """What a user would pick today, its figure and ours, from the same run. `make bench` makes this page
    anew, tables and pictures: no figure in it is typed by hand. Ratios come first, since other programs on a
    shared machine slow both sides; where one is under 1, ours is worse. Figures are medians of the runs that
    there are, least to most in brackets where there are several. How each is measured is in
    [benchmarks-methods.md](benchmarks-methods.md)."""
_NO_GPU = """No GPU has run this release yet; see
    [what is unproved](architecture.md#not-proved-on-a-gpu-yet). `make gpu-check` runs there what this page
    shows of the CPU, and its results join this page."""


def found_in(results: Results, gpus: tuple[GpuCheck, ...] = ()) -> Found:
    """The figures of one host, and the newest GPU check's."""
    runs: dict[str, tuple[Run, ...]] = dict(results.runs)
    if gpus:
        runs[GPU] = (as_run(gpus[0], gpus[0].sections),)
    return Found(runs)


def page(kept: Kept) -> str:
    """The newest host's figures, the GPU checks', then the first table of every other host."""
    if not kept.hosts:
        return f"{_TITLE}\n\nNothing is measured yet: `make bench`.\n"
    newest, *others = kept.hosts
    found = found_in(newest, kept.gpus)
    parts = [
        _TITLE,
        prose(_HEAD),
        versus(found),
        "## Numbers to hold",
        "A missed one says so. The median decides.",
        goals(found),
        "## Machine and run",
        _about(newest),
        *(section(found, one) for one in SECTIONS),
        *map(gpu_section, kept.gpus),
        "" if kept.gpus else f"## On a GPU\n\n{prose(_NO_GPU)}",
    ]
    for other in others:
        parts += [f"## Also on {other.machine.cpu}", _about(other), versus(found_in(other))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(results: Results) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in results.machine.packages.items())
    failed = sum(bool(run.failure) for runs in results.runs.values() for run in runs)
    count = sum(map(len, results.runs.values()))
    together_s = sum(run.wall_s for runs in results.runs.values() for run in runs)
    rows = [
        ["machine", words(results.machine)],
        ["software", f"Linux {results.machine.kernel}, Python {results.machine.python}, {packages}"],
        ["sources", ", ".join(sorted({run.revision for runs in results.runs.values() for run in runs}))],
        ["last begun", results.began_at],
        ["runs", f"{count}, {failed} failed; {together_s:.0f} s together"],
        ["last call", f"{results.wall_s:.0f} s of {results.budget_s:.0f} s"],
    ]
    return table(["", ""], rows, texts=2)


def words(machine: Machine) -> str:
    """The hardware in a line."""
    virtual = ", virtual" if machine.is_virtual else ""
    return f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB{virtual}"
