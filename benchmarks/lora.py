"""A LoRA folded beside its base, and by diffusers: `python -m benchmarks.lora [--json] [--quick]`.

UNets of real size with random weights, Stable Diffusion 1.5 in float32 and, where memory allows, SDXL in
float16; LoRAs of rank 16 and 64 on all attention projections (128 and 560), factors in float16 as most files
have them. Both sides work on the same weights in memory, have the same threads and read the same factors from
the page cache. Rounds alternate; medians, milliseconds.

* `read_ms`: the adapter's blob into the arena; `fold_ms`: every weight of its overlay, from the call to the
  end; `views_ms`: the overlay's views, on the stage; `visible_switch_ms_p50`: between two models of the base
  with other adapters, both folded, on the real stage (`benchmarks.lora_stage`).
* `cold_ms`: their sum, which is a change to an adapter that is on disk, with nothing folded.
* `diffusers_load_fuse_unfuse_ms`: `load_lora_weights`, `fuse_lora`, `unfuse_lora` and `unload_lora_weights`,
  which is what a change of adapters costs there.
* `ratio_cold`: that divided by `cold_ms`; `ratio_hot`: by the switch.
* `*_cpu*`: the same, without the stage, in processor time, which a busy machine distorts less; least with
  `--threads 1`, as torch's threads spin while they wait for each other.
* `*_page_faults`: pages that the kernel had to give during one change, see `warm_heap`.
* `drift_tensors`, `diffusers_drift_tensors`: base weights whose bytes are others after one round.

It fails if a folded weight is not the fused one, bit for bit.
"""

import argparse
import dataclasses
import gc
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from benchmarks.kit import json_line, say, show_table, timed
from benchmarks.lora_scene import RANKS, Scene, make_adapters
from benchmarks.lora_stage import LoraTheatre, measure_stage
from benchmarks.real_size import Architecture, sd15, sdxl
from understudyd.store.pretrained import quiet_libraries

LATENT_SIDE = 16
OURS = ("read", "fold")
THEIRS = ("load", "fuse", "unfuse", "unload")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTLE_S = 0.1
"""Torch's threads look for work for a while after they had some; each side begins when they have stopped."""
_OVERLAYS_BYTES = 2 << 30
MODELS = {"sd15": sd15, "sdxl": sdxl}


class Stopwatch:
    """Wall and processor milliseconds and page faults of what is done, by name, round after round."""

    def __init__(self) -> None:
        self._wall: dict[str, list[float]] = {}
        self._cpu: dict[str, list[float]] = {}
        self._faults: dict[str, list[float]] = {}

    def take(self, key: str, action: Callable[[], None]) -> None:
        faults = _page_faults()
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        action()
        self._wall.setdefault(key, []).append((time.perf_counter() - started_s) * 1e3)
        self._cpu.setdefault(key, []).append((time.process_time() - cpu_started_s) * 1e3)
        self._faults.setdefault(key, []).append(_page_faults() - faults)

    def wall_ms(self, *keys: str) -> float:
        """The median round of these together."""
        return _median_sum(self._wall, keys)

    def cpu_ms(self, *keys: str) -> float:
        """The same in processor time, all threads together."""
        return _median_sum(self._cpu, keys)

    def faults(self, *keys: str) -> float:
        """Pages that the kernel had to give, in the median round."""
        return _median_sum(self._faults, keys)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def warm_heap() -> None:
    """Bring glibc's allocator to where drawing an image would have brought it.

    It keeps freed memory as soon as a block of nearly 32 MiB was freed (a skip connection of SD 1.5 is one).
    Before that diffusers' every product is memory new from the kernel: 128 of them took 0.2 s of processor
    time in place of 0.05.
    """
    torch.zeros(31 << 20, dtype=torch.uint8)


def _median_sum(times: dict[str, list[float]], keys: tuple[str, ...]) -> float:
    return statistics.median(map(sum, zip(*(times[key] for key in keys), strict=True)))


def measure(scene: Scene, rounds: int) -> dict[str, float | int]:
    """Medians over the rounds, of everything but the stage."""
    pristine = scene.checksums()
    kept = {path: weight.clone() for path, weight in scene.targets().items()}
    watch = Stopwatch()
    drift = drift_there = 0
    warm_heap()
    scene.read()
    scene.fold()  # first touch of the overlay's pages: a running arena's were touched long ago
    for _ in range(rounds):
        time.sleep(SETTLE_S)
        watch.take("read", scene.read)
        watch.take("fold", scene.fold)
        drift = max(drift, _differences(pristine, scene.checksums()))
        time.sleep(SETTLE_S)
        with quiet_libraries():
            watch.take("load", scene.load)
            watch.take("fuse", scene.fuse)
            scene.compare()
            watch.take("unfuse", scene.unfuse)
            watch.take("unload", scene.unload)
        drift_there = max(drift_there, _differences(pristine, scene.checksums()))
        for path, weight in scene.targets().items():
            weight.copy_(kept[path])
    return {
        "targets": len(scene.plan.weights),
        "overlay_bytes": scene.plan.size_bytes,
        "adapter_bytes": scene.adapter.blob.size_bytes,
        **{f"{key}_ms": watch.wall_ms(key) for key in OURS},
        "diffusers_load_fuse_unfuse_ms": watch.wall_ms(*THEIRS),
        **{f"diffusers_{key}_ms": watch.wall_ms(key) for key in THEIRS},
        "fold_cpu_ms": watch.cpu_ms("fold"),
        "diffusers_cpu_ms": watch.cpu_ms(*THEIRS),
        "ratio_cold_cpu": watch.cpu_ms(*THEIRS) / watch.cpu_ms(*OURS),
        "fold_page_faults": watch.faults("fold"),
        "diffusers_page_faults": watch.faults(*THEIRS),
        "drift_tensors": drift,
        "diffusers_drift_tensors": drift_there,
    }


