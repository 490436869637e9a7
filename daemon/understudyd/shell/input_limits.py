"""Limits of what a request brings along: input images and pipeline options. Pure; nothing is decoded.

Says what is wrong and what to do, or None. The stage checks later what a pipeline takes; here it is made
sure that whatever it looks at is small, well-formed and of the announced size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from understudy.image_header import HeaderError, read_header
from understudy.wire import MAX_INPUTS, InputInfo, Option

_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_FILES = ("png", "jpeg", "webp")
_CHANNELS = (1, 3, 4)
_SHOWN_CHARS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLimits:
    """Bounds of input images and options. `total` bytes are those of one request, all frames together."""

    max_inputs: int = MAX_INPUTS
    max_pixels: int = 2048 * 2048
    max_total_bytes: int = 64 * 1024 * 1024
    max_options: int = 64
    max_option_items: int = 500
    max_option_chars: int = 8192


def inputs_refusal(inputs: Sequence[InputInfo], payload: Sequence[bytes], limits: InputLimits) -> str | None:
    """Check each description by itself, then against its frame."""
    if len(inputs) > limits.max_inputs:
        return f"{len(inputs)} inputs, the limit is {limits.max_inputs}; send fewer"
    if len(payload) != len(inputs):
        return f"{len(payload)} payload frames for {len(inputs)} inputs; send one for each"
    total_bytes = sum(map(len, payload))
    if total_bytes > limits.max_total_bytes:
        return (
            f"the inputs are {total_bytes} bytes, the limit is {limits.max_total_bytes}; "
            "send smaller images, or files in place of raw rows"
        )
    for info, frame in zip(inputs, payload, strict=True):
        if message := _description(info, limits) or _frame(info, frame):
            return message
    return None


def options_refusal(options: Mapping[str, Option], limits: InputLimits) -> str | None:
    """Names, sizes and finite numbers. What may be nested is the decoder's matter: lists of plain values."""
    if len(options) > limits.max_options:
        return f"{len(options)} options, the limit is {limits.max_options}; send only what differs"
    for name, value in options.items():
        if not _ARGUMENT.fullmatch(name):
            return f"option {_shown(name)} is no argument's name; use letters, digits and _, 64 at most"
        items = value if isinstance(value, list) else [value]
        if len(items) > limits.max_option_items:
            return f"option {name!r} has {len(items)} items, the limit is {limits.max_option_items}"
        for item in items:
            if isinstance(item, str) and len(item) > limits.max_option_chars:
                return (
                    f"option {name!r} has {len(item)} characters, the limit is {limits.max_option_chars}; "
                    "shorten it"
                )
            if isinstance(item, float) and not math.isfinite(item):
                return f"option {name!r} is {item}; it must be a finite number"
    return None


def _description(info: InputInfo, limits: InputLimits) -> str | None:
    if not _ARGUMENT.fullmatch(info.name):
        return (
            f"input {_shown(info.name)} is no argument's name; use the pipeline's own, "
            "image or mask_image for example"
        )
    if info.format not in ("raw", *_FILES):
        return f"input {info.name!r} has format {_shown(info.format)}; use one of raw, {', '.join(_FILES)}"
    if info.channels not in _CHANNELS:
        return f"input {info.name!r} has {info.channels} channels; it must be 1, 3 or 4"
    if info.width < 1 or info.height < 1:
        return f"input {info.name!r} is {info.width}x{info.height} pixels; send at least 1x1"
    if info.width * info.height > limits.max_pixels:
        return (
            f"input {info.name!r} is {info.width}x{info.height} pixels, the limit is {limits.max_pixels}; "
            "scale it down"
        )
    return None


def _frame(info: InputInfo, frame: bytes) -> str | None:
    if info.format == "raw":
        expected = info.width * info.height * info.channels
        if len(frame) == expected:
            return None
        return (
            f"input {info.name!r} is {len(frame)} bytes, but {info.width}x{info.height} pixels of "
            f"{info.channels} channels are {expected}; send uint8 rows without padding"
        )
    try:
        header = read_header(frame)
    except HeaderError as error:
        return f"input {info.name!r}: {error}; send a whole {info.format} file"
    if (header.format, header.width, header.height) == (info.format, info.width, info.height):
        return None
    return (
        f"input {info.name!r} is announced as {info.format} of {info.width}x{info.height}, but the file is "
        f"{header.format} of {header.width}x{header.height}; announce what the file says"
    )


def _shown(text: str) -> str:
    return f"{text!r:.{_SHOWN_CHARS}}"
