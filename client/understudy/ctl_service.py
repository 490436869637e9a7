"""Commands of `understudyctl` about the daemon as a service: what it takes, reads, keeps and says."""

import sys
from pathlib import Path

import click

from understudy.ctl_kit import ask, ask_long, output_option, show

LOG_LEVELS = ("debug", "info", "warning", "error")


@click.command()
@click.option("--wait", is_flag=True, help="Return when the last request is finished.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait; then the exit code is 1, and the daemon still takes no requests.",
)
@output_option
@click.pass_obj
def drain(socket_path: Path, wait: bool, timeout_s: float, output: str) -> None:
    """Take no more requests and finish those that wait, until `resume`."""
    from understudy.admin import Drain

    if wait:
        show(ask_long(socket_path, Drain(wait_s=timeout_s), "draining"), output, "facts")
    else:
        show(ask(socket_path, Drain()), output, "facts")


@click.command()
@output_option
@click.pass_obj
def resume(socket_path: Path, output: str) -> None:
    """Take requests again after `drain`."""
    from understudy.admin import Resume

    show(ask(socket_path, Resume()), output, "facts")


@click.command()
@output_option
@click.pass_obj
def reload(socket_path: Path, output: str) -> None:
    """Read the configuration again, as SIGHUP does. A bad one changes nothing."""
    from understudy.admin import Reload

    show(ask(socket_path, Reload()), output, "facts")


@click.command("drop-cache")
@output_option
@click.pass_obj
def drop_cache(socket_path: Path, output: str) -> None:
    """Forget the copies of weights in host memory that nothing uses now."""
    from understudy.admin import DropCache

    show(ask(socket_path, DropCache()), output, "facts")


@click.command("log-level")
@click.argument("level", type=click.Choice(LOG_LEVELS))
@click.option("--logger", default="", metavar="NAME", help="Only this one, understudyd.shell for example.")
@output_option
@click.pass_obj
def log_level(socket_path: Path, level: str, logger: str, output: str) -> None:
    """Say more or less in the log from now on; a restart brings the configuration's level back."""
    from understudy.admin import LogLevel

    show(ask(socket_path, LogLevel(level=level, logger=logger)), output, "facts")  # type: ignore[arg-type]


@click.command()
@click.option("--once", is_flag=True, help="Print it once and leave; so does a stdout that is no terminal.")
@click.option(
    "-n",
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
)
@output_option
@click.pass_obj
def top(socket_path: Path, once: bool, interval_s: float, output: str) -> None:
    """Watch the daemon: stage, queue, arena by model, loaders, hits, errors. Ctrl-C leaves.

    With `-o json` one document is printed.
    """
    from understudy import top as view

    if once or output == "json" or not sys.stdout.isatty():
        show(view.look(lambda question: ask(socket_path, question)), output, "frame", "top")
    else:
        view.watch(socket_path, interval_s)


service_commands: tuple[click.Command, ...] = (top, drain, resume, reload, drop_cache, log_level)
