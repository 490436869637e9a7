"""Models with adapters on a stage, as core and loaders would bring them there, and the same by diffusers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapter_kit as lora
from adapter_kit import Making
from fold_kit import fused
from stage_kit import ALIGN_BYTES, Family, Rig
from understudy_demo import tiny
from understudyd.core.events import FoldFinished, ModelPrepared, ViewsBuilt
from understudyd.store.adapters.files import AdapterFile
from understudyd.store.adapters.ingest import AdapterOptions, add_adapter
from understudyd.store.adapters.overlays import AppliedAdapter, OverlaidComponent, OverlayPlan, plan_overlays
from understudyd.store.adapters.shelf import AdapterShelf

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

UNET = {"unet": lora.UNET_LAYERS}
CONV = {"unet": lora.CONV_LAYERS}
TEXT = {"text_encoder": lora.TEXT_LAYERS}
XL_TEXT = {"text_encoder": lora.TEXT_LAYERS, "text_encoder_2": lora.TEXT_LAYERS}
TRANSFORMER = {"transformer": lora.FLUX_LAYERS}

Applied = Sequence[tuple[str, float]]
"""Adapters' names and scales, in order."""

Write = Callable[[lora.MadeAdapter, Path], Path]


class AdaptedFamily(Family):
    """A family whose models have adapters."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shelf = AdapterShelf(self.store)
        self._files: dict[str, Path] = {}
        self._pipelines: dict[str, Any] = {}

    def add(self, name: str, pipeline: Any, dtype: str = "fp32") -> str:
        self._pipelines[name] = pipeline
        return super().add(name, pipeline, dtype)

    def adapt(self, base: str, name: str, making: Making, write: Write = lora.write_diffusers) -> str:
        """Make a LoRA file for a model and add it."""
        path = self.sources / f"{name}.safetensors"
        write(lora.make_adapter(self._pipelines[base], making), path)
        add_adapter(self.store, AdapterFile(path, name, str(path), 0), AdapterOptions(base=base))
        self._files[name] = path
        return name

    def fused(self, base: str, adapters: Applied) -> Any:
        """diffusers' own pipeline with the adapters fused into it."""
        files = [(self._files[name], scale) for name, scale in adapters]
        pipeline = _aligned(fused(self.sources / base, DTYPES[self._dtypes[base]], files))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _plain(self, name: str) -> Any:
        return _aligned(super()._plain(name))

    def plans(self, base: str, adapters: Applied) -> tuple[OverlayPlan, ...]:
        record = self.store.model(base)
        signatures = {c.name: self.store.signature(c.signature) for c in record.components}
        applied = [AppliedAdapter(self.shelf.adapter(name), scale) for name, scale in adapters]
        return plan_overlays(signatures, applied)


def adapted_stable_diffusion(folder: Path) -> AdaptedFamily:
    """The model "sd", and three adapters: "style", "shape" and, of the text encoder, too, "words"."""
    family = AdaptedFamily(folder)
    family.add("sd", tiny.stable_diffusion(1))
    family.adapt("sd", "style", Making(UNET))
    family.adapt("sd", "shape", Making(CONV, rank=5, alpha=3, seed=2))
    family.adapt("sd", "words", Making(UNET | TEXT, alpha=3, seed=3))
    return family


def _aligned(pipeline: Any) -> Any:
    """Weights where kernels find them aligned, as in the arena: else some sum in another order."""
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module._apply(torch.clone)
    return pipeline


@dataclass(frozen=True)
class Derived:
    """A derived model as the shell tells the stage of it."""

    key: str
    base: str
    overlays: Mapping[str, OverlaidComponent]


class OverlayRig(Rig):
    """A rig that folds. Overlays are put where they are told, or behind everything else."""

    def __init__(
        self, family: AdaptedFamily, arena_bytes: int = 64 << 20, compile_backend: Any = None
    ) -> None:
        super().__init__(family.store, arena_bytes, compile_backend)
        self.family = family
        self._generations = 1

    def derive(self, base: str, adapters: Applied) -> Derived:
        blobs = {c.name: c.blob.sha256 for c in self.store.model(base).components}
        overlays = {
            plan.component: OverlaidComponent(plan.key(blobs[plan.component]), plan, blobs[plan.component])
            for plan in self.family.plans(base, adapters)
        }
        key = "+".join([base, *(f"{name}@{scale!r}" for name, scale in adapters)])
        return Derived(key, base, overlays)

    def serve_derived(self, base: str, adapters: Applied) -> str:
        """Everything from nothing: base, adapters, folds, views. Returns the derived model's key."""
        derived = self.derive(base, adapters)
        self.serve(base)
        self.prepare(derived)
        for overlay in derived.overlays.values():
            if overlay.key not in self.offsets:
                self.fold(overlay)
        return derived.key

    def prepare(self, derived: Derived) -> None:
        already = self._times_prepared(derived.key)
        self.stage.prepare_derived(derived.key, derived.base, derived.overlays)
        self.wait_until(lambda: self._times_prepared(derived.key) > already, f"{derived.key} prepared")

    def _times_prepared(self, key: str) -> int:
        return sum(isinstance(event, ModelPrepared) and event.key == key for event in self.events)

    def fold(self, overlay: OverlaidComponent, offset: int | None = None) -> int:
        """Fold and build views; returns the generation."""
        generation = self.start_fold(overlay, offset)
        self.wait_for(FoldFinished(overlay.key, generation))
        self.stage.build_views(overlay.key, self.offsets[overlay.key], generation)
        self.wait_for(ViewsBuilt(overlay.key, generation))
        return generation

    def start_fold(self, overlay: OverlaidComponent, offset: int | None = None) -> int:
        sources = self.sources(overlay)
        self._generations += 1
        self.offsets[overlay.key] = self.take(overlay.plan.size_bytes) if offset is None else offset
        self.stage.fold(overlay.key, self._generations, self.offsets[overlay.key], overlay.plan, sources)
        return self._generations

    def sources(self, overlay: OverlaidComponent) -> list[tuple[str, int]]:
        """The extents that a fold reads; adapters that are not in the arena are put there."""
        blobs = [applied.record.blob for applied in overlay.plan.adapters]
        for blob in blobs:
            if blob.sha256 not in self.offsets:
                self.offsets[blob.sha256] = self.fill(blob)
        keys = dict.fromkeys(blob.sha256 for blob in blobs)
        return [(key, self.offsets[key]) for key in (overlay.base_blob, *keys)]

    def take(self, size_bytes: int) -> int:
        """The next free place."""
        offset = self._free_at
        self._free_at += -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
        assert self._free_at <= self.arena.numel()
        return offset

    def extent(self, blob: str, size_bytes: int) -> Tensor:
        offset = self.offsets[blob]
        return self.arena[offset : offset + size_bytes]
