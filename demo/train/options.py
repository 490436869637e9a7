"""What one may say to the trainings of many styles, the same for all kinds of them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click


def style_options(
    styles: Iterable[str], *, steps: int, batch: int, pictures: int, rate: float
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command that trains some of `styles`; the numbers are its defaults."""
    options: tuple[Any, ...] = (
        click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True),
        click.option("--steps", type=int, default=steps, show_default=True),
        click.option("--batch", type=int, default=batch, show_default=True),
        click.option("--pictures", "count", type=int, default=pictures, show_default=True,
                     help="Of each style."),
        click.option("--rate", type=float, default=rate, show_default=True),
        click.option("--threads", type=int, default=1, show_default=True),
        click.argument("styles", nargs=-1, type=click.Choice(list(styles))),
    )  # fmt: skip

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated
