"""`understudy`: ask a daemon for images from the command line.

Images go to files, what happened to stdout, progress and errors to stderr. Exit codes by fault: 0 done,
2 the caller's (usage included), 3 no capacity now, 4 the daemon's, 5 cannot reach it, 130 Ctrl-C.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from understudy.errors import CapacityError, DaemonError, TransportError, UnderstudyError

if TYPE_CHECKING:
    from understudy.results import Hint, Result
    from understudy.wire import ModelEntry

EXIT_CALLER, EXIT_CAPACITY, EXIT_DAEMON, EXIT_TRANSPORT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130

endpoint_option = click.option(
    "--endpoint",
    metavar="URL",
    help="Where the daemon listens: ipc:///path or tcp://host:port. "
    "Default: $UNDERSTUDY_ENDPOINT, else the socket in the runtime directory.",
)
wait_option = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for a daemon that does not answer at all.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="understudy", message="understudy %(version)s")
def main() -> None:
    """Ask an Understudy daemon for images."""


def _size(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    width, _, height = value.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r} is no size; write it as 512x768")
    return int(width), int(height)


@main.command()
@click.argument("prompt")
@click.option("-m", "--model", required=True, help="A name that `understudy models` shows.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="Where to write the image; several become out-0.png, out-1.png, ...",
)
@click.option("--negative", metavar="TEXT", help="What the image should not show.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same image.")
@click.option("--size", callback=_size, metavar="WxH", help="Pixels, multiples of 8, for example 512x768.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--guidance", type=float, help="How closely to follow the prompt.")
@click.option("-n", "--images", type=int, default=1, show_default=True, help="Images for this prompt.")
@click.option("--priority", type=int, default=0, help="Higher runs earlier, -100 to 100.")
@click.option("--deadline", "deadline_s", type=float, metavar="SECONDS", help="Give up after this long.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@wait_option
@endpoint_option
def generate(
    prompt: str,
    model: str,
    output: Path,
    negative: str | None,
    seed: int | None,
    size: tuple[int, int] | None,
    steps: int | None,
    guidance: float | None,
    images: int,
    priority: int,
    deadline_s: float | None,
    quiet: bool,
    wait_s: float,
    endpoint: str | None,
) -> None:
    """Make an image of PROMPT and save it as PNG."""
    if not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    width, height = size or (None, None)
    with _errors_as_exit_codes():
        from understudy.sync import Client

        with Client(endpoint, reconnect_s=wait_s) as client:
            events = client.stream(
                model,
                prompt,
                negative_prompt=negative,
                seed=seed,
                width=width,
                height=height,
                steps=steps,
                guidance=guidance,
                images=images,
                priority=priority,
                deadline_s=deadline_s,
                progress=not quiet,
            )
            with contextlib.closing(events):  # Ctrl-C cancels before the client disconnects
                result = _last(events) if quiet else _watch(events, model)
        _report(result, _saved(result, output))


@main.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@wait_option
@endpoint_option
def models(output: str, wait_s: float, endpoint: str | None) -> None:
    """List what may be asked for, and where each model is."""
    with _errors_as_exit_codes():
        from understudy.sync import Client

        with Client(endpoint, reconnect_s=wait_s) as client:
            entries = client.models()
    if output == "json":
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(entries)).decode())
    else:
        _show_models(entries)


@main.command()
@wait_option
@endpoint_option
def ping(wait_s: float, endpoint: str | None) -> None:
    """Is the daemon there, and how far?"""
    with _errors_as_exit_codes():
        from understudy.sync import Client

        with Client(endpoint, reconnect_s=wait_s) as client:
            pinged = client.ping()
            where = client.endpoint
    click.echo(f"daemon {pinged.daemon} at {where}: {pinged.round_trip_s * 1000:.2f} ms")


def _watch(events: "Iterator[Hint | Result]", model: str) -> "Result":
    """Follow a request with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from understudy.results import Result
    from understudy.wire import Accepted

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"{model}: asking the daemon", total=None)
        for event in events:
            if isinstance(event, Result):
                return event
            if isinstance(event, Accepted):
                bars.update(bar, description=f"{model}: {_place(event.position)}, model on {event.tier}")
            else:
                bars.update(bar, description=f"{model}: steps", completed=event.step, total=event.steps)
    raise AssertionError("a stream ends with a result or an error")


def _place(position: int) -> str:
    return "next" if position == 0 else f"{position} before it"


def _last(events: "Iterator[Hint | Result]") -> "Result":
    from understudy.results import Result

    *_, result = events
    assert isinstance(result, Result)
    return result


def _saved(result: "Result", output: Path) -> list[Path]:
    try:
        return result.save(output)
    except OSError as error:
        _exit(f"cannot write {error.filename or output}: {error.strerror}", EXIT_CALLER)


def _report(result: "Result", paths: list[Path]) -> None:
    timings = result.timings
    for path in paths:
        click.echo(str(path))
    click.echo(
        f"{result.model} (was {result.tier}), seed {result.seed}: queued {timings.queued_s:.3f} s, "
        f"switch {timings.switch_s * 1000:.1f} ms, run {timings.run_s:.3f} s, "
        f"encode {timings.encode_s:.3f} s, total {timings.total_s:.3f} s"
    )


def _show_models(entries: "list[ModelEntry]") -> None:
    if not entries:
        click.echo("no models yet; `understudyctl add NAME SOURCE` adds one")
        return
    from understudy.render import models_table, show

    show(models_table([{f: getattr(entry, f) for f in entry.__struct_fields__} for entry in entries]))


@contextlib.contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _exit("cancelled", EXIT_INTERRUPTED)
    except CapacityError as error:
        _exit(f"{error}{' (trying again later may help)' if error.retryable else ''}", EXIT_CAPACITY)
    except DaemonError as error:
        _exit(f"the daemon failed: {error}", EXIT_DAEMON)
    except TransportError as error:
        _exit(str(error), EXIT_TRANSPORT)
    except UnderstudyError as error:
        _exit(str(error), EXIT_CALLER)


def _exit(message: str, code: int) -> NoReturn:
    click.echo(f"understudy: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
