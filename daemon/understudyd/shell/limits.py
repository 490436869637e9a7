"""What the front end accepts: the limits of requests, and what to say about one that breaks them. Pure."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from understudy.wire import MAX_ADAPTERS, MAX_FRAME_BYTES, MAX_ID_CHARS, MAX_SEED, Adapter, Generate
from understudyd.shell.input_limits import InputLimits, inputs_refusal, options_refusal
from understudyd.shell.work_room import Work, exceeded, work_asked

_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_ID_CHARS}}}")
_TASK = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SCHEDULER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.: -]{0,63}")
_LOSSY = ("jpeg", "webp")
MAX_OPEN_WORK = Work(pixels=2**31, steps=200_000)
_FORMATS = ("png", *_LOSSY, "raw", "latent", "mp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request and of one client. Sizes in bytes, times in seconds.

    `client_timeout_s` is how long a client with open requests may be silent, and how long a message may
    wait for a client that does not read. The caps of `outbox_bytes` hold beside what ZeroMQ itself holds:
    at most `send_high_water_mark` messages for each client. Input images wait in memory with their requests:
    `max_open_input_bytes` of them for each client, `max_all_input_bytes` for all together.
    """

    max_model_chars: int = 256
    max_prompt_chars: int = 8192
    max_pixels: int = 2048 * 2048
    max_steps: int = 500
    max_adapter_scale: float = 100.0
    max_images: int = 16
    max_guidance: float = 100.0
    max_priority: int = 100
    max_deadline_s: float = 7 * 24 * 3600.0
    max_open_per_client: int = 256
    max_open_per_user: int = 512
    max_open_work: Work = MAX_OPEN_WORK
    max_open_input_bytes: int = 512 * 1024 * 1024
    max_all_input_bytes: int = 2 * 1024 * 1024 * 1024
    max_frame_bytes: int = MAX_FRAME_BYTES
    inputs: InputLimits = field(default_factory=InputLimits)
    max_connections: int = 1000
    outbox_bytes: int = 64 * 1024 * 1024
    answer_ttl_s: float = 60.0
    client_timeout_s: float = 15.0
    send_high_water_mark: int = 64
    receive_high_water_mark: int = 128


def is_id(text: str) -> bool:
    """Whether this may be a request id."""
    return _ID.fullmatch(text) is not None


ID_RULE = f"an id is 1 to {MAX_ID_CHARS} of the characters A-Z a-z 0-9 . _ : -"


def refusal(request: Generate, payload: Sequence[bytes], limits: Limits) -> str | None:
    """What is wrong with a request and what to do, or None. Types are the decoder's matter.

    `payload` are its frames, of which no more than headers are looked at.
    """
    return (
        _texts(request, limits)
        or _size(request, limits)
        or _whole("steps", request.steps, 1, limits.max_steps)
        or _whole("images", request.images, 1, limits.max_images)
        or _whole("seed", request.seed, 0, MAX_SEED)
        or _whole("priority", request.priority, -limits.max_priority, limits.max_priority)
        or _real("guidance", request.guidance, 0.0, limits.max_guidance)
        or _deadline(request.deadline_s, limits.max_deadline_s)
        or _output(request)
        or _adapters(request.adapters, limits)
        or options_refusal(request.options, limits.inputs)
        or inputs_refusal(request.inputs, payload, limits.inputs)
        or _work(request, limits)
    )


def _work(request: Generate, limits: Limits) -> str | None:
    """What alone is more than a client may have open would wait for ever."""
    message = exceeded(work_asked(request), limits.max_open_work)
    return None if message is None else f"{message} for all of one client's; ask for less at a time"


def _texts(request: Generate, limits: Limits) -> str | None:
    if not 1 <= len(request.model) <= limits.max_model_chars:
        return f"a model name has 1 to {limits.max_model_chars} characters; list_models shows the names"
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            return f"{name} has {len(text)} characters, the limit is {limits.max_prompt_chars}; shorten it"
    if request.task is not None and not _TASK.fullmatch(request.task):
        return f"task {request.task!r:.40} is none; use text-to-image, image-to-image or inpainting"
    if request.scheduler is not None and not _SCHEDULER.fullmatch(request.scheduler):
        return f"scheduler {request.scheduler!r:.40} is none; use a class name, DDIMScheduler for example"
    return None


def _adapters(adapters: Sequence[Adapter], limits: Limits) -> str | None:
    if len(adapters) > MAX_ADAPTERS:
        return f"{len(adapters)} adapters are given, the limit is {MAX_ADAPTERS}; name fewer"
    for adapter in adapters:
        if not 1 <= len(adapter.name) <= limits.max_model_chars:
            return (
                f"an adapter's name has 1 to {limits.max_model_chars} characters; list_models shows the names"
            )
    high = limits.max_adapter_scale
    return next(filter(None, (_real(f"the scale of {a.name}", a.scale, -high, high) for a in adapters)), None)


def _output(request: Generate) -> str | None:
    if request.format not in _FORMATS:
        return f"format {request.format!r:.40} is unknown; use one of {', '.join(_FORMATS)}"
    if request.quality is not None and request.format not in _LOSSY:
        return f"quality is given for {request.format}; leave it out, or use format jpeg or webp"
    return _whole("quality", request.quality, 1, 100)


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
