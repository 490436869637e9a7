"""`understudyctl add-lora`, `loras` and `remove-lora`."""

from pathlib import Path

import click

from understudy.completion import complete_known_lora, complete_known_model
from understudy.ctl_add import daemon_source, is_missing_here
from understudy.ctl_kit import ask, ask_long, output_option, show, show_results


@click.command("add-lora")
@click.argument("words", nargs=-1, required=True, metavar="[NAME] SOURCE")
@click.option(
    "--base",
    metavar="MODEL",
    shell_complete=complete_known_model,
    help="The model it is for, and is used with when it is asked for alone; else every model is tried.",
)
@click.option("--name-prefix", default="", help="Put this before the names that are made from paths.")
@click.option("--revision", help="The branch, tag or commit of a hub id.")
@click.option("--weight-name", metavar="FILE", help="Which file of a hub id that has several.")
@click.option("--replace", is_flag=True, help="Swap it in for the adapter of that name.")
@output_option
@click.pass_obj
def add_lora(
    socket_path: Path,
    words: tuple[str, ...],
    base: str | None,
    name_prefix: str,
    revision: str | None,
    weight_name: str | None,
    replace: bool,
    output: str,
) -> None:
    """Add LoRAs and serve them: a file, every file below a folder, or a hub id.

    SOURCE is on the daemon's machine, in the format of kohya, A1111, diffusers or PEFT. Without NAME each
    LoRA is called after its file.
    """
    if len(words) > 2:
        raise click.UsageError("give SOURCE, or NAME and SOURCE")
    from understudy.admin import AddLora

    source = daemon_source(words[-1])
    command = AddLora(
        source=source,
        name=words[0] if len(words) == 2 else None,
        base=base,
        name_prefix=name_prefix,
        revision=revision,
        weight_name=weight_name,
        replace=replace,
        is_missing=is_missing_here(source),
    )
    show_results(ask_long(socket_path, command, f"adding {words[0]}"), output, kind="lora")


@click.command()
@output_option
@click.pass_obj
def loras(socket_path: Path, output: str) -> None:
    """Every LoRA, and every combination of a model and LoRAs in use, and where each is."""
    from understudy.admin import Loras

    show(ask(socket_path, Loras()), output, "listing", "render_lora")


@click.command("remove-lora")
@click.argument("name", shell_complete=complete_known_lora)
@output_option
@click.pass_obj
def remove_lora(socket_path: Path, name: str, output: str) -> None:
    """Stop serving a LoRA and delete it when its last request is done."""
    from understudy.admin import RemoveLora

    show(ask_long(socket_path, RemoveLora(name=name), f"removing {name}"), output, "facts")
