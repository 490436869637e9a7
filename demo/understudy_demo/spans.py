"""Who did what when, as the daemon's `trace` tells it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work in a lane ("stage", "loader 0", "load", ...); monotonic seconds."""

    lane: str
    name: str
    start_s: float
    end_s: float


def spans_from(trace: Mapping[str, Any]) -> list[Span]:
    """The admin command's document as spans."""
    return [Span(str(s["lane"]), str(s["name"]), float(s["start_s"]), float(s["end_s"]))
            for s in trace["spans"]]  # fmt: skip


def lane(spans: Iterable[Span], name: str) -> list[Span]:
    """One lane's spans in time order."""
    return sorted((span for span in spans if span.lane == name), key=lambda span: span.start_s)
