"""`understudyctl`: operate a daemon over its admin socket.

`-o json` prints the daemon's document as it came. Everything heavy is imported when it is needed: `--help`
answers at once.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from understudy.completion import complete_known, complete_known_model, completion_option
from understudy.ctl_add import add_options, make_command
from understudy.ctl_kit import (
    EXIT_REFUSED,
    EXIT_USAGE,
    ask,
    ask_long,
    leave,
    output_option,
    show_decisions,
    show_results,
)
from understudy.ctl_kit import show as show_document
from understudy.ctl_lora import add_lora, loras, remove_lora
from understudy.ctl_service import service_commands
from understudy.ctl_trace import trace
from understudy.leaving import MISSING_PACKAGE
from understudy.paths import admin_socket

EXIT_CODES = (
    "Exit codes: 0 done, 1 refused or failed, 2 usage, 5 the daemon cannot be reached, 130 Ctrl-C. An error "
    "on stderr has its own code in brackets."
)
model_argument = click.argument("name", shell_complete=complete_known_model)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(package_name="understudy", message="understudyctl %(version)s")
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path),
    help="The daemon's admin socket. Default: admin.sock in the runtime directory.",
)
@completion_option("understudyctl")
@click.pass_context
def main(context: click.Context, socket_path: Path | None) -> None:
    """Operate an Understudy daemon."""
    context.obj = socket_path or admin_socket()


# -- looking ---------------------------------------------------------------------------------------------


@main.command()
@output_option
@click.pass_obj
def status(socket_path: Path, output: str) -> None:
    """The daemon at a glance."""
    from understudy.admin import Status

    show_document(ask(socket_path, Status()), output, "status")


@main.command()
@output_option
@click.pass_obj
def models(socket_path: Path, output: str) -> None:
    """Every model and where it is: disk, host, loading, resident or bound."""
    from understudy.admin import Models

    show_document(ask(socket_path, Models()), output, "models_table")


@main.command()
@click.argument("name", required=False, shell_complete=complete_known)
@click.option("--arena", is_flag=True, help="Draw the maps of the arena and the host pool.")
@output_option
@click.pass_obj
def show(socket_path: Path, name: str | None, arena: bool, output: str) -> None:
    """One model, LoRA or combination in full, or the maps of the arena and the host pool.

    A combination is a model with LoRAs, as `loras` lists them: MODEL+LORA@SCALE.
    """
    if (name is None) == (not arena):
        raise click.UsageError("give a model's NAME, or --arena")
    from understudy.admin import Show

    document = ask(socket_path, Show(name=name or "", arena=arena))
    show_document(document, output, *(("arena",) if arena else _view(document)))
    if output != "json" and not arena and (made := document.get("decisions")):
        show_decisions(made)


@main.command()
@click.option("--last", type=click.IntRange(min=1), default=100, show_default=True, metavar="N")
@output_option
@click.pass_obj
def decisions(socket_path: Path, last: int, output: str) -> None:
    """What was run, loaded, evicted or refused lately, and the numbers that decided it; the newest last."""
    from understudy.admin import Decisions

    made = ask(socket_path, Decisions(last=last))
    if output == "json":
        show_document(made, output, "")
    else:
        show_decisions(made)


@main.command()
@output_option
@click.pass_obj
def queue(socket_path: Path, output: str) -> None:
    """Running and waiting requests, in the order they will run."""
    from understudy.admin import Queue

    show_document(ask(socket_path, Queue()), output, "queue_table")


@main.command()
@output_option
@click.pass_obj
def loaders(socket_path: Path, output: str) -> None:
    """The loaders and what they do."""
    from understudy.admin import Loaders

    show_document(ask(socket_path, Loaders()), output, "loaders_table")


main.add_command(trace)


# -- changing --------------------------------------------------------------------------------------------


@main.command()
@add_options
@output_option
@click.pass_obj
def add(socket_path: Path, /, output: str, **options: Any) -> None:
    """Ingest SOURCE and serve it as NAME.

    SOURCE is a diffusers folder, a .safetensors checkpoint or an entry of the Hugging Face cache on the
    daemon's machine, or a hub id: org/name[@revision].
    """
    command = make_command(**options)
    if options["folder"] is None:
        show_document(ask_long(socket_path, command, f"adding {options['name']}"), output, "facts")
        return
    show_results(ask_long(socket_path, command, "scanning"), output, is_dry_run=options["dry_run"])


for lora_command in (add_lora, loras, remove_lora):
    main.add_command(lora_command)


@main.command()
@model_argument
@output_option
@click.pass_obj
def remove(socket_path: Path, name: str, output: str) -> None:
    """Stop serving a model and delete it when its last request is done."""
    from understudy.admin import Remove

    show_document(ask_long(socket_path, Remove(name=name), f"removing {name}"), output, "facts")


@main.command()
@output_option
@click.pass_obj
def rescan(socket_path: Path, output: str) -> None:
    """Look at all stores again: serve what is new in them, and no longer what is gone."""
    from understudy.admin import Rescan

    document = ask_long(socket_path, Rescan(), "looking at all stores")
    if output == "json":
        click.echo(json.dumps(document, indent=2))
    else:
        from understudy import render, render_scan

        render.show(render_scan.rescan_table(document))
    if any(document.get(problem) for problem in ("rejected", "damaged", "away")):
        sys.exit(EXIT_REFUSED)


@main.command()
@model_argument
@click.option("--wait/--no-wait", default=True, show_default=True, help="Answer when it is resident.")
@output_option
@click.pass_obj
def load(socket_path: Path, name: str, wait: bool, output: str) -> None:
    """Make a model resident."""
    from understudy.admin import Load

    show_document(ask_long(socket_path, Load(name=name, wait=wait), f"loading {name}"), output, "facts")


@main.command()
@model_argument
@output_option
@click.pass_obj
def evict(socket_path: Path, name: str, output: str) -> None:
    """Take a model out of the arena."""
    from understudy.admin import Evict

    show_document(ask(socket_path, Evict(name=name)), output, "facts")


@main.command()
@model_argument
@output_option
@click.pass_obj
def pin(socket_path: Path, name: str, output: str) -> None:
    """Load a model and keep it resident."""
    from understudy.admin import Pin

    show_document(ask(socket_path, Pin(name=name)), output, "facts")


@main.command()
@model_argument
@output_option
@click.pass_obj
def unpin(socket_path: Path, name: str, output: str) -> None:
    """Let a model be evicted again."""
    from understudy.admin import Unpin

    show_document(ask(socket_path, Unpin(name=name)), output, "facts")


@main.command("set")
@model_argument
@click.option(
    "--max-batch",
    type=click.IntRange(1, 64),
    required=True,
    metavar="IMAGES",
    help="What one run may make for several requests with the same settings; 1: no request shares.",
)
@output_option
@click.pass_obj
def set_(socket_path: Path, name: str, max_batch: int, output: str) -> None:
    """Change what is set for a model, for good."""
    from understudy.admin import Set

    show_document(ask(socket_path, Set(name=name, max_batch=max_batch)), output, "facts")


@main.command()
@click.argument("request_id", metavar="ID")
@output_option
@click.pass_obj
def cancel(socket_path: Path, request_id: str, output: str) -> None:
    """Cancel a request by the ID that `queue` shows."""
    from understudy.admin import CancelRequest

    show_document(ask(socket_path, CancelRequest(id=request_id)), output, "facts")


@main.command()
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long requests in flight may take to finish.",
)
@output_option
@click.pass_obj
def shutdown(socket_path: Path, drain_s: float, output: str) -> None:
    """Stop the daemon."""
    from understudy.admin import Shutdown

    command = Shutdown(drain_s=drain_s)
    show_document(ask(socket_path, command, timeout_s=drain_s + 30.0), output, "facts")


for service_command in service_commands:
    main.add_command(service_command)


@main.group()
def config() -> None:
    """The configuration file."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
def check(file: Path | None) -> None:
    """Check FILE, or the one the daemon would read, without starting anything."""
    if find_spec("understudyd") is None:
        leave(
            MISSING_PACKAGE,
            "the daemon is not installed here: pip install 'understudy[daemon]'",
            EXIT_REFUSED,
        )
    # The daemon's package knows its options; a process of its own keeps the client free of it.
    command = [sys.executable, "-m", "understudyd.config", "check", *([str(file)] if file else [])]
    code = subprocess.run(command, check=False).returncode
    sys.exit(code if code in (0, EXIT_USAGE) else EXIT_REFUSED)


# -- inside ----------------------------------------------------------------------------------------------


def _view(document: dict[str, Any]) -> tuple[str, str]:
    """What shows a model's, a LoRA's or a combination's document, and the module that has it."""
    if "adapters" in document:
        return "combination", "render_lora"
    return ("adapter", "render_lora") if "fits" in document else ("model", "render")


if __name__ == "__main__":
    main()
