"""The command line of ingest: a progress bar for people, lines of JSON for the daemon."""

import argparse
import gc
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from understudy.admin import Done, Error, Line, Note
from understudyd.store.batch import ingest_tree, plan_tree
from understudyd.store.ingest import IngestOptions, ingest_many
from understudyd.store.records import ModelRecord
from understudyd.store.reporting import Progress, Write, reported
from understudyd.store.store import Store


def run(argv: Sequence[str]) -> int:
    """Run `ingest` as a command; 0 when the model is in the store, 1 when it is not, 2 for wrong usage.

    A scan is 1 when a model was refused. With `--json`, standard output carries `Note` lines and then one
    `Done` (`{"name", "size_bytes"}`, of a scan `{"results", "dry_run"}`) or `Error`, and nothing else:
    whatever a library prints goes to standard error.
    """
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        _check_usage(parser, arguments)
    except SystemExit as stop:  # argparse has told what is wrong
        return stop.code if isinstance(stop.code, int) else 2
    work = partial(_ingest if arguments.scan is None else _scan, arguments)
    return reported(work, None if arguments.json else _say, one_row=arguments.scan is not None)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `understudyd ingest`."""
    parser = argparse.ArgumentParser(
        prog="understudyd ingest",
        description="Add a model, or every model of a folder tree, to a store: check, convert, write once.",
    )
    parser.add_argument("--store", type=Path, required=True, help="the store's folder; made when missing")
    parser.add_argument("--name", help="the model's name: letters, digits, '.', '_' and '-'")
    parser.add_argument(
        "--source",
        help="a diffusers folder, a .safetensors checkpoint, an entry of the hub's cache or a hub id",
    )
    parser.add_argument("--scan", type=Path, metavar="DIR", help="add every model below DIR instead")
    parser.add_argument("--name-prefix", default="", help="put this before the names that a scan makes")
    parser.add_argument("--dry-run", action="store_true", help="say what a scan would add, and add nothing")
    parser.add_argument("--revision", help="the branch, tag or commit of a hub id")
    parser.add_argument(
        "--like", action="append", default=[], metavar="MODEL",
        help="a model of the store that has what a checkpoint lacks; the first that fits counts",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FOLDER", help="a diffusers folder that has what a checkpoint lacks"
    )
    parser.add_argument(
        "--dtype", choices=["keep", "fp16", "bf16", "fp32"], default="keep", help="serve in this dtype"
    )
    parser.add_argument("--variant", help="read the weight files of this variant, such as fp16")
    parser.add_argument(
        "--ignore-pickle", action="store_true", help="leave pickle files unread instead of refusing them"
    )
    parser.add_argument("--pipeline", help="the source has weights for this installed custom pipeline")
    parser.add_argument("--replace", action="store_true", help="replace a model of the same name")
    parser.add_argument("--json", action="store_true", help="report as lines of JSON on standard output")
    return parser


def _ingest(arguments: argparse.Namespace, progress: Progress, write: Write) -> int:
    store = Store.open(arguments.store, writable=True)
    models = [(arguments.name, arguments.source)]
    record = ingest_many(store, models, options_from(arguments), progress=progress)[0]
    write(Done(result=_summary(record)))
    return 0


def _scan(arguments: argparse.Namespace, progress: Progress, write: Write) -> int:
    options, prefix = options_from(arguments), arguments.name_prefix
    if arguments.dry_run:
        has_store = (arguments.store / "models").is_dir()
        store = Store.open(arguments.store, writable=False) if has_store else None
        results = plan_tree(store, arguments.scan, options, name_prefix=prefix)
    else:
        _import_for_good()
        results = ingest_tree(
            Store.open(arguments.store, writable=True),
            arguments.scan,
            options,
            name_prefix=prefix,
            progress=progress,
            on_result=lambda result: write(Note(phase=result.outcome, result=result)),
        )
    write(Done(result={"results": results, "dry_run": arguments.dry_run}))
    return int(any(result.outcome == "refused" for result in results))


def _import_for_good() -> None:
    """Import the libraries and keep the collector from their million objects: models come and go, they stay.

    Walking them again and again took a third of the time that a small model takes.
    """
    from understudyd.store import pretrained  # noqa: F401

    gc.collect()
    gc.freeze()


def options_from(arguments: argparse.Namespace) -> IngestOptions:
    """What the command line says of how to read a source."""
    return IngestOptions(
        dtype=arguments.dtype,
        variant=arguments.variant,
        ignore_pickle=arguments.ignore_pickle,
        replace=arguments.replace,
        pipeline=arguments.pipeline,
        revision=arguments.revision,
        like=tuple(arguments.like),
        config=arguments.config,
    )


def _check_usage(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What argparse cannot say; exits as it does."""
    if arguments.scan is None:
        if arguments.name is None or arguments.source is None:
            parser.error("give --name and --source, or --scan DIR")
        if arguments.dry_run or arguments.name_prefix:
            parser.error("--dry-run and --name-prefix go with --scan DIR")
    elif arguments.name is not None or arguments.source is not None or arguments.revision is not None:
        parser.error("--scan DIR names its models itself: leave out --name, --source and --revision")


def _summary(record: ModelRecord) -> dict[str, object]:
    return {"name": record.name, "pipeline": record.pipeline_class, "size_bytes": record.size_bytes}


def _say(line: Line) -> None:
    match line:
        case Done(result={"results": results, "dry_run": is_dry_run}):
            from understudy.render import show
            from understudy.render_scan import scan_table

            show(scan_table([msgspec.to_builtins(result) for result in results], is_dry_run=is_dry_run))
        case Done(result=result):
            print(f"added {result['name']}: {result['pipeline']}, {result['size_bytes'] / 2**20:.1f} MiB")
        case Error(code=code, message=message):
            print(f"error [{code}]: {message}", file=sys.stderr)
