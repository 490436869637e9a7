"""One request as it is recorded: what the daemon logs and the simulator plays."""

import msgspec


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
    steps: int = 30
    duration_s: float = 0.0
    priority: int = 0


def log_line(request: TraceRequest) -> bytes:
    """One line of the request log, with its newline."""
    return msgspec.json.encode(request) + b"\n"
