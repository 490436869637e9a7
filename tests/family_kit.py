"""A small family of models in a store, and what plain diffusers makes of them."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """`folders` are diffusers folders by model name; `dtypes` what each was ingested in."""

    store: Path
    folders: dict[str, Path]
    dtypes: dict[str, str]

    def reference(self, model: str, **arguments: Any) -> list[bytes]:
        """Raw RGB bytes of the images that a `from_pretrained` pipeline gives; painted once for all tests."""
        return list(_painted(self.folders[model], self.dtypes[model], **arguments))


def pixels(png: bytes) -> bytes:
    """Raw RGB bytes of an encoded image."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return bytes(image.convert("RGB").tobytes())


def distance(images: list[bytes], others: list[bytes]) -> int:
    """The largest difference of two bytes at the same place."""
    assert [len(image) for image in images] == [len(other) for other in others]
    return max(abs(x - y) for image, other in zip(images, others) for x, y in zip(image, other))


@functools.cache
def _painted(folder: Path, dtype: str, *, seed: int, images: int = 1, **arguments: Any) -> tuple[bytes, ...]:
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    result = _pretrained(folder, dtype)(generator=generator, num_images_per_prompt=images, **arguments)
    return tuple(image.convert("RGB").tobytes() for image in result.images)


@functools.lru_cache(maxsize=8)
def _pretrained(folder: Path, dtype: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    kinds = {"fp32": torch.float32, "fp16": torch.float16}
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=kinds[dtype], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_family(folder: Path) -> Family:
    """Three Stable Diffusion fine-tunes that share a VAE, one in fp16, two SDXL whose VAE upcasts."""
    import torch

    from understudy_demo import tiny
    from understudyd.store.ingest import ingest_many
    from understudyd.store.store import Store

    made = {
        "sd-a": (tiny.stable_diffusion(1, own_text_encoder=False), "fp32"),
        "sd-b": (tiny.stable_diffusion(2, own_text_encoder=False), "fp32"),
        "sd-c": (tiny.stable_diffusion(3), "fp32"),
        "sd-half": (tiny.stable_diffusion(4).to(torch.float16), "fp16"),
        "xl": (tiny.stable_diffusion_xl(5).to(torch.float16), "fp16"),
        "xl-b": (tiny.stable_diffusion_xl(6).to(torch.float16), "fp16"),
    }
    folders = {name: tiny.save(pipeline, folder / name) for name, (pipeline, _) in made.items()}
    store = Store.open(folder / "store", writable=True)
    ingest_many(store, list(folders.items()))
    return Family(store.path, folders, {name: dtype for name, (_, dtype) in made.items()})
