"""One request as it is recorded: what the daemon logs and the simulator plays."""

from collections.abc import Iterable

import msgspec

USUAL_STEPS = 30


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One request as somebody made it. A line of the request log is this as a JSON object.

    `arrival_s` counts from any fixed moment. `loras` are its adapters in order, "pixel-art@0.8+wrong": each
    with its scale, unless that is 1. `duration_s` is what it took where it was recorded; the simulator goes
    by `images` and `steps`.
    """

    arrival_s: float
    model: str
    client: str = ""
    loras: str = ""
    task: str = ""
    images: int = 1
    steps: int = USUAL_STEPS
    duration_s: float = 0.0
    priority: int = 0


def loras_of(text: str) -> tuple[tuple[str, float], ...]:
    """Names and scales of what stands in `TraceRequest.loras`. Raises ValueError."""
    parts = (part.partition("@") for part in text.split("+") if part)
    return tuple((name, float(scale) if at else 1.0) for name, at, scale in parts)


def loras_text(adapters: Iterable[tuple[str, float]]) -> str:
    """How names and scales stand in `TraceRequest.loras`."""
    return "+".join(name if scale == 1.0 else f"{name}@{scale!r}" for name, scale in adapters)


def derived_name(base: str, adapters: Iterable[tuple[str, float]]) -> str:
    """What the core calls a model with adapters; the model's own name without any."""
    return "+".join([base, *(f"{name}@{scale!r}" for name, scale in adapters)])


def work_of(images: int, steps: int | None) -> float:
    """How much work a request is: its steps, over all images; what says no number of steps counts as thirty.

    Pixels are left out: a request that says nothing gets the size of its model, which the core does not know.
    """
    return float(max(1, images) * max(1, USUAL_STEPS if steps is None else steps))


def log_line(request: TraceRequest) -> bytes:
    """One line of the request log, with its newline."""
    return msgspec.json.encode(request) + b"\n"
