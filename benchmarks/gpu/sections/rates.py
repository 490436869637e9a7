"""How fast loads are: from the host pool and from disk (the page cache), against one large pinned copy."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench import GIB, MIB, Bench, gbps
from benchmarks.loaders import Loaders, MakeTask, Source, noise_file
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import Arena

ROUNDS = 9
TARGET = 0.9


def measure_rates(bench: Bench) -> dict[str, Any]:
    """GB (1e9 bytes) per second, medians; with one loader, and with two that load half each."""
    size_bytes = bench.pick(2 * GIB, 8 * MIB)
    source = noise_file(bench.work / "rates", size_bytes)
    halves = [noise_file(bench.work / f"half-{i}", size_bytes // 2, seed=i) for i in range(2)]
    with bench.arena(size_bytes) as arena, bench.host_pool(size_bytes) as pool:
        pinned_gbps = _median_gbps(size_bytes, pinned_copy(bench, arena, source))
        one = _loader_rates(bench, arena, pool, [source])
        two = _loader_rates(bench, arena, pool, halves)
    best_gbps = max(one["pool_gbps"], two["pool_gbps"])
    return {
        "size_bytes": size_bytes,
        "pinned_copy_gbps": pinned_gbps,
        "one_loader": one,
        "two_loaders": two,
        "pool_of_pinned": best_gbps / pinned_gbps,
        "targets": {f"pool_of_pinned_at_least_{TARGET}": best_gbps >= TARGET * pinned_gbps},
        "checks": {"checksums": one.pop("is_right") and two.pop("is_right")},
    }


def pinned_copy(bench: Bench, arena: Arena, source: Source) -> Callable[[], float]:
    """One large copy of the file's bytes from pinned memory to the start of the arena; its seconds."""
    pinned = torch.empty(source.size_bytes, dtype=torch.uint8, pin_memory=bench.is_cuda)
    content = np.fromfile(source.path, dtype=np.uint8, offset=source.record.data_start_bytes)
    np.copyto(pinned.numpy(), content[: source.size_bytes])
    target = arena.tensor()[: source.size_bytes]

    def copy() -> float:
        bench.synchronise()
        started_s = time.monotonic()
        target.copy_(pinned, non_blocking=True)
        bench.synchronise()
        return time.monotonic() - started_s

    copy()
    return copy


def _loader_rates(bench: Bench, arena: Arena, pool: HostPool, sources: Sequence[Source]) -> dict[str, Any]:
    offsets = [sum(s.size_bytes for s in sources[:i]) for i in range(len(sources))]
    size_bytes = sum(s.size_bytes for s in sources)
    from_disk = [s.at(o) for s, o in zip(sources, offsets)]
    through_pool = [s.at(o, pool_offset=o) for s, o in zip(sources, offsets)]
    from_pool = [s.at(o, pool_offset=o, from_pool=True) for s, o in zip(sources, offsets)]
    with bench.loaders(arena, count=len(sources), host_pool=pool) as loaders:
        verified_s = loaders.load(through_pool)
        _warm_up(loaders, from_pool, bench.pick(5.0, 0.0))
        arena.tensor().zero_()
        bench.synchronise()
        pool_gbps = _median_gbps(size_bytes, lambda: loaders.load(from_pool))
        is_right = all(s.is_at(bench.content(arena, o, s.size_bytes)) for s, o in zip(sources, offsets))
        return {
            "pool_gbps": pool_gbps,
            "disk_gbps": _median_gbps(size_bytes, lambda: loaders.load(from_disk)),
            "disk_through_pool_gbps": _median_gbps(size_bytes, lambda: loaders.load(through_pool)),
            "disk_verified_gbps": gbps(size_bytes, verified_s),
            "is_right": is_right,
        }


def _warm_up(loaders: Loaders, makes: Sequence[MakeTask], seconds: float) -> None:
    """Repeat until the pool has surely been pinned, which loaders do in the background."""
    ends_at_s = time.monotonic() + seconds
    while time.monotonic() < ends_at_s:
        loaders.load(makes)


def _median_gbps(size_bytes: int, run: Callable[[], float]) -> float:
    return statistics.median(gbps(size_bytes, run()) for _ in range(ROUNDS))
