"""LoRA files for one of the family's models, as diffusers saves them, and what diffusers makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import adapter_kit as kit
from adapter_kit import Making
from fold_kit import fused
from understudy_demo import tiny
from understudyd.store.adapters.files import AdapterFile
from understudyd.store.adapters.ingest import AdapterOptions, add_adapter
from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.store import Store

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 2, "width": 32, "height": 32, "guidance": 5.0}
REFERENCE = {"num_inference_steps": 2, "width": 32, "height": 32, "guidance_scale": 5.0}
Applied = Sequence[tuple[str, float]]


class Loras:
    """LoRA files for the family's `sd-c`, in a folder, and what diffusers makes of them."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base
        pipeline = tiny.stable_diffusion(3)
        unet, conv = {"unet": kit.UNET_LAYERS}, {"unet": kit.CONV_LAYERS, "text_encoder": kit.TEXT_LAYERS}
        self.write("plain", kit.make_adapter(pipeline, Making(unet, seed=1)))
        self.write("whole", kit.make_adapter(pipeline, Making(conv, seed=2, rank=2)))
        made = kit.make_adapter(pipeline, Making(unet, seed=3))
        kit.write_kohya(made, folder / "kohya.safetensors", alphas=[3.0])

    def write(self, name: str, made: kit.MadeAdapter) -> Path:
        return kit.write_diffusers(made, self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def write_dora(self) -> Path:
        """One that is no plain LoRA."""
        made = kit.make_adapter(tiny.stable_diffusion(3), Making({"unet": kit.UNET_LAYERS}, seed=4))
        return kit.write(self.folder / "dora.safetensors", made.state() | {"x.dora_scale": torch.ones(1)})

    def add(self, store: Path, name: str) -> AdapterRecord:
        """Add a file to a store that nobody serves, or that is scanned again afterwards."""
        path = self._path(name)
        file = AdapterFile(path, path.stem, str(path), path.stat().st_size)
        options = AdapterOptions(base="sd-c", replace=True)
        return add_adapter(Store.open(store, writable=True), file, options)

    def image(self, adapters: Applied, seed: int = 7) -> bytes:
        """By load_lora_weights, set_adapters and fuse_lora."""
        (made,) = self.images(self.fused(adapters), seed, width=32, height=32)
        return made

    def fused(self, adapters: Applied) -> Any:
        """diffusers' own pipeline with the adapters in it."""
        return fused(self.base, torch.float32, [(self._path(name), scale) for name, scale in adapters])

    def images(self, pipeline: Any, seed: int = 7, steps: int = 2, **call: Any) -> list[bytes]:
        """What this pipeline makes of the tests' prompt."""
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        made = pipeline(PROMPT, generator=generator, num_inference_steps=steps, guidance_scale=5.0, **call)
        return [bytes(image.convert("RGB").tobytes()) for image in made.images]
