"""What all commands of `understudyctl` have in common: asking the daemon, showing what it says, leaving."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from understudy.leaving import interrupted, leave_with

EXIT_REFUSED, EXIT_USAGE, EXIT_UNREACHABLE = 1, 2, 5
_PROGRAM = "understudyctl"
_UNREACHABLE = ("unreachable", "timeout")

_F = TypeVar("_F", bound=Callable[..., Any])


def output_option(command: _F) -> _F:
    """`-o table|json`."""
    choices = click.Choice(["table", "json"])
    return click.option(
        "-o",
        "--output",
        type=choices,
        default="table",
        show_default=True,
        help="For people, or for programs.",
    )(command)


def ask(socket_path: Path, command: Any, *, timeout_s: float | None = 30.0, on_note: Any = None) -> Any:
    """The daemon's document; without one the process ends, with a message and its exit code."""
    from understudy.admin import AdminError, call

    try:
        return call(socket_path, command, timeout_s=timeout_s, on_note=on_note)
    except AdminError as error:
        leave(error.code, str(error), EXIT_UNREACHABLE if error.code in _UNREACHABLE else EXIT_REFUSED)
    except KeyboardInterrupt:
        interrupted(_PROGRAM, "interrupted; the daemon may go on with it")


def ask_long(socket_path: Path, command: Any, what: str) -> Any:
    """A command that may take minutes, with a progress bar on stderr."""
    from understudy.note_bar import NoteBar

    with NoteBar(what) as bar:
        return ask(socket_path, command, timeout_s=None, on_note=bar.update)


def show(document: Any, output: str, view: str, module: str = "render") -> None:
    """As JSON, or as the table that the function `view` of one of this package's modules makes."""
    if output == "json":
        click.echo(json.dumps(document, indent=2))
        return
    from understudy import render

    render.show(getattr(import_module(f"understudy.{module}"), view)(document))


def show_results(document: Any, output: str, *, kind: str = "model", is_dry_run: bool = False) -> None:
    """What became of many files; ends the process if one was refused."""
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        from understudy import render, render_scan

        render.show(render_scan.scan_table(document["results"], kind=kind, is_dry_run=is_dry_run))
    if any(result["outcome"] == "refused" for result in document["results"]):
        sys.exit(EXIT_REFUSED)


def show_decisions(made: list[dict[str, Any]]) -> None:
    """Decisions, one a line."""
    from understudy import render, render_decisions

    render.show(render_decisions.told(made))


def leave(code: str, message: str, exit_code: int) -> NoReturn:
    """Say on stderr what is wrong, with the error's code, and exit."""
    leave_with(_PROGRAM, code, message, exit_code)
