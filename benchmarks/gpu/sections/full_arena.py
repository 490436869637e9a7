"""An arena of everything that the GPU has free: how long it takes to have it, to open it, to let go of it."""

import time
from typing import Any

from benchmarks.gpu.bench import GIB, MIB, Bench
from benchmarks.loaders import Loaders
from understudyd.shell.memory import Arena, CpuArena
from understudyd.shell.memory_cuda import CudaArena, auto_size_bytes

LOADERS = 2
RESERVE_BYTES = 4 * GIB


def open_full_arena(bench: Bench) -> dict[str, Any]:
    """As the daemon does it: loaders first, then `auto` of what they left, then they open it."""
    free_before_bytes = bench.free_bytes()
    loaders = Loaders(count=LOADERS, gpu_uuid=bench.gpu_uuid)
    try:
        attached_s = loaders.start()
        contexts_bytes = free_before_bytes - bench.free_bytes()
        started_s = time.monotonic()
        arena = _make_arena(bench)
        made_s = time.monotonic() - started_s
        opened_s = loaders.open(arena)
    finally:
        loaders.close()
    started_s = time.monotonic()
    arena.close()
    return {
        "arena_bytes": arena.size_bytes,
        "hand_over": loaders.pool.hand_over.kind,
        "loader_context_bytes": contexts_bytes // LOADERS,
        "attached_s": attached_s,
        "made_s": made_s,
        "opened_s": opened_s,
        "closed_s": time.monotonic() - started_s,
        "checks": {"memory_is_free_again": bench.free_bytes() >= free_before_bytes - 64 * MIB},
    }


def _make_arena(bench: Bench) -> Arena:
    if not bench.is_cuda:
        return CpuArena(bench.pick(GIB, 16 * MIB))
    return CudaArena(auto_size_bytes(RESERVE_BYTES, 0), 0)
