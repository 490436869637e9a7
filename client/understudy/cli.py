"""`understudy`: ask a daemon for images from the command line.

Images go to files, what happened to stdout, progress and errors to stderr.
"""

import fnmatch
from typing import TYPE_CHECKING, Any

import click

from understudy.cli_generate import generate
from understudy.cli_keygen import keygen
from understudy.cli_kit import connected, errors_as_exit_codes
from understudy.completion import complete_model, completion_option

if TYPE_CHECKING:
    from understudy.cli_kit import Connect
    from understudy.wire import ModelEntry

EXIT_CODES = (
    "Exit codes by fault: 0 done, 2 the caller's (usage included), 3 no capacity now, 4 the daemon's, "
    "5 cannot reach it, 130 Ctrl-C. An error on stderr has its own code in brackets."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="understudy", message="understudy %(version)s")
@completion_option("understudy")
def main() -> None:
    """Ask an Understudy daemon for images."""


main.add_command(generate)
main.add_command(keygen)


@main.command()
@click.argument("pattern", required=False, shell_complete=complete_model)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@connected
def models(pattern: str | None, output: str, connect: "Connect") -> None:
    """List what may be asked for, and where each model is.

    PATTERN shows those whose name holds it, or matches it where it has * or ?.
    """
    with errors_as_exit_codes(), connect() as client:
        entries = client.models()
    chosen = [entry for entry in entries if pattern is None or _matches(entry.name, pattern)]
    if output == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(chosen)).decode())
    elif entries and not chosen:
        click.echo(f"none of {len(entries)} models matches {pattern!r}")
    else:
        _show_models(chosen)


@main.command()
@connected
def ping(connect: "Connect") -> None:
    """Is the daemon there, and how far?"""
    with errors_as_exit_codes(), connect() as client:
        pinged = client.ping()
        where = client.endpoint
    click.echo(f"daemon {pinged.daemon} at {where}: {pinged.round_trip_s * 1000:.2f} ms")


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    return fnmatch.fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name


def _show_models(entries: "list[ModelEntry]") -> None:
    if not entries:
        click.echo("no models yet; `understudyctl add NAME SOURCE` adds one")
        return
    from understudy.render import models_table, show

    show(models_table([_row(entry) for entry in entries]))


def _row(entry: "ModelEntry") -> dict[str, Any]:
    row = {field: getattr(entry, field) for field in entry.__struct_fields__}
    if entry.kind == "lora":
        row["pipeline"] = f"LoRA for {entry.base}" if entry.base else "LoRA"
    return row


if __name__ == "__main__":
    main()
