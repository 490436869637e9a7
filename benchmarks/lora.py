"""A LoRA folded beside its base, and by diffusers: `python -m benchmarks.lora [--json] [--quick]`.

One Stable Diffusion 1.5 UNet of real size with random weights, LoRAs of rank 16 and 64 on its 128 attention
projections, factors in float16 as most files have them. Both sides work on the same weights in memory with
the same threads and read the same factors from the page cache; rounds alternate, medians, milliseconds.

* `read_ms`: the adapter's blob into the arena; `fold_ms`: every weight of its overlay.
* `diffusers_load_fuse_unfuse_ms`: `load_lora_weights`, `fuse_lora`, `unfuse_lora` and `unload_lora_weights`,
  which is what a change of adapters costs there.
* `ratio_cold`: that divided by read and fold together; the visible switch comes on top.
* `visible_switch_ms_p50`: between two models of the base with other adapters, both folded, on the real stage
  (`benchmarks.lora_stage`); `ratio_hot`: diffusers' change divided by that.
* `*_cpu*`: the same in processor time, which a busy machine distorts less; with `--threads 1`.
* `drift_tensors`, `diffusers_drift_tensors`: base weights whose bytes are others after one round.

It fails if a folded weight is not the fused one, bit for bit.

Expected before the first run on two cores, fp32: 110 ms for rank 16, somewhat more for 64, diffusers 3 s.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.kit import json_line, say, show_table, timed
from benchmarks.lora_stage import LoraTheatre, measure_stage
from benchmarks.real_size import Architecture, checksums, sd15
from understudy_demo import tiny
from understudyd.stage.folding import ArenaFoldMemory, fold_steps
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.bases import Base, loader_family
from understudyd.store.adapters.conversion import convert
from understudyd.store.adapters.ingest import write_targets
from understudyd.store.adapters.overlays import AppliedAdapter, plan_overlays
from understudyd.store.adapters.records import AdapterRecord, content_id
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.records import SignatureRecord
from understudyd.store.signature import Component

RANKS = (16, 64)
SHIFT = 997
LATENT_SIDE = 16
THEIRS = ("load", "fuse", "unfuse", "unload")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class WrongFold(Exception):
    """A folded weight is not what diffusers makes of it."""


class Scene:
    """One adapter: the base's weights, the adapter and its overlay in one arena, diffusers over the first."""

    def __init__(self, unet: nn.Module, rank: int, folder: Path) -> None:
        component = Component("unet", unet)
        self.signature = component.signature
        self.file = write_lora(unet, rank, folder / f"rank-{rank}.safetensors")
        self.blob = folder / f"rank-{rank}.blob"
        self.adapter = ingest_lora(self.file, self.signature, self.blob)
        (self.plan,) = plan_overlays({"unet": self.signature}, [AppliedAdapter(self.adapter, 1.0)])
        base_bytes, adapter_bytes = self.signature.size_bytes, self.adapter.blob.size_bytes
        memory = torch.zeros(base_bytes + adapter_bytes + self.plan.size_bytes, dtype=torch.uint8)
        self.arena = WeightArena(memory)
        self._adapter_bytes = memory[base_bytes : base_bytes + adapter_bytes].numpy()
        self._fold_memory = ArenaFoldMemory(self.arena, 0, [base_bytes], base_bytes + adapter_bytes)
        for record in self.signature.tensors:
            parameter = unet.get_parameter(record.path)
            view = self.arena.tensor(record, 0)
            view.copy_(parameter.data)
            parameter.data = view
        self.pipeline: Any = tiny.stable_diffusion(0)
        self.pipeline.register_modules(unet=unet)

    def read(self) -> None:
        """What a loader does."""
        fd = os.open(self.blob, os.O_RDONLY)
        try:
            size = os.preadv(fd, [self._adapter_bytes], self.adapter.blob.data_start_bytes)
        finally:
            os.close(fd)
        if size != self.adapter.blob.size_bytes:
            raise OSError(f"{self.blob} is shorter than it was")

    def fold(self) -> None:
        """All steps."""
        for _ in fold_steps(self.plan, self._fold_memory):
            pass

    def load(self) -> None:
        self.pipeline.load_lora_weights(str(self.file), adapter_name="lora")

    def fuse(self) -> None:
        self.pipeline.fuse_lora(["unet"], adapter_names=["lora"])

    def unfuse(self) -> None:
        self.pipeline.unfuse_lora(["unet"])

    def unload(self) -> None:
        self.pipeline.unload_lora_weights()

    # -- what is checked -----------------------------------------------------------------------------

    def targets(self) -> dict[str, Tensor]:
        """The base's weights that are changed."""
        return {w.base.path: self._fold_memory.base(w.base) for w in self.plan.weights}

    def compare(self) -> None:
        """The base's memory holds fused weights now: they must be the overlay's."""
        for weight in self.plan.weights:
            if not torch.equal(self._fold_memory.base(weight.base), self._fold_memory.folded(weight.folded)):
                raise WrongFold(f"{weight.base.path} differs from diffusers' fused weight")

    def checksums(self) -> dict[str, int]:
        return checksums((record, self.arena.tensor(record, 0)) for record in self.signature.tensors)


