"""Shell completion for both commands: click's own scripts, and model names from a running daemon.

    eval "$(understudy --completion bash)"

Somebody waits with a finger on the key: a daemon that is not there, or slow, completes nothing and says
nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem, get_completion_class

if TYPE_CHECKING:
    from understudy.wire import ModelEntry

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
    """Names that the daemon at `--endpoint` serves: models, and adapters, which may be asked for as such."""
    return _items([(entry.name, entry.pipeline) for entry in _entries(context)], incomplete)


def complete_lora(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of its adapters."""
    loras = [(entry.name, entry.base) for entry in _entries(context) if entry.kind == "lora"]
    return _items(loras, incomplete)


def _entries(context: click.Context) -> "list[ModelEntry]":
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
            return client.models()
    except UnderstudyError:
        return []


def complete_known_model(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of models that the daemon behind the admin socket knows."""
    from understudy.admin import Models

    return _items(_named(_documents(context, Models())), incomplete)


def complete_known_lora(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of its LoRAs."""
    from understudy.admin import Loras

    return _items(_named((_documents(context, Loras()) or {}).get("loras")), incomplete)


def complete_known(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of its models, LoRAs and combinations of these."""
    from understudy.admin import Loras, Models

    loras = _documents(context, Loras()) or {}
    lists = (_documents(context, Models()), loras.get("loras"), loras.get("combinations"))
    return _items([item for documents in lists for item in _named(documents)], incomplete)


def _documents(context: click.Context, command: Any) -> Any:
    """What the daemon answers; None if it does not."""
    from understudy.admin import AdminError, call
    from understudy.paths import admin_socket

    try:
        socket_path = context.find_root().params.get("socket_path") or admin_socket()
        return call(socket_path, command, timeout_s=_PATIENCE_S)
    except AdminError:
        return None


def _named(documents: list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    return [(document["name"], document.get("tier", "")) for document in documents or ()]


def complete_task(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a model can be asked to do."""
    return _items([(task, "") for task in TASKS], incomplete)


def _items(named: list[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=text or None) for name, text in named if name.startswith(incomplete)]
