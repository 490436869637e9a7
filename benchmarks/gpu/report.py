"""The results as a table for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.kit import show_table


def show(document: Mapping[str, Any]) -> None:
    """One row a figure, on stderr."""
    gpu = document["gpu"]
    title = f"{gpu['name']}, driver {gpu['driver']}" if gpu else "no GPU: the CPU device"
    rows = [
        [section, *row]
        for section, found in document["sections"].items()
        for row in _rows({name: value for name, value in found.items() if name != "traceback"})
    ]
    show_table(title, ["section", "figure", "value"], rows)


def _rows(found: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}", _text(value)]


def _text(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:.3f}"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(_text(item) for item in value)
        case _:
            return str(value)
