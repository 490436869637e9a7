"""How a benchmark's section of the page is laid out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.report.markdown import prose, table
from benchmarks.report.picking import NONE, Found, at


@dataclass(frozen=True, slots=True)
class Section:
    """`tables` makes the tables' text; `picture` is a file in docs/images."""

    benchmark: str
    title: str
    about: str
    tables: Callable[[Found], str]
    picture: str = ""


def figures(benchmark: str, rows: Sequence[tuple[str, str, str]]) -> Callable[[Found], str]:
    """One figure a row: path, what it is, unit."""

    def tables(found: Found) -> str:
        return table(
            ["", "", "median", "least to most"],
            [[what, f"`{path}`", *_cells(found, benchmark, path, unit)] for path, what, unit in rows],
            texts=2,
        )

    return tables


def grid(
    benchmark: str, columns: Sequence[tuple[str, str]], rows: Callable[[Found], Sequence[tuple[str, str]]]
) -> Callable[[Found], str]:
    """Things by figures. A column is a heading and a path with `{row}` in it, a row its key and its name."""

    def tables(found: Found) -> str:
        return table(
            ["", *(heading for heading, _ in columns)],
            [
                [name, *(found.text(benchmark, at(path.format(row=key))) for _, path in columns)]
                for key, name in rows(found)
            ],
        )

    return tables


def section(found: Found, one: Section) -> str:
    """Its markdown; nothing when it was never run."""
    if one.benchmark not in found:
        return ""
    runs = found.runs(one.benchmark)
    failed = [f"Failed: {run.failure}." for run in runs if run.failure]
    took = ", ".join(f"{run.wall_s:.0f}" for run in runs)
    load = ", ".join(f"{run.load_average:.1f}" for run in runs)
    dates = ", ".join(dict.fromkeys(run.began_at[:10] for run in runs))
    revisions = ", ".join(dict.fromkeys(run.revision for run in runs))
    facts = f"`{runs[-1].command}`, {dates} at {revisions}: {took} s; load average before {load}."
    parts = [f"## {one.title}", prose(one.about), *map(prose, failed)]
    if any(run.figures for run in runs):
        parts += [one.tables(found), f"![{one.title}](images/{one.picture})" if one.picture else ""]
    return "\n\n".join(part for part in [*parts, prose(facts)] if part)


def _cells(found: Found, benchmark: str, path: str, unit: str) -> list[str]:
    spread = found.spread(benchmark, at(path))
    if spread is None:
        return [NONE, ""]
    return [spread.text(unit).partition(" (")[0], spread.range]