def random_unet(narrow: bool, dtype: torch.dtype) -> nn.Module:
    """The architecture with cheap random weights: pieces of one block that are shifted against each other."""
    with torch.device("meta"):
        unet = sd15(narrow=narrow).builders["unet"]().to(dtype)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    longest = max(parameter.numel() for parameter in unet.parameters())
    block = 0.02 * torch.randn(longest + SHIFT * sum(1 for _ in unet.parameters()))
    for number, parameter in enumerate(unet.parameters()):
        parameter.copy_(block[number * SHIFT :][: parameter.numel()].reshape(parameter.shape))
    return unet


def write_lora(unet: nn.Module, rank: int, path: Path) -> Path:
    """Random factors for every attention projection, under diffusers' names."""
    torch.manual_seed(rank)
    state: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS):
            wide_out, wide_in = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = 0.05 * torch.randn(rank, wide_in)
            state[f"unet.{name}.lora_B.weight"] = 0.05 * torch.randn(wide_out, rank)
    save_file({key: tensor.half() for key, tensor in state.items()}, path, metadata={"format": "pt"})
    return path


def ingest_lora(
    file: Path, unet: SignatureRecord, blob: Path, family: type[Any] = StableDiffusionLoraLoaderMixin
) -> AdapterRecord:
    """As ingest makes it for the UNet of a pipeline of this family, its factors in `blob`."""
    base = Base(family, {"unet": unet}, ("base",))
    targets, record = write_targets(blob, convert(file, base))
    return AdapterRecord(
        name=file.stem,
        family=base.family.__name__,
        bases=base.records,
        base_model="base",
        targets=targets,
        blob=record,
        content=content_id(targets, record),
    )


