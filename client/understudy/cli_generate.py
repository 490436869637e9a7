"""`understudy generate`: from options to a request, from results to files."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from understudy.cli_kit import EXIT_CALLER, connected, errors_as_exit_codes, leave
from understudy.completion import complete_lora, complete_model, complete_task
from understudy.leaving import CANNOT_WRITE

if TYPE_CHECKING:
    from understudy.cli_kit import Connect
    from understudy.request import Request, RequestFields
    from understudy.results import Result

FORMATS = ("png", "jpeg", "webp", "raw", "latent", "mp4")
_BY_SUFFIX = {
    "": "png",
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".mp4": "mp4",
    ".safetensors": "latent",
}

_F = TypeVar("_F", bound=Callable[..., Any])


def _size(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    width, _x, height = value.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise click.BadParameter(f"{value!r} is no size; write it as 512x768")
    return int(width), int(height)


def _named(values: tuple[str, ...], example: str) -> dict[str, str]:
    """Each NAME=TEXT taken apart."""
    named = {}
    for value in values:
        name, is_there, text = value.partition("=")
        if not (is_there and name.isidentifier()):
            raise click.BadParameter(f"{value!r} is no NAME=VALUE; write it like {example}")
        named[name] = text
    return named


def _options(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    return {name: _json_or_text(text) for name, text in _named(values, "strength=0.6").items()}


def _inputs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    named = _named(values, "ip_adapter_image=style.png")
    return {name: Path(text) for name, text in named.items()}


def _loras(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    loras = []
    for value in values:
        name, _colon, scale = value.partition(":")
        try:
            loras.append((name, float(scale) if _colon else 1.0))
        except ValueError:
            raise click.BadParameter(
                f"{value!r} has no number behind the colon; write it as {name}:0.8"
            ) from None
    return loras


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _image_option(flag: str, what: str) -> Callable[[_F], _F]:
    return click.option(flag, type=click.Path(exists=True, dir_okay=False, path_type=Path), help=what)


@click.command()
@click.argument("prompt", default="")
@click.option(
    "-m",
    "--model",
    required=True,
    shell_complete=complete_model,
    help="A name that `understudy models` shows.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the image; several become out-0.png, out-1.png, ... The suffix chooses the format: "
    ".png, .jpg, .webp, .mp4, or .safetensors for latents.  [default: out.png]",
)
@click.option("--format", "image_format", type=click.Choice(FORMATS), help="In place of the suffix's format.")
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG and WebP.")
@click.option("--negative", metavar="TEXT", help="What the image should not show.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same image.")
@click.option("--size", callback=_size, metavar="WxH", help="Pixels, multiples of 8, for example 512x768.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--guidance", type=float, help="How closely to follow the prompt.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    callback=_loras,
    metavar="NAME[:SCALE]",
    shell_complete=complete_lora,
    help="Fold this LoRA into the model, as strong as it was trained or SCALE times; several in their order.",
)
@click.option("--scheduler", metavar="CLASS", help="In place of the model's own, DDIMScheduler for example.")
@click.option("-n", "--images", type=int, default=1, show_default=True, help="Images in one request.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests, each with the seed after the one before.",
)
@_image_option("--init-image", "Start from this image.")
@_image_option("--mask", "Paint only where this is white; needs --init-image.")
@_image_option("--control-image", "Follow this image's structure; the model needs a ControlNet.")
@click.option("--strength", type=float, help="How far to leave --init-image behind, 0 to 1.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    callback=_inputs,
    metavar="NAME=FILE",
    help="An image for another argument of the pipeline.",
)
@click.option(
    "--task",
    metavar="TASK",
    shell_complete=complete_task,
    help="For example inpainting; else the inputs decide.",
)
@click.option(
    "--set",
    "options",
    multiple=True,
    callback=_options,
    metavar="NAME=VALUE",
    help="Another argument of the pipeline; the value is read as JSON, or as text where it is none.",
)
@click.option("--priority", type=int, default=0, help="Higher runs earlier, -100 to 100.")
@click.option("--deadline", "deadline_s", type=float, metavar="SECONDS", help="Give up after this long.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@connected
def generate(
    prompt: str,
    model: str,
    output: Path | None,
    image_format: str | None,
    quality: int | None,
    negative: str | None,
    seed: int | None,
    size: tuple[int, int] | None,
    steps: int | None,
    guidance: float | None,
    loras: list[tuple[str, float]],
    scheduler: str | None,
    images: int,
    count: int,
    init_image: Path | None,
    mask: Path | None,
    control_image: Path | None,
    strength: float | None,
    inputs: dict[str, Path],
    task: str | None,
    options: dict[str, Any],
    priority: int,
    deadline_s: float | None,
    quiet: bool,
    connect: "Connect",
) -> None:
    """Make an image of PROMPT and save it."""
    output, image_format = _target(output, image_format)
    fields: RequestFields = {
        "negative_prompt": negative,
        "seed": seed,
        "size": size,
        "steps": steps,
        "guidance": guidance,
        "adapters": loras,
        "scheduler": scheduler,
        "images": images,
        "image": init_image,
        "mask": mask,
        "control_image": control_image,
        "inputs": inputs,
        "task": task,
        "options": options if strength is None else options | {"strength": strength},
        "priority": priority,
        "deadline_s": deadline_s,
        "format": image_format,
        "quality": quality,
        "progress": not quiet and count == 1,
    }
    requests: list[Request] = [
        {"model": model, "prompt": prompt, **fields, "seed": seed if seed is None else seed + index}
        for index in range(count)
    ]
    with errors_as_exit_codes():
        from understudy.cli_progress import follow

        report: list[str] = []
        try:
            with (
                connect() as client,
                # Closed before the client disconnects: Ctrl-C takes open requests back.
                contextlib.closing(follow(client, requests, quiet)) as results,
            ):
                for index, result in enumerate(results):
                    report += _saved(result, _numbered(output, index, count))
        finally:  # whatever ended it, these files are there
            for line in report:
                click.echo(line)


def _target(output: Path | None, image_format: str | None) -> tuple[Path, str]:
    """File and format, each from the other where it is not given. Raises `click.BadParameter`."""
    from understudy.results import SUFFIXES

    if output is None:
        image_format = image_format or "png"
        return Path(f"out{SUFFIXES[image_format][0]}"), image_format
    if not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    suffix = output.suffix.lower()
    if image_format is None:
        if suffix not in _BY_SUFFIX:
            known = ", ".join(filter(None, _BY_SUFFIX))
            raise click.BadParameter(
                f"{output.suffix} names no format; end it in {known}, or give --format",
                param_hint="--output",
            )
        return output, _BY_SUFFIX[suffix]
    if suffix in _BY_SUFFIX and suffix and suffix not in SUFFIXES[image_format]:
        raise click.BadParameter(
            f"{output.name} is no name for --format {image_format}; end it in {SUFFIXES[image_format][0]}",
            param_hint="--output",
        )
    return output, image_format


def _numbered(output: Path, index: int, count: int) -> Path:
    if count == 1:
        return output
    return output.with_name(f"{output.stem}-{index:0{len(str(count - 1))}}{output.suffix}")


def _saved(result: "Result", output: Path) -> list[str]:
    """Write the files; what to say of them."""
    try:
        paths = result.save(output)
    except OSError as error:
        leave(CANNOT_WRITE, f"cannot write {error.filename or output}: {error.strerror}", EXIT_CALLER)
    timings = result.timings
    # Without another model before it, this is no switch but the way from the queue to the stage.
    switch = f"switch {timings.switch_s * 1000:.1f} ms, " if result.switched else ""
    visible_s = timings.gap_s if result.switched else None
    visible = "" if visible_s is None else f"; visible switch {visible_s * 1000:.2f} ms"
    folded = "".join(f" + {adapter.name}:{adapter.scale:g}" for adapter in result.adapters)
    return [
        *map(str, paths),
        f"{result.model}{folded} (was {result.tier}), seed {result.seed}: queued {timings.queued_s:.3f} s, "
        f"{switch}run {timings.run_s:.3f} s, "
        f"encode {timings.encode_s:.3f} s, total {timings.total_s:.3f} s{visible}",
    ]
