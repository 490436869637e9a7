"""Adapters over SDXL: how long a fold takes, what it costs the request beside it, and a hot change."""

import dataclasses
from typing import Any

import torch

from benchmarks.gpu.bench import GIB, Bench

VISIBLE_TARGET_MS = 2.0
_RESERVE_BYTES = 4 * GIB


def measure_adapters(bench: Bench) -> dict[str, Any]:
    """Milliseconds: the figures of `benchmarks.lora_stage` for adapters of rank 16 and 64."""
    from benchmarks.lora_scene import make_adapters  # diffusers and peft, which other sections do without
    from benchmarks.lora_stage import LoraTheatre, arena_bytes, measure_stage

    dtype = torch.float16 if bench.is_cuda else torch.float32
    architecture = dataclasses.replace(bench.architecture("sdxl"), dtype=dtype)
    adapters = make_adapters(architecture, bench.work)
    size_bytes = arena_bytes(architecture, adapters)
    bench.need(size_bytes + _RESERVE_BYTES)
    with bench.arena(size_bytes) as arena, torch.no_grad():
        theatre = LoraTheatre(
            architecture, adapters, bench.work, device=bench.device, make_arena=lambda _: arena.tensor()
        )
        try:
            found = measure_stage(theatre, bench.pick(100, 6), bench.pick(20, 1))
        finally:
            theatre.stage.close()
            del theatre
    target = {
        f"visible_switch_under_{VISIBLE_TARGET_MS:g}_ms": found["visible_switch_ms_p50"] < VISIBLE_TARGET_MS
    }
    return {**found, "targets": target}
