"""Figures out of results: the median and the spread of a benchmark's repetitions, or why there are none."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.results import Figures, Run

Pick = Callable[[Figures], float | None]
"""A figure of a run, None where there is none."""

NONE = "-"


@dataclass(frozen=True, slots=True)
class Spread:
    """What the repetitions came to, in the order in which they were made."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all repetitions."""
        return statistics.median(self.values)

    @property
    def range(self) -> str:
        """Such as "0.9 to 1.1"; nothing when there is one only."""
        if len(self.values) < 2:
            return ""
        return f"{number(min(self.values))} to {number(max(self.values))}"

    def text(self, unit: str = "") -> str:
        """The median, and the range behind it."""
        behind = f" ({self.range})" if self.range else ""
        return f"{number(self.median)}{unit}{behind}"


class Found:
    """The runs of one host, and a GPU check's sections, asked for figures."""

    def __init__(self, runs: Mapping[str, Sequence[Run]]) -> None:
        self._runs = runs

    def __contains__(self, benchmark: object) -> bool:
        return benchmark in self._runs

    def runs(self, benchmark: str) -> Sequence[Run]:
        """All repetitions, failed ones too."""
        return self._runs.get(benchmark, ())

    def spread(self, benchmark: str, pick: Pick) -> Spread | None:
        """Of the repetitions that have this figure."""
        picked = [pick(run.figures) for run in self.runs(benchmark) if run.figures is not None]
        values = tuple(value for value in picked if value is not None)
        return Spread(values) if values else None

    def text(self, benchmark: str, pick: Pick, unit: str = "") -> str:
        """For a cell."""
        spread = self.spread(benchmark, pick)
        return NONE if spread is None else spread.text(unit)

    def why_not(self, benchmark: str) -> str:
        """Why a figure is missing, for a cell."""
        runs = self.runs(benchmark)
        if not runs:
            return "not measured"
        failures = [run.failure for run in runs if run.failure]
        return f"failed: {failures[0]}" if failures else "not measured"

    def names(self, benchmark: str, path: str) -> list[str]:
        """The keys of a table in the figures, in the order in which they were first seen."""
        names: dict[str, None] = {}
        for run in self.runs(benchmark):
            table = _walk(run.figures or {}, path)
            names |= dict.fromkeys(table if isinstance(table, Mapping) else ())
        return list(names)

    def word(self, benchmark: str, path: str) -> Any:
        """What the last run says there, of any type; None when it says nothing."""
        said = [_walk(run.figures or {}, path) for run in self.runs(benchmark)]
        return next((one for one in reversed(said) if one is not None), None)


def at(path: str) -> Pick:
    """The number at "outer.inner"; truth counts as 1."""

    def pick(figures: Figures) -> float | None:
        value = _walk(figures, path)
        return float(value) if isinstance(value, int | float) else None

    return pick


def ratio(over: Pick, under: Pick) -> Pick:
    """One of the other, within a run; None where either is missing or nothing can be divided."""

    def pick(figures: Figures) -> float | None:
        above, below = over(figures), under(figures)
        return None if above is None or not below else above / below

    return pick


def most(path: str) -> Pick:
    """The largest number of a table."""

    def pick(figures: Figures) -> float | None:
        table = _walk(figures, path)
        return max(table.values(), default=None) if isinstance(table, Mapping) else None

    return pick


def number(value: float) -> str:
    """Three figures that say something, thousands apart."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _walk(figures: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        if not isinstance(figures, Mapping) or part not in figures:
            return None
        figures = figures[part]
    return figures
