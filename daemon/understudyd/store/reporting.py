"""How a command of the store reports: a progress bar for people, lines of JSON for the daemon."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from understudy.admin import Error, Line, Note, encode_line
from understudyd.store.errors import StoreError, StoreErrorCode

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`"""
Write = Callable[[Line], None]


def reported(work: Callable[[Progress, Write], int], say: Write | None, *, one_row: bool) -> int:
    """Do a command's work, which returns its exit status; 1 with an `Error` for what it raises.

    People are shown a bar and told by `say`; without it standard output carries lines for the daemon.
    """
    # Advice that transformers gives while it is being imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if say is None:
            with clean_stdout() as write:
                return _attempted(work, line_progress(write), write)
        with progress_bar(one_row=one_row) as progress:
            return _attempted(work, progress, say)
    except BrokenPipeError:
        return 1


def _attempted(work: Callable[[Progress, Write], int], progress: Progress, write: Write) -> int:
    try:
        return work(progress, write)
    except StoreError as error:
        write(Error(code=error.code, message=error.message))
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  this process's boundary: the daemon wants a line, not a traceback
        write(Error(code=StoreErrorCode.INTERNAL, message=f"ingest failed: {type(error).__name__}: {error}"))
    return 1


def line_progress(write: Write) -> Progress:
    """Progress as `Note` lines."""

    def progress(phase: str, done: int, total: int) -> None:
        write(Note(phase=phase, done=done, total=total))

    return progress


@contextmanager
def clean_stdout() -> Iterator[Write]:
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
