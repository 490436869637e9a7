"""Shell completion for both commands: click's own scripts, and model names from a running daemon.

    eval "$(understudy --completion bash)"

Somebody waits with a finger on the key: a daemon that is not there, or slow, completes nothing and says
nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
TASKS = tuple(
    f"{task}{conditioning}"
    for task in ("text-to-image", "image-to-image", "inpainting")
    for conditioning in ("", "-controlnet")
)
_PATIENCE_S = 0.5

_F = TypeVar("_F", bound=Callable[..., Any])


def completion_option(command: str) -> Callable[[_F], _F]:
    """`--completion SHELL` for the group of this name."""

    def show(context: click.Context, _: click.Parameter, shell: str | None) -> None:
        if shell is None or context.resilient_parsing:
            return
        kind = get_completion_class(shell)
        assert kind is not None, shell
        click.echo(kind(context.command, {}, command, f"_{command.upper()}_COMPLETE").source())
        context.exit()

    return click.option(
        "--completion",
        type=click.Choice(SHELLS),
        is_eager=True,
        expose_value=False,
        callback=show,
        help=f'Print a shell\'s completion script: eval "$({command} --completion bash)".',
    )


def complete_model(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names that the daemon at `--endpoint` serves."""
    from understudy.errors import UnderstudyError
    from understudy.keys import Keys
    from understudy.paths import default_endpoint
    from understudy.sync import Client

    endpoint = context.params.get("endpoint") or default_endpoint()
    if endpoint.startswith("ipc://") and not Path(endpoint.removeprefix("ipc://")).exists():
        return []
    try:
        key, server_key = (context.params.get(name) for name in ("key", "server_key"))
        keys = Keys.read(key, server_key) if key and server_key else None
        with Client(endpoint, reconnect_s=_PATIENCE_S, keys=keys) as client:
            return _items([(entry.name, entry.pipeline) for entry in client.models()], incomplete)
    except UnderstudyError:
        return []


def complete_known_model(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names that the daemon behind the admin socket knows."""
    from understudy.admin import AdminError, Models, call
    from understudy.paths import admin_socket

    try:
        socket_path = context.find_root().params.get("socket_path") or admin_socket()
        models = call(socket_path, Models(), timeout_s=_PATIENCE_S)
    except AdminError:
        return []
    return _items([(model["name"], model.get("tier", "")) for model in models], incomplete)


def complete_task(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a model can be asked to do."""
    return _items([(task, "") for task in TASKS], incomplete)


def _items(named: list[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=text or None) for name, text in named if name.startswith(incomplete)]
