"""The command line of ingest: a progress bar for people, lines of JSON for the daemon."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from understudy.admin import Done, Error, Line, Note, encode_line
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.ingest import Progress, ingest
from understudyd.store.records import ModelRecord
from understudyd.store.store import Store


def run(argv: Sequence[str]) -> int:
    """Run `ingest` as a command; 0 when the model is in the store, 1 when it is not, 2 for wrong usage.

    With `--json`, standard output carries `Note` lines and then one `Done` (`{"name", "size_bytes"}`) or
    `Error`, and nothing else: whatever a library prints goes to standard error.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has told what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    # Advice that transformers gives while it is being imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if arguments.json:
            with _clean_stdout() as write:
                return _ingest(arguments, _line_progress(write), write)
        with _bar() as progress:
            return _ingest(arguments, progress, _say)
    except BrokenPipeError:
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="understudyd ingest", description="Add a model to a store: check it, convert it, write it once."
    )
    parser.add_argument("--store", type=Path, required=True, help="the store's folder; made when missing")
    parser.add_argument("--name", required=True, help="the model's name: letters, digits, '.', '_' and '-'")
    parser.add_argument("--source", required=True, help="a diffusers model folder")
    parser.add_argument(
        "--dtype", choices=["keep", "fp16", "bf16", "fp32"], default="keep", help="serve in this dtype"
    )
    parser.add_argument("--variant", help="read the weight files of this variant, such as fp16")
    parser.add_argument(
        "--ignore-pickle", action="store_true", help="leave pickle files unread instead of refusing them"
    )
    parser.add_argument("--replace", action="store_true", help="replace a model of the same name")
    parser.add_argument("--json", action="store_true", help="report as lines of JSON on standard output")
    return parser


def _ingest(arguments: argparse.Namespace, progress: Progress, write: Callable[[Line], None]) -> int:
    try:
        record = ingest(
            Store.open(arguments.store, writable=True),
            arguments.name,
            arguments.source,
            dtype=arguments.dtype,
            variant=arguments.variant,
            ignore_pickle=arguments.ignore_pickle,
            replace=arguments.replace,
            progress=progress,
        )
    except StoreError as error:
        write(Error(code=error.code, message=error.message))
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  this process's boundary: the daemon wants a line, not a traceback
        write(Error(code=StoreErrorCode.INTERNAL, message=f"ingest failed: {type(error).__name__}: {error}"))
        return 1
    write(Done(result=_summary(record)))
    return 0


def _summary(record: ModelRecord) -> dict[str, object]:
    return {"name": record.name, "pipeline": record.pipeline_class, "size_bytes": record.size_bytes}


def _say(line: Line) -> None:
    match line:
        case Done(result=result):
            print(f"added {result['name']}: {result['pipeline']}, {result['size_bytes'] / 2**20:.1f} MiB")
        case Error(code=code, message=message):
            print(f"error ({code}): {message}", file=sys.stderr)


def _line_progress(write: Callable[[Line], None]) -> Progress:
    def progress(phase: str, done: int, total: int) -> None:
        write(Note(phase=phase, done=done, total=total))

    return progress


@contextmanager
def _clean_stdout() -> Iterator[Callable[[Line], None]]:
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
def _bar() -> Iterator[Progress]:
    """A progress bar on standard error, one row a phase."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with RichProgress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as rich:
        rows: dict[str, TaskID] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in rows:
                rows[phase] = rich.add_task(phase, total=None)
            rich.update(rows[phase], completed=done, total=total or None)

        yield progress