def measure(scene: Scene, rounds: int) -> dict[str, float | int]:
    """Medians over the rounds."""
    pristine = scene.checksums()
    kept = {path: weight.clone() for path, weight in scene.targets().items()}
    times: dict[str, list[float]] = {}
    cpu_times: dict[str, list[float]] = {}
    drift = drift_there = 0

    def take(key: str, action: Callable[[], None]) -> None:
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        action()
        times.setdefault(key, []).append((time.perf_counter() - started_s) * 1e3)
        cpu_times.setdefault(key, []).append((time.process_time() - cpu_started_s) * 1e3)

    scene.read()
    scene.fold()  # first touch of the overlay's pages: a running arena's were touched long ago
    for _ in range(rounds):
        take("read", scene.read)
        take("fold", scene.fold)
        drift = max(drift, _differences(pristine, scene.checksums()))
        with quiet_libraries():
            take("load", scene.load)
            take("fuse", scene.fuse)
            scene.compare()
            take("unfuse", scene.unfuse)
            take("unload", scene.unload)
        drift_there = max(drift_there, _differences(pristine, scene.checksums()))
        for path, weight in scene.targets().items():
            weight.copy_(kept[path])
    medians = {key: statistics.median(values) for key, values in times.items()}
    cpu_medians = {key: statistics.median(values) for key, values in cpu_times.items()}
    theirs, theirs_cpu = (sum(m[key] for key in THEIRS) for m in (medians, cpu_medians))
    return {
        "targets": len(scene.plan.weights),
        "overlay_bytes": scene.plan.size_bytes,
        "adapter_bytes": scene.adapter.blob.size_bytes,
        "read_ms": medians["read"],
        "fold_ms": medians["fold"],
        "diffusers_load_fuse_unfuse_ms": theirs,
        "diffusers_load_ms": medians["load"],
        "diffusers_fuse_ms": medians["fuse"],
        "diffusers_unfuse_ms": medians["unfuse"],
        "ratio_cold": theirs / (medians["read"] + medians["fold"]),
        "fold_cpu_ms": cpu_medians["fold"],
        "diffusers_cpu_ms": theirs_cpu,
        "ratio_cold_cpu": theirs_cpu / (cpu_medians["read"] + cpu_medians["fold"]),
        "drift_tensors": drift,
        "diffusers_drift_tensors": drift_there,
    }


def make_adapters(architecture: Architecture, folder: Path) -> list[tuple[AdapterRecord, Path]]:
    """One of each rank for the architecture's UNet, and where its factors are."""
    family = loader_family(architecture.pipeline_class)
    assert family is not None
    with torch.device("meta"):
        unet = architecture.builders["unet"]()
    made = []
    for rank in RANKS:
        file = write_lora(unet, rank, folder / f"rank_{rank}.safetensors")
        blob = folder / f"rank_{rank}.blob"
        made.append((ingest_lora(file, architecture.signatures["unet"], blob, family), blob))
    return made


def changes_on_stage(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Both adapters over one model on a stage; see `benchmarks.lora_stage`."""
    plain = sd15(narrow=options.quick, sample_size=LATENT_SIDE)
    architecture = dataclasses.replace(plain, dtype=DTYPES[options.dtype])
    adapters = make_adapters(architecture, folder)
    theatre = LoraTheatre(architecture, adapters, folder, threads=options.threads)
    try:
        return measure_stage(theatre, *((10, 1) if options.quick else (100, 3)))
    finally:
        theatre.stage.close()


def _differences(one: dict[str, int], other: dict[str, int]) -> int:
    return sum(one[path] != other[path] for path in one)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="narrow channels and one round, for tests")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="the base's (fp32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's (all cores)")
    parser.add_argument("--rounds", type=int, default=None, help="per rank (5; 1 when quick)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (1 if options.quick else 5)
    found: dict[str, dict[str, float | int]] = {}
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            with timed(f"rank {rank}: the scene"):
                scene = Scene(random_unet(options.quick, DTYPES[options.dtype]), rank, Path(folder))
            with timed(f"rank {rank}: {rounds} rounds"):
                found[f"sd15_rank_{rank}"] = measure(scene, rounds)
            del scene
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), timed("changes on the stage"):
        on_stage = changes_on_stage(options, Path(folder))
    for figures in found.values():
        figures["visible_switch_ms_p50"] = on_stage["visible_switch_ms_p50"]
        figures["ratio_hot"] = figures["diffusers_load_fuse_unfuse_ms"] / on_stage["visible_switch_ms_p50"]
    say(f"Stable Diffusion 1.5, {options.dtype}, {options.threads} threads")
    keys = list(next(iter(found.values())))
    rows = [[key, *(f"{figures[key]:,.5g}" for figures in found.values())] for key in keys]
    show_table("LoRA", ["", *found], rows)
    show_table("On the stage", ["", "ms"], [[key, f"{value:,.5g}"] for key, value in on_stage.items()])
    if options.json:
        json_line(found | {"sd15_on_stage": on_stage})


if __name__ == "__main__":
    main()
