"""All parts in order, each a process of its own; a part that was stopped goes on where it was."""

import subprocess
import sys
from pathlib import Path

import click

_PARTS = (
    ("vae", "--name", "vae-one", "--steps", "1250"),
    ("vae", "--name", "vae", "--start", "vae-one", "--steps", "1050", "--seed", "3000000"),
    ("base",),
    ("fine_tunes",),
    ("loras",),
)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
def main(work: Path, threads: int) -> None:
    """Train the whole family and export it into the package."""
    for module, *arguments in _PARTS:
        _run(module, "--work", str(work), "--threads", str(threads), *arguments)
    _run("export", "--work", str(work))


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"train.{module}", *arguments], check=True)


if __name__ == "__main__":
    main()
