"""How a command of the store reports: a progress bar for people, lines of JSON for the daemon."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from understudy.admin import Line, Note, encode_line

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`"""


def line_progress(write: Callable[[Line], None]) -> Progress:
    """Progress as `Note` lines."""

    def progress(phase: str, done: int, total: int) -> None:
        write(Note(phase=phase, done=done, total=total))

    return progress


@contextmanager
def clean_stdout() -> Iterator[Callable[[Line], None]]:
    """Keep standard output for the protocol: what others write to it goes to standard error meanwhile."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(own), "wb", buffering=0) as stream:
            yield lambda line: _write(stream.fileno(), encode_line(line))
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def progress_bar(*, one_row: bool) -> Iterator[Progress]:
    """A progress bar on standard error, one row a phase, or one that the phases take turns on."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with RichProgress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as rich:
        rows: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            row = "scan" if one_row else phase
            if row not in rows:
                rows[row] = rich.add_task(phase, total=None)
            rich.update(rows[row], description=phase, completed=done, total=total or None)

        yield progress
