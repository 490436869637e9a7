"""Input images: from a request's payload to PIL images under the pipeline's own keywords.

Nothing is decoded before the sizes were compared, and no format is tried but the one that was declared.
"""

import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from io import BytesIO
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from understudy.wire import InputInfo
from understudyd.stage.calls import CallFacts, Keyword
from understudyd.stage.errors import BadRequest

MAX_INPUT_PIXELS = 4096 * 4096
"""Of one image. Four bytes each, once decoded."""

_RAW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Pillow opens what is registered; importing a plugin registers it.
_FILE_FORMATS = {
    "png": PngImagePlugin.PngImageFile.format,
    "jpeg": JpegImagePlugin.JpegImageFile.format,
    "webp": WebPImagePlugin.WebPImageFile.format,
}
# What Pillow raises about bytes that are no image, or not all of one.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_CONTROL = "control_image"
_WAYS = {
    "image": "image= or --init-image",
    "mask_image": "mask= or --mask",
    _CONTROL: "control_image= or --control-image",
}
NO_TASKS: Mapping[str, Iterable[str]] = MappingProxyType({})

Inputs = Sequence[tuple[InputInfo, bytes]]


def check_inputs(
    inputs: Inputs,
    call: CallFacts,
    names: Iterable[str],
    required: Iterable[str],
    others: Mapping[str, Iterable[str]] = NO_TASKS,
) -> None:
    """Compare declarations with the pipeline and with the frames, decoding nothing. Raises `BadRequest`.

    `names` are the keywords for images that this model can take, `required` those it cannot do without;
    `others` what the model's other tasks take.
    """
    taken = list(names)
    counts: dict[str, int] = {}
    for info, data in inputs:
        if info.name not in taken:
            accepted = _accepted(info.name, taken, others)
            raise BadRequest(f"{call.pipeline} takes no input {info.name!r:.40}; {accepted}")
        counts[info.name] = counts.get(info.name, 0) + 1
        if counts[info.name] > 1 and not call.keywords[info.name].takes_many_images:
            raise BadRequest(f"{call.pipeline} takes one image as {info.name}; send one")
        _check_sizes(info, data)
    for name in required:
        if name not in counts:
            way = _WAYS.get(name, f"inputs={{'{name}': ...}} or --input {name}=FILE")
            raise BadRequest(f"{call.pipeline} needs an image as {name}; send it with {way}")


def _accepted(name: str, taken: Collection[str], others: Mapping[str, Iterable[str]]) -> str:
    """What the pipeline takes in place of `name`, and what the other tasks of the model do."""
    parts = [f"it takes {', '.join(taken)}" if taken else "it takes no images"]
    by_task = {task: list(images) for task, images in others.items()}
    parts += [f"{task} takes {', '.join(images)}" for task, images in by_task.items() if images]
    if name == _CONTROL and not any(name in images for images in by_task.values()):
        parts.append(f"{name} needs a model with a ControlNet")
    return "; ".join(parts)


def decode_inputs(inputs: Inputs, call: CallFacts, before_each: Callable[[], None]) -> dict[str, Any]:
    """Checked inputs as keyword arguments: an image, or a list of those of one name in their order.

    Masks are grey ("L"), all else is RGB, turned upright as diffusers' `load_image` does. `before_each` may
    raise to stop. Raises `BadRequest` about a file that is broken or not what was declared.
    """
    images: dict[str, list[Image.Image]] = {}
    for info, data in inputs:
        before_each()
        images.setdefault(info.name, []).append(_decode(info, data))
    return {name: _as_wanted(found, call.keywords[name]) for name, found in images.items()}


def _as_wanted(images: list[Image.Image], keyword: Keyword) -> Any:
    return images[0] if len(images) == 1 and keyword.takes_one_image else images


def _check_sizes(info: InputInfo, data: bytes) -> None:
    name = info.name
    if info.width < 1 or info.height < 1:
        raise BadRequest(f"input {name} is {info.width} x {info.height}; both must be at least 1")
    if info.width * info.height > MAX_INPUT_PIXELS:
        raise BadRequest(
            f"input {name} is {info.width} x {info.height}; {MAX_INPUT_PIXELS} pixels are the most"
        )
    if info.format in _FILE_FORMATS:
        return
    if info.format != "raw":
        known = ", ".join(["raw", *_FILE_FORMATS])
        raise BadRequest(f"input {name} has format {info.format!r:.20}; use one of {known}")
    if info.channels not in _RAW_MODES:
        raise BadRequest(f"input {name} has {info.channels} channels; raw images have 1, 3 or 4")
    expected = info.width * info.height * info.channels
    if len(data) != expected:
        raise BadRequest(
            f"input {name} has {len(data)} bytes, not the {expected} of "
            f"{info.width} x {info.height} x {info.channels}"
        )


def _decode(info: InputInfo, data: bytes) -> Image.Image:
    mode = "L" if "mask" in info.name else "RGB"
    if info.format == "raw":
        picture = Image.frombytes(_RAW_MODES[info.channels], (info.width, info.height), data)
        return picture.convert(mode)
    try:
        with Image.open(BytesIO(data), formats=[_FILE_FORMATS[info.format]]) as picture:
            _check_header(info, picture)
            return ImageOps.exif_transpose(picture).convert(mode)
    except _BROKEN as error:
        raise BadRequest(f"input {info.name} is no readable {info.format} file: {error}"[:200]) from error


def _check_header(info: InputInfo, picture: Any) -> None:
    """Of an opened file; its pixels are not read yet."""
    if picture.size != (info.width, info.height):
        width, height = picture.size
        raise BadRequest(
            f"input {info.name} is a file of {width} x {height}, declared as {info.width} x {info.height}"
        )
    frames = getattr(picture, "n_frames", 1)
    if frames != 1 and info.format != "jpeg":  # telephones add depth maps behind the picture
        raise BadRequest(f"input {info.name} has {frames} frames; send one image for each")
