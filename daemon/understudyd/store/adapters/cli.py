"""The command line of adding LoRAs: a progress bar and a table for people, lines of JSON for the daemon."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from understudy.admin import Done, Error, Line, Note
from understudyd.store.adapters.files import AdapterFile, find_adapters
from understudyd.store.adapters.ingest import AdapterOptions, add_adapters
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.reporting import Progress, Write, reported
from understudyd.store.store import Store


def run(argv: Sequence[str]) -> int:
    """Run `ingest-lora`: 0 when every LoRA is in the store, 1 when one was refused, 2 for wrong usage.

    With `--json`, standard output carries `Note` lines, one with each result, and then one `Done`
    (`{"results"}`) or `Error`, and nothing else.
    """
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has told what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    return reported(partial(_add, arguments), None if arguments.json else _say, one_row=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `understudyd ingest-lora`."""
    parser = argparse.ArgumentParser(
        prog="understudyd ingest-lora",
        description="Add LoRA adapters to a store: a file, every file of a folder tree, or a hub id.",
    )
    parser.add_argument("--store", type=Path, required=True, help="the store's folder; has the base models")
    parser.add_argument(
        "--models-of", type=Path, action="append", default=[], metavar="STORE",
        help="a store that is only read; its models may be bases, too",
    )  # fmt: skip
    parser.add_argument("--source", required=True, help="a .safetensors file, a folder of them or a hub id")
    parser.add_argument("--name", help="the adapter's name, of one LoRA; otherwise made from its path")
    parser.add_argument("--name-prefix", default="", help="put this before the names that are made")
    parser.add_argument("--base", metavar="MODEL", help="the model it is for; else every model is tried")
    parser.add_argument("--revision", help="the branch, tag or commit of a hub id")
    parser.add_argument("--weight-name", help="the file of a hub id that has several")
    parser.add_argument("--replace", action="store_true", help="replace an adapter of the same name")
    parser.add_argument("--json", action="store_true", help="report as lines of JSON on standard output")
    return parser


def _add(arguments: argparse.Namespace, progress: Progress, write: Write) -> int:
    store = Store.open(arguments.store, writable=True)
    options = AdapterOptions(
        base=arguments.base,
        replace=arguments.replace,
        name_prefix=arguments.name_prefix,
        more_stores=tuple(Store(path) for path in arguments.models_of if (path / "models").is_dir()),
    )
    results = add_adapters(
        store,
        _files(arguments, progress),
        options,
        progress=progress,
        on_result=lambda result: write(Note(phase=result.outcome, result=result)),
    )
    write(Done(result={"results": results}))
    return int(any(result.outcome == "refused" for result in results))


def _files(arguments: argparse.Namespace, progress: Progress) -> list[AdapterFile]:
    files = find_adapters(
        arguments.source,
        revision=arguments.revision,
        weight_name=arguments.weight_name,
        on_bytes=lambda done, total: progress("download", done, total),
    )
    if arguments.name is None:
        return files
    if len(files) > 1:
        raise StoreError(
            StoreErrorCode.BAD_NAME,
            f"{arguments.source} holds {len(files)} LoRAs, which cannot all be named {arguments.name!r:.80}; "
            "leave the name out, or give one file",
        )
    (file,) = files
    return [AdapterFile(file.path, arguments.name, file.origin, file.size_bytes)]


def _say(line: Line) -> None:
    match line:
        case Done(result={"results": results}):
            from understudy.render import show
            from understudy.render_scan import scan_table

            show(scan_table([msgspec.to_builtins(result) for result in results]))
        case Error(code=code, message=message):
            print(f"error [{code}]: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
