"""One request as it is recorded: what the daemon logs and the simulator plays."""

import msgspec

USUAL_STEPS = 30


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One request as somebody made it. A line of the request log is this as a JSON object.

    `arrival_s` counts from any fixed moment. `duration_s` is what it took where it was recorded; the
    simulator goes by `images` and `steps`.
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


def work_of(images: int, steps: int | None) -> float:
    """How much work a request is: its steps, over all images; what says no number of steps counts as thirty.

    Pixels are left out: a request that says nothing gets the size of its model, which the core does not know.
    """
    return float(max(1, images) * max(1, USUAL_STEPS if steps is None else steps))


def log_line(request: TraceRequest) -> bytes:
    """One line of the request log, with its newline."""
    return msgspec.json.encode(request) + b"\n"
