"""Models of real size with random weights, two of each architecture, in a store: the others' material."""

import shutil
import time
from typing import Any

from benchmarks import real_store
from benchmarks.gpu.bench import KINDS, Bench, gbps

_SPARE = 1.1


def make_weights(bench: Bench) -> dict[str, Any]:
    """Drawn on the device, written through the store's own writer."""
    architectures = {kind: bench.architecture(kind) for kind in KINDS}
    needed_bytes = int(2 * sum(a.size_bytes for a in architectures.values()) * _SPARE)
    if shutil.disk_usage(bench.work).free < needed_bytes:
        raise OSError(f"{bench.work} needs {needed_bytes} free bytes; choose another folder with --work")
    store = bench.store()
    found: dict[str, Any] = {}
    for kind, architecture in architectures.items():
        started_s = time.monotonic()
        records = [
            real_store.publish(
                store,
                architecture,
                f"{kind}-{letter}",
                seed=seed,
                dtypes=bench.dtypes(kind),
                device=bench.device,
            )
            for seed, letter in enumerate("ab")
        ]
        size_bytes = sum(record.size_bytes for record in records)
        seconds = time.monotonic() - started_s
        found[kind] = {"size_bytes": size_bytes, "made_s": seconds, "gbps": gbps(size_bytes, seconds)}
    return found
