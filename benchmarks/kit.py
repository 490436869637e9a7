"""What the benchmarks share: percentiles, a daemon of one's own, a table for people, a line for programs."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from understudy_demo.measure import percentile
from understudy_demo.serving import DaemonFailed, DaemonProcess, DaemonSettings, running_daemon

__all__ = [
    "DaemonFailed",
    "DaemonProcess",
    "DaemonSettings",
    "json_line",
    "percentile",
    "rounded",
    "running_daemon",
    "say",
    "show_table",
    "timed",
]


def json_line(document: Mapping[str, Any], out: TextIO | None = None) -> None:
    """The last line of a benchmark: one JSON object, floats to four decimals."""
    print(json.dumps(rounded(document)), file=out, flush=True)


def rounded(value: object) -> object:
    """The same document with floats to four decimals."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout is the result's alone."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long the block took."""
    started_s = time.monotonic()
    yield
    say(f"  {what}: {time.monotonic() - started_s:.1f} s")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
