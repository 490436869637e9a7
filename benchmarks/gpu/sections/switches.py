"""Bind, visible switch and GPU idle gap between two resident models whose requests alternate.

The idle gap is the device's own word: from an event recorded behind the last kernel of one request to one
recorded before the first kernel of the next. Bind and visible switch are the host's clock.
"""

import itertools
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.theatre import Theatre, theatre
from benchmarks.kit import percentile
from understudyd.stage.device import CudaDevice

TARGETS_MS = {"sd15": (1.0, 2.0), "sdxl": (2.0, 3.0)}
IDLE_TARGET_MS = 1.0


def measure_switches(bench: Bench, kind: str) -> dict[str, Any]:
    """Milliseconds; the first runs, which meet every kernel for the first time, are left out."""
    device = MarkedDevice() if bench.is_cuda else None
    with theatre(bench, kind, device=device) as stage:
        stage.play(stage.models, steps=1)
        first_module = stage.module("CLIPTextModel")
        hook = first_module.register_forward_pre_hook(device.note_start) if device is not None else None
        runs = [stage.models[i % 2] for i in range(bench.pick(31, 3))]
        stage.spans.clear()
        if device is not None:
            device.ends.clear()
        stage.play(runs, steps=bench.pick(2, 1))
        if hook is not None:
            hook.remove()
        return _figures(stage, kind, device)


class MarkedDevice(CudaDevice):
    """A device whose marks tell the time, and which notes where each request's work began."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))
        self.starts: list[Any] = []
        self.ends: list[Any] = []

    def mark_last_use(self) -> Any:
        """See `CudaDevice`."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        self.ends.append(event)
        return event

    def note_start(self, _module: nn.Module, _args: Any) -> None:
        """Pre-hook of the module that requests touch first; later calls of a request do not count."""
        if len(self.starts) == len(self.ends):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.starts.append(event)

    def idle_gaps_ms(self) -> list[float]:
        """Between requests, on the device's clock."""
        torch.cuda.synchronize()
        return [end.elapsed_time(start) for end, start in zip(self.ends, self.starts[1:])]


def _figures(stage: Theatre, kind: str, device: MarkedDevice | None) -> dict[str, Any]:
    binds_ms = [(span.end_s - span.start_s) * 1e3 for span in stage.spans if span.lane == "bind"][1:]
    runs = [(span.start_s, span.end_s) for span in stage.spans if span.lane == "stage"]
    visible_ms = [(after[0] - before[1]) * 1e3 for before, after in itertools.pairwise(runs)]
    figures: dict[str, Any] = {
        "switches": len(visible_ms),
        "bind_ms": _spread(binds_ms),
        "visible_ms": _spread(visible_ms),
        "run_ms_p50": statistics.median((end_s - start_s) * 1e3 for start_s, end_s in runs),
    }
    bind_target_ms, visible_target_ms = TARGETS_MS[kind]
    targets = {
        f"bind_under_{bind_target_ms:g}_ms": figures["bind_ms"]["p50"] < bind_target_ms,
        f"visible_under_{visible_target_ms:g}_ms": figures["visible_ms"]["p50"] < visible_target_ms,
    }
    if device is not None:
        figures["gpu_idle_ms"] = _spread(device.idle_gaps_ms())
        targets[f"gpu_idle_under_{IDLE_TARGET_MS:g}_ms"] = figures["gpu_idle_ms"]["p50"] < IDLE_TARGET_MS
    return figures | {"targets": targets}


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": percentile(values, 50) or 0.0, "p99": percentile(values, 99) or 0.0}
