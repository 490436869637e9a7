"""The options of `understudyctl add`, and the command that they make."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from understudy.admin import Add, Scan

_F = TypeVar("_F", bound=Callable[..., Any])
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

_OPTIONS = (
    click.argument("name", required=False),
    click.argument("source", required=False),
    click.option("--scan", "folder", type=click.Path(path_type=Path), metavar="DIR",
                 help="Add every model below DIR instead."),
    click.option("--name-prefix", default="", help="With --scan: put this before the names it makes."),
    click.option("--dry-run", is_flag=True, help="With --scan: say what would be added, and add nothing."),
    click.option("--like", multiple=True, metavar="MODEL",
                 help="A model that has what a .safetensors checkpoint lacks; the first that fits counts."),
    click.option("--config", type=click.Path(path_type=Path), metavar="FOLDER",
                 help="A diffusers folder that has what a .safetensors checkpoint lacks."),
    click.option("--revision", help="The branch, tag or commit of a hub id."),
    click.option("--replace", is_flag=True, help="Swap the model in for the one of that name."),
    click.option("--dtype", type=click.Choice(["keep", "fp16", "bf16", "fp32"]), default="keep",
                 show_default=True, help="What to serve in; keep what the files are in."),
    click.option("--variant", help="Which weight files to read, for example fp16."),
    click.option("--ignore-pickle", is_flag=True,
                 help="Skip pickled weights where safetensors lie beside them."),
    click.option("--pipeline", help="Serve SOURCE's weights with this installed custom pipeline."),
)  # fmt: skip


def add_options(command: _F) -> _F:
    """All options and arguments of `add`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_command(
    *, name: str | None, source: str | None, folder: Path | None, config: Path | None, **options: Any
) -> "Add | Scan":
    """The admin command for what was typed. Raises `click.UsageError` where options do not go together."""
    from understudy.admin import Add, Scan

    options["config"] = None if config is None else str(config.absolute())
    scan_only = {key: options.pop(key) for key in ("name_prefix", "dry_run")}
    if folder is None:
        if name is None or source is None:
            raise click.UsageError("give NAME and SOURCE, or --scan DIR")
        if any(scan_only.values()):
            raise click.UsageError("--dry-run and --name-prefix go with --scan DIR")
        told = daemon_source(source)
        return Add(name=name, source=told, is_missing=is_missing_here(told), **options)
    add_only = {key: options.pop(key) for key in ("revision", "pipeline")}
    if name is not None or any(add_only.values()):
        raise click.UsageError("--scan DIR goes without NAME, SOURCE, --revision and --pipeline")
    return Scan(folder=str(folder.absolute()), is_missing=_is_missing(folder), **scan_only, **options)


def daemon_source(source: str) -> str:
    """A source as the daemon must be told: paths absolute, hub ids as they are. What exists is a path."""
    path = Path(source)
    if not path.exists() and _HUB_ID.fullmatch(source) and not source.startswith("."):
        return source
    return str(path.absolute())


def is_missing_here(told: str) -> bool:
    """Whether the caller, too, finds nothing at what the daemon is told; a hub id is no path."""
    return Path(told).is_absolute() and _is_missing(Path(told))


def _is_missing(path: Path) -> bool:
    """Whether nothing is there; what may not be looked at may be there."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False