def _differences(one: dict[str, int], other: dict[str, int]) -> int:
    return sum(one[path] != other[path] for path in one)


def changes_on_stage(
    architecture: Architecture, threads: int, folder: Path, *, switches: int, calls: int
) -> dict[str, float]:
    """Both adapters over one model on a stage; see `benchmarks.lora_stage`."""
    theatre = LoraTheatre(architecture, make_adapters(architecture, folder), folder, threads=threads)
    try:
        return measure_stage(theatre, switches, calls)
    finally:
        theatre.stage.close()


def with_stage(figures: dict[str, float | int], on_stage: dict[str, float], rank: int) -> dict[str, float]:
    """What both parts give together."""
    theirs, switch = figures["diffusers_load_fuse_unfuse_ms"], on_stage["visible_switch_ms_p50"]
    views = on_stage[f"views_ms_rank_{rank}"]
    cold = figures["read_ms"] + figures["fold_ms"] + views + switch
    return {
        **figures,
        "views_ms": views,
        "visible_switch_ms_p50": switch,
        "cold_ms": cold,
        "ratio_cold": theirs / cold,
        "ratio_hot": theirs / switch,
    }


def measure_model(
    name: str, architecture: Architecture, options: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Its figures by name and rank, and those of the stage."""
    rounds = options.rounds or (1 if options.quick else 7)
    found: dict[str, dict[str, float | int]] = {}
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            with timed(f"{name}, rank {rank}: the scene"):
                scene = Scene(architecture, rank, Path(folder), options.threads)
            with timed(f"{name}, rank {rank}: {rounds} rounds"):
                found[f"{name}_rank_{rank}"] = measure(scene, rounds)
            scene.close()
            del scene
            gc.collect()
    calls = 0 if name == "sdxl" else 1 if options.quick else 3  # a step of SDXL takes minutes on a CPU
    switches = 10 if options.quick else 100
    with tempfile.TemporaryDirectory() as folder, timed(f"{name}: changes on the stage"):
        on_stage = changes_on_stage(
            architecture, options.threads, Path(folder), switches=switches, calls=calls
        )
    gc.collect()
    ranks = dict(zip(found, RANKS, strict=True))
    return {key: with_stage(figures, on_stage, ranks[key]) for key, figures in found.items()}, on_stage


def architecture_of(name: str, options: argparse.Namespace) -> Architecture:
    """SDXL is always in float16: in float32 two of its UNets have no room on most machines."""
    dtype = torch.float16 if name == "sdxl" else DTYPES[options.dtype]
    return dataclasses.replace(MODELS[name](narrow=options.quick, sample_size=LATENT_SIDE), dtype=dtype)


def needed_bytes(architecture: Architecture) -> int:
    """What its largest moment takes: the UNet twice while it moves into the arena; later less."""
    return 2 * architecture.size_bytes + _OVERLAYS_BYTES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="narrow channels and one round, for tests")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="(all)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="SD 1.5's (fp32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's (all cores)")
    parser.add_argument("--rounds", type=int, default=None, help="per rank (7; 1 when quick)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    document: dict[str, float | dict[str, float]] = {}
    for name in options.models:
        architecture = architecture_of(name, options)
        if needed_bytes(architecture) > psutil.virtual_memory().available:
            say(f"{name} left out: it needs {needed_bytes(architecture) / 1e9:.0f} GB of free memory")
            continue
        with torch.no_grad():
            found, on_stage = measure_model(name, architecture, options)
        keys = list(next(iter(found.values())))
        rows = [[key, *(f"{figures[key]:,.5g}" for figures in found.values())] for key in keys]
        show_table(f"{name}, {architecture.dtype}, {options.threads} threads", ["", *found], rows)
        show_table("On the stage", ["", "ms"], [[key, f"{value:,.5g}"] for key, value in on_stage.items()])
        document |= found | {f"{name}_on_stage": on_stage}
    load, *_ = os.getloadavg()
    say(f"load average at the end: {load:.1f}; more than {options.threads} means others were at work")
    if options.json:
        json_line(document | {"load_average": load})


if __name__ == "__main__":
    main()
