"""`understudyctl trace`: what the daemon did lately, for a viewer or as a picture."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.ctl_kit import EXIT_REFUSED, ask, leave
from understudy.leaving import CANNOT_WRITE, MISSING_PACKAGE

if TYPE_CHECKING:
    from understudy.trace import Recording


@click.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How far to look back: the daemon remembers its last minutes at all times.",
)
@click.option("--wait", is_flag=True, help="Wait for so many seconds first, to see what happens from now on.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    help='Where to write it for ui.perfetto.dev; "-" is stdout. Default: trace.json, or nothing with --plot.',
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it as a PNG.")
@click.pass_obj
def trace(socket_path: Path, seconds: float, wait: bool, output: Path | None, plot: Path | None) -> None:
    """What the daemon did in the last seconds, as a Chrome trace or a picture.

    Runs, steps, binds, visible switches, loads, folds, encoding, waiting requests: a lane for each.
    """
    from understudy.trace import fetch

    if wait:
        time.sleep(seconds)
    recording = fetch(lambda command: ask(socket_path, command), seconds)
    told = f"{len(recording.spans)} spans of {recording.now_s - recording.begin_s:.1f} s"
    if recording.is_cut:
        told += " (what was before is forgotten)"
    if plot is not None:
        _write(plot, lambda: _draw(recording, plot))
        click.echo(f"{plot}: {told}", err=str(output) == "-")
    if output is None and plot is not None:
        return
    from understudy.chrome_trace import written

    output, document = output or Path("trace.json"), written(recording)
    if str(output) == "-":
        click.echo(document)
        return
    _write(output, lambda: output.write_bytes(document))
    click.echo(f"{output}: {told}; open it in ui.perfetto.dev")


def _draw(recording: "Recording", path: Path) -> None:
    try:
        from understudy.trace_plot import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        leave(MISSING_PACKAGE, "pictures need matplotlib: pip install 'understudy[plot]'", EXIT_REFUSED)
    draw(recording, path)


def _write(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        leave(CANNOT_WRITE, f"cannot write {path}: {error.strerror or error}", EXIT_REFUSED)
