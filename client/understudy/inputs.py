"""Input images on their way to the wire: files, Pillow images and numpy arrays become payload frames.

Neither Pillow nor numpy is imported: a caller who has their objects has them installed.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from understudy.errors import CallerError
from understudy.image_header import HeaderError, read_header
from understudy.wire import MAX_FRAME_BYTES, MAX_INPUTS, InputInfo

ImageLike: TypeAlias = Any
"""A file's bytes, its path, a Pillow image, or a numpy array [H, W] or [H, W, 1|3|4] of uint8 (or bool)."""

Images: TypeAlias = ImageLike | Sequence[ImageLike]

_PILLOW_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_PILLOW_CONVERTS = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "RGBA", "PA": "RGBA"}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What `Generate.inputs` says of each frame, and the frames."""

    infos: tuple[InputInfo, ...] = ()
    payload: tuple[bytes, ...] = ()


def inputs_from(images: Mapping[str, Images]) -> Inputs:
    """Frames for the images, by the pipeline argument they are for. Raises `CallerError`."""
    pairs = [pair for name, value in images.items() for pair in _frames(name, value)]
    if len(pairs) > MAX_INPUTS:
        raise _refused(f"{len(pairs)} input images; a request takes {MAX_INPUTS} at most")
    return Inputs(tuple(info for info, _ in pairs), tuple(data for _, data in pairs))


def _frames(name: str, value: Images) -> Iterator[tuple[InputInfo, bytes]]:
    for image in value if isinstance(value, list | tuple) else [value]:
        info, data = _frame(name, image)
        if len(data) > MAX_FRAME_BYTES:
            raise _refused(
                f"input {name!r} is {len(data)} bytes, the limit is {MAX_FRAME_BYTES}; make it smaller"
            )
        yield info, data


def _frame(name: str, image: ImageLike) -> tuple[InputInfo, bytes]:
    match image:
        case bytes() | bytearray() | memoryview():
            return _from_file(name, bytes(image), f"input {name!r}")
        case str() | os.PathLike():
            return _from_file(name, _read(name, Path(image)), f"input {name!r} ({image})")
    if hasattr(image, "mode") and hasattr(image, "convert"):
        return _from_pillow(name, image)
    if hasattr(image, "__array_interface__"):
        return _from_array(name, image)
    raise _refused(
        f"input {name!r} is of type {type(image).__name__}; give a path, a file's bytes, a Pillow image "
        "or a numpy array"
    )


def _read(name: str, path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FRAME_BYTES:
            raise _refused(f"input {name!r}: {path} is larger than {MAX_FRAME_BYTES} bytes; make it smaller")
        return path.read_bytes()
    except OSError as error:
        raise _refused(f"input {name!r}: cannot read {path}: {error.strerror}") from error


def _from_file(name: str, data: bytes, where: str) -> tuple[InputInfo, bytes]:
    try:
        header = read_header(data)
    except HeaderError as error:
        raise _refused(f"{where}: {error}; give a PNG, JPEG or WebP file") from error
    return (
        InputInfo(
            name=name,
            format=header.format,
            width=header.width,
            height=header.height,
            channels=header.channels,
        ),
        data,
    )


def _from_pillow(name: str, image: Any) -> tuple[InputInfo, bytes]:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in _PILLOW_CONVERTS:
        image = image.convert(_PILLOW_CONVERTS[image.mode])
    channels = _PILLOW_CHANNELS.get(image.mode)
    if channels is None:
        raise _refused(f"input {name!r} has Pillow's mode {image.mode!r}; convert it to L, RGB or RGBA")
    width, height = image.size
    return _raw(name, width, height, channels), image.tobytes()


def _from_array(name: str, array: Any) -> tuple[InputInfo, bytes]:
    if array.dtype.kind == "b":
        array = array.astype("uint8") * 255
    if array.dtype.str != "|u1":
        raise _refused(
            f"input {name!r} is an array of {array.dtype}; make it uint8, 0 to 255: "
            '(array * 255).round().astype("uint8") for floats of 0 to 1'
        )
    shape = tuple(int(extent) for extent in array.shape)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 3, 4):
        raise _refused(
            f"input {name!r} has the shape {list(shape)}; an image is [height, width] or "
            "[height, width, 1, 3 or 4], several are a list"
        )
    height, width, channels = shape
    return _raw(name, width, height, channels), array.tobytes()


def _raw(name: str, width: int, height: int, channels: int) -> InputInfo:
    return InputInfo(name=name, format="raw", width=width, height=height, channels=channels)


def _refused(message: str) -> CallerError:
    return CallerError(message, code="bad_request")
