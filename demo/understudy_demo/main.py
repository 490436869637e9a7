"""`understudy-demo`: see Understudy at work on a small machine, without a network."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A family of small models served on a quarter of the memory they need."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--models", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def make(folder: Path, models: int, seed: int) -> None:
    """Write a family of MODELS diffusers pipelines to FOLDER."""
    with _or_how_to_install():
        from understudy_demo.baseline import quiet
        from understudy_demo.family import make_family

    quiet()
    try:
        members = make_family(folder, models, seed)
    except (FileExistsError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for member in members:
        click.echo(f"{member.name}\t{member.path}")


@main.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"),
              show_default=True, help="For models, store and pictures; reused by the next run.")  # fmt: skip
@click.option("--models", type=click.IntRange(min=4), default=24, show_default=True)
@click.option("--requests", type=click.IntRange(min=2), default=160, show_default=True)
def run(out: Path, models: int, requests: int) -> None:
    """Make the models, serve a bursty workload with and without Understudy, compare, draw."""
    from rich.console import Console

    console = Console()
    console.print(f"Understudy demo: {models} models, {requests} requests, all in {out}/", style="bold")
    with _or_how_to_install():
        from understudy_demo.run import Demo, Plan  # seconds: torch and diffusers
        from understudy_demo.serving import DaemonFailed

    try:
        status = Demo(Plan(out=out, models=models, requests=requests), console).play()
    except DaemonFailed as error:
        click.echo(f"\n{error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("\nstopped; nothing is left running", err=True)
        sys.exit(130)
    sys.exit(status)


@contextlib.contextmanager
def _or_how_to_install() -> Iterator[None]:
    """The client alone has this command, too, and none of what it needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is not installed: the demo needs the daemon and matplotlib. In the checkout: "
            "make demo, or pip install '.[daemon,demo]'"
        ) from error


if __name__ == "__main__":
    main()
