"""What loaders cost the request on stage: its step times while they rest and while they copy at full rate.

Two loaders bring loads from the host pool into spare parts of the same arena, one chunk size after the other.
Runs with resting and with busy loaders alternate.
"""

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import GIB, MIB, Bench, gbps
from benchmarks.gpu.theatre import Theatre, theatre
from benchmarks.kit import percentile
from benchmarks.loaders import DEFAULTS, Source, noise_file
from understudyd.shell.host_pool import HostPool

LOADERS = 2
ROUNDS = 2
CHUNKS = (4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
P50_TARGET, P99_TARGET = 1.03, 1.10


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Milliseconds per denoising step of Stable Diffusion 1.5; `<chunk MiB>` -> figures."""
    part_bytes = bench.pick(GIB, 2 * MIB)
    sources = [noise_file(bench.work / f"steps-{i}", part_bytes, seed=i) for i in range(LOADERS)]
    with (
        theatre(bench, "sd15", extra_bytes=LOADERS * part_bytes) as stage,
        bench.host_pool(LOADERS * part_bytes) as pool,
    ):
        clock = StepClock(bench, stage.module("UNet2DConditionModel"))
        _step_times_ms(bench, stage, clock)  # first-use kernels
        found = {
            str(chunk_bytes // MIB): _measure_chunk(bench, stage, clock, pool, sources, chunk_bytes)
            for chunk_bytes in bench.pick(CHUNKS, CHUNKS[:1])
        }
    default = found.get(str(DEFAULTS.chunk_bytes // MIB))
    targets = (
        {}
        if default is None
        else {
            f"p50_within_{P50_TARGET:g}": default["p50_ratio"] <= P50_TARGET,
            f"p99_within_{P99_TARGET:g}": default["p99_ratio"] <= P99_TARGET,
        }
    )
    return {"chunk_mib": found, "targets": targets}


class StepClock:
    """Notes when each call of a module begins: on the GPU by events, which need no waiting."""

    def __init__(self, bench: Bench, module: nn.Module) -> None:
        self._is_cuda = bench.is_cuda
        self._moments: list[Any] = []
        module.register_forward_pre_hook(self._note)

    def take_ms(self) -> list[float]:
        """The times between the calls since the last time."""
        moments, self._moments = self._moments, []
        if not self._is_cuda:
            return [(after - before) * 1e3 for before, after in pairwise(moments)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(moments)]

    def _note(self, _module: nn.Module, _args: Any) -> None:
        if not self._is_cuda:
            self._moments.append(time.monotonic())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)


def _measure_chunk(
    bench: Bench, stage: Theatre, clock: StepClock, pool: HostPool, sources: list[Source], chunk_bytes: int
) -> dict[str, float]:
    spare_offset = stage.arena.size_bytes - sum(source.size_bytes for source in sources)
    resting_ms: list[float] = []
    busy_ms: list[float] = []
    moved_bytes, moved_s = 0, 0.0
    places = [sum(s.size_bytes for s in sources[:i]) for i in range(len(sources))]
    settings = replace(DEFAULTS, chunk_bytes=chunk_bytes)
    with bench.loaders(stage.arena, count=LOADERS, settings=settings, host_pool=pool) as loaders:
        loaders.load([s.at(None, pool_offset=at) for s, at in zip(sources, places)])
        copies = [s.at(spare_offset + at, pool_offset=at, from_pool=True) for s, at in zip(sources, places)]
        with loaders.kept_busy(copies):  # until the pool has surely been pinned
            _step_times_ms(bench, stage, clock)
        for _ in range(ROUNDS):
            resting_ms += _step_times_ms(bench, stage, clock)
            started_s = time.monotonic()
            with loaders.kept_busy(copies) as done:
                busy_ms += _step_times_ms(bench, stage, clock)
            moved_bytes, moved_s = moved_bytes + sum(done), moved_s + time.monotonic() - started_s
    return _figures(resting_ms, busy_ms) | {"copied_gbps": gbps(moved_bytes, moved_s)}


def _step_times_ms(bench: Bench, stage: Theatre, clock: StepClock) -> list[float]:
    clock.take_ms()
    stage.play(stage.models[:1], steps=bench.pick(100, 3))
    return clock.take_ms()


def _figures(resting_ms: list[float], busy_ms: list[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for percent in (50, 99):
        resting, busy = (percentile(values, percent) or 0.0 for values in (resting_ms, busy_ms))
        found |= {
            f"resting_ms_p{percent}": resting,
            f"busy_ms_p{percent}": busy,
            f"p{percent}_ratio": busy / resting,
        }
    return found
