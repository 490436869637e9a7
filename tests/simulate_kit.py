"""Small costs and traces for the simulator's tests."""

from collections.abc import Iterable
from pathlib import Path

from understudyd.recorded import TraceRequest
from understudyd.simulate.profiles import Component, Figure, Profile

MB = 1_000_000
PAGE = 4096


def figure(value: float) -> Figure:
    return Figure(value, "made up")


def profile(**figures: float) -> Profile:
    """One component of 100 MB; 10 MB/s from disk, 100 MB/s over the bus, 1 s a step, nothing else."""
    values = {
        "step_s": 1.0, "image_s": 0.0, "request_s": 0.0, "bind_s": 0.0, "bus_bytes_per_s": 100.0 * MB,
        "disk_bytes_per_s": 10.0 * MB, "loader_bytes_per_s": 100.0 * MB, "load_s": 0.0, "views_s": 0.0,
        "prepare_s": 0.0, "encode_s": 0.0, "move_bytes_per_s": 1000.0 * MB,
    } | figures  # fmt: skip
    weights = (Component("unet", 100 * MB, "made up"),)
    return Profile("made-up", "", weights, **{name: figure(value) for name, value in values.items()})


def asks(*models_at: tuple[float, str], steps: int = 1) -> list[TraceRequest]:
    """Requests at these seconds for these models."""
    return [TraceRequest(at_s, name, "client", steps=steps) for at_s, name in models_at]


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> Path:
    lines = [f"{r.arrival_s},{r.client},{r.model},{r.images},{r.steps}\n" for r in requests]
    path.write_text("".join(["arrival_s,client,model,images,steps\n", *lines]))
    return path
