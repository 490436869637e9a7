"""What the LoRA benchmark works on: a UNet, an adapter and its overlay, and diffusers over the same UNet."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.real_size import Architecture, checksums
from understudy_demo import tiny
from understudyd.core.events import FoldFinished
from understudyd.stage.device import CpuDevice
from understudyd.stage.fold_crew import FoldCrew
from understudyd.stage.fold_job import FoldJob
from understudyd.stage.views import WeightArena
from understudyd.store.adapters.bases import Base, loader_family
from understudyd.store.adapters.conversion import convert
from understudyd.store.adapters.ingest import write_targets
from understudyd.store.adapters.overlays import AppliedAdapter, plan_overlays
from understudyd.store.adapters.records import AdapterRecord, content_id
from understudyd.store.records import SignatureRecord, TensorRecord
from understudyd.store.signature import Component

RANKS = (16, 64)
SHIFT = 997
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
PIPELINES: dict[str, Callable[[int], Any]] = {
    "StableDiffusionPipeline": tiny.stable_diffusion,
    "StableDiffusionXLPipeline": tiny.stable_diffusion_xl,
}


class WrongFold(Exception):
    """A folded weight is not what diffusers makes of it."""


class Scene:
    """One adapter: the base's weights, the adapter and its overlay in one arena, diffusers over the first.

    `close` ends its threads.
    """

    def __init__(self, architecture: Architecture, rank: int, folder: Path, threads: int = 1) -> None:
        unet = random_unet(architecture)
        self.signature = Component("unet", unet).signature
        self.file = write_lora(unet, rank, folder / f"rank-{rank}.safetensors")
        self.blob = folder / f"rank-{rank}.blob"
        self.adapter = ingest_lora(self.file, self.signature, self.blob, family_of(architecture))
        (self.plan,) = plan_overlays({"unet": self.signature}, [AppliedAdapter(self.adapter, 1.0)])
        base_bytes, adapter_bytes = self.signature.size_bytes, self.adapter.blob.size_bytes
        self._overlay_offset = base_bytes + adapter_bytes
        memory = torch.zeros(self._overlay_offset + self.plan.size_bytes, dtype=torch.uint8)
        self.arena = WeightArena(memory)
        self._adapter_bytes = memory[base_bytes : self._overlay_offset].numpy()
        self._sources = [("base", 0), (self.adapter.blob.sha256, base_bytes)]
        for record in self.signature.tensors:
            parameter = unet.get_parameter(record.path)
            view = self.arena.tensor(record, 0)
            view.copy_(parameter.data)
            parameter.data = view
        self.pipeline: Any = PIPELINES[architecture.pipeline_class](0)
        self.pipeline.register_modules(unet=unet)
        self._crew = FoldCrew(threads, helpers=threads - 1)
        self._folding = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        self._folding.shutdown()
        self._crew.close()

    # -- Understudy ----------------------------------------------------------------------------------

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
        """What the stage's folding thread does while nothing runs."""
        job = FoldJob("overlay", 1, self._overlay_offset, self.plan, self._sources)
        outcome = self._folding.submit(job.run, self.arena, CpuDevice(), lambda: None, self._crew).result()
        if outcome != FoldFinished("overlay", 1):
            raise WrongFold(str(outcome))

    # -- diffusers -----------------------------------------------------------------------------------

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
        return {w.base.path: self.arena.tensor(w.base, 0) for w in self.plan.weights}

    def compare(self) -> None:
        """The base's memory holds fused weights now: they must be the overlay's."""
        for weight in self.plan.weights:
            if not torch.equal(self.arena.tensor(weight.base, 0), self.folded(weight.folded)):
                raise WrongFold(f"{weight.base.path} differs from diffusers' fused weight")

    def folded(self, record: TensorRecord) -> Tensor:
        """A tensor of the overlay."""
        return self.arena.tensor(record, self._overlay_offset)

    def checksums(self) -> dict[str, int]:
        return checksums((record, self.arena.tensor(record, 0)) for record in self.signature.tensors)


def family_of(architecture: Architecture) -> type[Any]:
    """Whose conversion reads its adapters."""
    family: type[Any] | None = loader_family(architecture.pipeline_class)
    assert family is not None
    return family


def random_unet(architecture: Architecture) -> nn.Module:
    """The UNet with cheap random weights: pieces of one block that are shifted against each other."""
    with torch.device("meta"):
        unet = architecture.builders["unet"]().to(architecture.dtype)
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


def ingest_lora(file: Path, unet: SignatureRecord, blob: Path, family: type[Any]) -> AdapterRecord:
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


def make_adapters(architecture: Architecture, folder: Path) -> list[tuple[AdapterRecord, Path]]:
    """One of each rank for the architecture's UNet, and where its factors are."""
    with torch.device("meta"):
        unet = architecture.builders["unet"]()
    made = []
    for rank in RANKS:
        file = write_lora(unet, rank, folder / f"rank_{rank}.safetensors")
        blob = folder / f"rank_{rank}.blob"
        made.append((ingest_lora(file, architecture.signatures["unet"], blob, family_of(architecture)), blob))
    return made
