"""What the front end accepts: the limits of requests, and what to say about one that breaks them. Pure."""

import math
import re
from dataclasses import dataclass

from understudy.wire import MAX_ID_CHARS, MAX_SEED, Generate

_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_ID_CHARS}}}")
_FORMATS = ("png", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request and of one client. Sizes in bytes, times in seconds.

    `client_timeout_s` is how long a client with open requests may be silent, and how long a message may
    wait for a client that does not read. The caps of `outbox_bytes` hold beside what ZeroMQ itself holds:
    at most `send_high_water_mark` messages for each client.
    """

    max_model_chars: int = 256
    max_prompt_chars: int = 8192
    max_pixels: int = 2048 * 2048
    max_steps: int = 500
    max_images: int = 16
    max_guidance: float = 100.0
    max_priority: int = 100
    max_deadline_s: float = 7 * 24 * 3600.0
    max_open_per_client: int = 256
    max_frames: int = 16
    max_frame_bytes: int = 16 * 1024 * 1024
    outbox_bytes: int = 64 * 1024 * 1024
    answer_ttl_s: float = 60.0
    client_timeout_s: float = 15.0
    send_high_water_mark: int = 64
    receive_high_water_mark: int = 1000


def is_id(text: str) -> bool:
    """Whether this may be a request id."""
    return _ID.fullmatch(text) is not None


ID_RULE = f"an id is 1 to {MAX_ID_CHARS} of the characters A-Z a-z 0-9 . _ : -"


def refusal(request: Generate, payload_frames: int, limits: Limits) -> str | None:
    """What is wrong with a request and what to do, or None. Types are the decoder's matter."""
    if payload_frames:
        return f"{payload_frames} payload frames with a generate request; this daemon takes no input images"
    return (
        _texts(request, limits)
        or _size(request, limits)
        or _whole("steps", request.steps, 1, limits.max_steps)
        or _whole("images", request.images, 1, limits.max_images)
        or _whole("seed", request.seed, 0, MAX_SEED)
        or _whole("priority", request.priority, -limits.max_priority, limits.max_priority)
        or _real("guidance", request.guidance, 0.0, limits.max_guidance)
        or _deadline(request.deadline_s, limits.max_deadline_s)
    )


def _texts(request: Generate, limits: Limits) -> str | None:
    if not 1 <= len(request.model) <= limits.max_model_chars:
        return f"a model name has 1 to {limits.max_model_chars} characters; list_models shows the names"
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            return f"{name} has {len(text)} characters, the limit is {limits.max_prompt_chars}; shorten it"
    if request.format not in _FORMATS:
        return f"format {request.format!r:.40} is unknown; use one of {', '.join(_FORMATS)}"
    return None


def _size(request: Generate, limits: Limits) -> str | None:
    for name, pixels in (("width", request.width), ("height", request.height)):
        if pixels is not None and (pixels <= 0 or pixels % 8):
            return f"{name} is {pixels}; it must be a positive multiple of 8"
    width, height = request.width or 8, request.height or 8
    if width * height > limits.max_pixels:
        pixels = width * height
        return (
            f"{width}x{height} is {pixels} pixels, the limit is {limits.max_pixels}; ask for a smaller size"
        )
    return None


def _whole(name: str, value: int | None, low: int, high: int) -> str | None:
    if value is None or low <= value <= high:
        return None
    return f"{name} is {value}; it must be {low} to {high}"


def _real(name: str, value: float | None, low: float, high: float) -> str | None:
    if value is None or (math.isfinite(value) and low <= value <= high):
        return None
    return f"{name} is {value}; it must be {low:g} to {high:g}"


def _deadline(value: float | None, high: float) -> str | None:
    if value is None or 0 < value <= high:  # false for a NaN as well
        return None
    return f"deadline_s is {value}; it must be more than 0 and at most {high:g} seconds"
