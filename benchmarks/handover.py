"""What the hand-over does on the CPU device: `python -m benchmarks.handover [--json] [--quick]`.

* load: one Stable Diffusion 1.5 UNet in fp16 (1.72 GB), from the page cache into the arena, through a real
  loader pool with one loader process. An earlier load verified its checksums, as in a daemon that lives.
* raw: plain `preadv` threads of one process into the same memory, with the same chunk size and number of
  threads. Rounds of load, raw and host tier alternate: all meet the same machine.
* host tier: the same bytes from the host pool into the arena.
* respawn: from SIGKILL of a loader in mid-load to its successor at work.
* faults: a daemon with more models than room serves requests while its loaders are killed in mid-load, again
  and again; then every model is evicted. Arena bytes that were free before and are not then, and host pool
  bytes that are neither free nor a copy at rest, have leaked.

Expected, before the first run: load and raw both end in the same `preadv` into the same kind of memory; the
loader adds a message each way and 103 pieces of bookkeeping in Python, under 5 ms of 190: a ratio of 0.95.
From the pool: a plain copy reads and writes as many bytes without the file system, so no slower than a load.
Respawn: an interpreter with msgspec in 0.1 s, twice that on two busy cores.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.handover_faults import survive
from benchmarks.kit import json_line, say, show_table, timed
from benchmarks.loaders import Loaders, Source, running_loaders
from benchmarks.raw_reads import RawReader
from understudyd.core.events import LoaderReady
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import CpuArena
from understudyd.shell.supervisor import LoaderSettings

ROUNDS, QUICK_ROUNDS = 15, 3
KILLS, QUICK_KILLS = 7, 2
# A loader that is killed at once, again and again, is not respawned slower each time.
SETTINGS = LoaderSettings(stable_after_s=0.0)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second of each round."""

    load: list[float]
    raw: list[float]
    host: list[float]


def measure_rates(source: Source, rounds: int) -> Rates:
    """Rounds of the three, in turns that begin with another one each time."""
    size_bytes = source.record.size_bytes
    arena = CpuArena(size_bytes)
    host_pool = HostPool(size_bytes)
    raw = RawReader(source, arena.fds()[0], SETTINGS.chunk_bytes, SETTINGS.reader_threads)
    try:
        with running_loaders(arena, settings=SETTINGS, host_pool=host_pool) as loaders:
            fill = partial(source.task, pool_offset=0)
            from_pool = partial(source.task, pool_offset=0, from_pool=True)
            loaders.load([fill])  # verifies the checksums, and has both mappings' pages
            rates = Rates([], [], [])
            contestants: list[tuple[list[float], Callable[[], float]]] = [
                (rates.load, lambda: loaders.load([source.task])),
                (rates.raw, raw.read),
                (rates.host, lambda: loaders.load([from_pool])),
            ]
            for number in range(rounds):
                for into, run in [*contestants, *contestants][number % 3 : number % 3 + 3]:
                    into.append(size_bytes / run())
            return rates
    finally:
        raw.close()
        host_pool.close()
        arena.close()


def measure_respawns(source: Source, kills: int) -> list[float]:
    """Seconds from SIGKILL of a loader in mid-load to its successor at work."""
    arena = CpuArena(source.record.size_bytes)
    try:
        with running_loaders(arena, settings=SETTINGS) as loaders:
            return [_respawn_s(loaders, source) for _ in range(kills)]
    finally:
        arena.close()


def _respawn_s(loaders: Loaders, source: Source) -> float:
    (loader_id,) = loaders.ready()
    loaders.start_load(source.task, loader_id)
    killed_at_s = loaders.kill(loader_id)
    loaders.wait(lambda: loaders.ready() not in ([], [loader_id]), "there is a new loader")
    return max(at_s for at_s, _ in loaders.of(LoaderReady)) - killed_at_s


@contextlib.contextmanager
def unet_blob(*, narrow: bool) -> Iterator[Source]:
    """One Stable Diffusion 1.5 UNet as the store's writer writes it, in a folder of its own."""
    from benchmarks.real_size import sd15  # torch, which the loaders of a measurement do without
    from benchmarks.real_store import random_blob

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.safetensors"
        yield Source(path, random_blob(path, sd15(narrow=narrow).signatures["unet"]))


def measure(*, quick: bool) -> dict[str, float | int]:
    """All figures; rates in GB (1e9 bytes) per second."""
    with unet_blob(narrow=quick) as source:
        say(f"one UNet of {source.record.size_bytes / 1e9:.2f} GB")
        with timed("rates"):
            rates = measure_rates(source, QUICK_ROUNDS if quick else ROUNDS)
        with timed("respawns"):
            respawns_s = measure_respawns(source, QUICK_KILLS if quick else KILLS)
    with timed("a daemon whose loaders are killed"):
        survived = survive(kills=2 if quick else 12)
    load, raw, host = (statistics.median(each) / 1e9 for each in (rates.load, rates.raw, rates.host))
    return {
        "load_gbps": load,
        "raw_gbps": raw,
        "ratio_raw": load / raw,
        "host_tier_gbps": host,
        "respawn_ms": statistics.median(respawns_s) * 1e3,
        "failed_requests": survived.failed_requests,
        "leaked_bytes": survived.leaked_bytes,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a narrow UNet and few rounds, for tests")
    options = parser.parse_args(arguments)
    found = measure(quick=options.quick)
    show_table(
        "hand-over on the CPU device", ["figure", "value"], [[k, f"{v:.3f}"] for k, v in found.items()]
    )
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
