"""SIGKILL of a loader in mid-copy: neighbours in the arena keep their bytes, a successor does the work."""

import statistics
from typing import Any

from benchmarks.gpu.bench import GIB, MIB, Bench
from benchmarks.gpu.runner import Skip
from benchmarks.loaders import Loaders, MakeTask, Source, noise_file
from understudyd.core.events import LoaderReady, LoadFinished
from understudyd.shell.loading import LoaderSettings
from understudyd.shell.memory import Arena

KILLS = 5
LOADS = 100  # given at once: after the first of them the loader copies without a break
TARGET_S = 1.0


def kill_loaders(bench: Bench) -> dict[str, Any]:
    """Low neighbour, victim, high neighbour; the victim is copied from the host pool again and again."""
    sizes = [bench.pick(64 * MIB, MIB), bench.pick(GIB, 16 * MIB), bench.pick(64 * MIB, MIB)]
    low, victim, high = (noise_file(bench.work / f"kill-{i}", size, seed=i) for i, size in enumerate(sizes))
    victim_at, high_at = low.size_bytes, low.size_bytes + victim.size_bytes
    from_pool = victim.at(victim_at, pool_offset=0, from_pool=True)
    with (
        bench.arena(sum(sizes)) as arena,
        bench.host_pool(victim.size_bytes) as pool,
        bench.loaders(arena, settings=LoaderSettings(stable_after_s=0.0), host_pool=pool) as loaders,
    ):
        if loaders.pool.hand_over.by_threads:
            raise Skip("loaders are threads here, which nobody can kill")
        loaders.load([low.at(0), high.at(high_at), victim.at(None, pool_offset=0)])
        kills = [_kill_once(loaders, from_pool) for _ in range(KILLS)]
        untouched = _is_there(bench, arena, low, 0) and _is_there(bench, arena, high, high_at)
        loaders.load([from_pool])
        return {
            "kills": KILLS,
            "respawn_ms": statistics.median(respawn_s for respawn_s, _ in kills) * 1e3,
            "targets": {f"new_loader_within_{TARGET_S:g}_s": max(s for s, _ in kills) < TARGET_S},
            "checks": {
                "killed_in_mid_load": all(was_busy for _, was_busy in kills),
                "neighbours_untouched": untouched,
                "successor_loads": _is_there(bench, arena, victim, victim_at),
            },
        }


def _kill_once(loaders: Loaders, make: MakeTask) -> tuple[float, bool]:
    """Seconds from the signal to the successor at work, and whether loads were left to do."""
    (loader_id,) = loaders.ready()
    before = len(loaders.of(LoadFinished))
    for _ in range(LOADS):
        loaders.start_load(make, loader_id)
    loaders.wait(lambda: len(loaders.of(LoadFinished)) > before, "the first load is done")
    killed_at_s = loaders.kill(loader_id)
    loaders.wait(lambda: loaders.ready() not in ([], [loader_id]), "there is a new loader")
    was_busy = len(loaders.of(LoadFinished)) < before + LOADS
    return max(at_s for at_s, _ in loaders.of(LoaderReady)) - killed_at_s, was_busy


def _is_there(bench: Bench, arena: Arena, source: Source, offset: int) -> bool:
    return source.is_at(bench.content(arena, offset, source.size_bytes))
