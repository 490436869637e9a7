"""A round trip through the shared arena: the parent's bytes found by loaders, theirs found by the parent.

The first half is the proof that every loader makes before it is ready. The second: each loader fills its part
of the arena from a file, and the parent reads it back through torch and compares checksums.
"""

from typing import Any

from benchmarks.gpu.bench import MIB, Bench
from benchmarks.loaders import Loaders, noise_file

LOADERS = 2


def make_round_trip(bench: Bench) -> dict[str, Any]:
    """`attached_s`: spawn to device context; `opened_s`: until the last loader has proved the arena."""
    size_bytes = bench.pick(256 * MIB, 4 * MIB)
    sources = [noise_file(bench.work / f"trip-{i}", size_bytes, seed=i) for i in range(LOADERS)]
    loaders = Loaders(count=LOADERS, gpu_uuid=bench.gpu_uuid)
    with bench.arena(LOADERS * size_bytes) as arena:
        try:
            attached_s = loaders.start()
            opened_s = loaders.open(arena)
            seconds = loaders.load([s.at(i * size_bytes) for i, s in enumerate(sources)])
            found = [s.is_at(bench.content(arena, i * size_bytes, size_bytes)) for i, s in enumerate(sources)]
        finally:
            loaders.close()
        hand_over = loaders.pool.hand_over
        return {
            "transport": arena.open_fields().transport,
            "hand_over": hand_over.kind,
            "why_threads": hand_over.reason,
            "attached_s": attached_s,
            "opened_s": opened_s,
            "checked_bytes": LOADERS * size_bytes,
            "load_s": seconds,
            "checks": {"shared_between_processes": hand_over.kind == "processes", "checksums": all(found)},
        }
