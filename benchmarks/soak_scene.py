"""What `benchmarks.soak` plays: models and adapters, some of which come and go, and the right images.

torch is imported where it is used, so that the rest can be read and tested without it.
"""

import copy
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.kit import timed
from benchmarks.lora_serve_scene import Family, LoraPlan, fuse, make_family, stock
from benchmarks.soak_client import PROMPT, SIDE_PX, STEPS, STRENGTH, Wish
from understudy.wire import Adapter

PLAN = LoraPlan(models=6, bases=2, resident=2, rank=8, widths=(32, 64))
GUEST, GUEST_LORA, GUEST_BASE = "guest", "lora-003", "base-1"
HALF = "xl"
SEEDS = (1, 2)
COMBINATIONS = {
    "base-0": [(("lora-000", 0.8),), (("lora-000", 0.8), ("lora-002", 0.5)), (("lora-002", 1.0),)],
    "base-1": [(("lora-001", 1.0),), ((GUEST_LORA, 0.7),)],
}
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Scene:
    """A store, what clients ask for, and what comes and goes: two editions of one model, and an adapter.

    `model_bytes` is the largest model's size, `whole_bytes` that of all models.
    """

    store: Path
    wishes: list[Wish]
    guests: tuple[Path, Path]
    guest_lora: Path
    model_bytes: int
    whole_bytes: int


def set_scene(folder: Path) -> Scene:
    """Make everything, ingest what stays, paint the right images."""
    import torch

    from understudy_demo import baseline
    from understudyd.store.store import Store

    torch.set_num_threads(1)
    baseline.quiet()
    with timed("models and adapters"):
        family = make_family(PLAN, folder / "family")
        others = _others(folder / "family")
    guests = others.pop("guest-0"), others.pop("guest-1")
    staying = {name: made for name, made in family.loras.items() if name != GUEST_LORA}
    with timed("ingest"):
        stock(PLAN, folder / "store", Family(dict(family.bases) | others, staying))
    with timed("reference images by diffusers"), warnings.catch_warnings(action="ignore"):
        wishes = list(_wishes(family, others, guests))
    store = Store.open(folder / "store", writable=False)
    blobs = [
        {c.blob.sha256: c.blob.size_bytes for c in store.model(name).components} for name in store.names()
    ]
    return Scene(
        store=store.path,
        wishes=wishes,
        guests=guests,
        guest_lora=family.loras[GUEST_LORA][1],
        model_bytes=max(map(_pages, blobs)),
        whole_bytes=_pages({key: size for each in blobs for key, size in each.items()}),
    )


def _pages(blobs: Mapping[str, int]) -> int:
    return sum(-(-size // _PAGE_BYTES) * _PAGE_BYTES for size in blobs.values())


def _others(folder: Path) -> dict[str, Path]:
    """One that shares its VAE only, one whose VAE upcasts itself, two editions of one that comes and goes."""
    import torch

    from understudy_demo import tiny

    made = {
        "own": tiny.stable_diffusion(3),
        HALF: tiny.stable_diffusion_xl(5).to(torch.float16),
        "guest-0": tiny.stable_diffusion(4),
        "guest-1": tiny.stable_diffusion(5),
    }
    return {name: tiny.save(pipeline, folder / name) for name, pipeline in made.items()}


def _wishes(family: Family, others: Mapping[str, Path], guests: tuple[Path, Path]) -> Iterator[Wish]:
    for name, path in {**family.bases, **others}.items():
        pipeline = _pipeline(path, is_half=name == HALF)
        for seed in SEEDS:
            yield Wish(model=name, seed=seed, right=(_painted(pipeline, seed),))
        image = _gradient()
        yield Wish(model=name, seed=3, image=image, right=(_painted(pipeline, 3, image),))
        plain = pipeline.unet
        for adapters in COMBINATIONS.get(name, []):
            pipeline.unet = copy.deepcopy(plain)  # what diffusers unfuses drifts
            fuse(pipeline, [Adapter(*each) for each in adapters], family)
            right = (_painted(pipeline, 1),)
            is_guest = any(adapter == GUEST_LORA for adapter, _ in adapters)
            yield Wish(model=name, seed=1, adapters=adapters, right=right, guest=is_guest)
    editions = [_pipeline(path) for path in guests]
    for seed in SEEDS:
        right = tuple(_painted(pipeline, seed) for pipeline in editions)
        yield Wish(model=GUEST, seed=seed, right=right, guest=True)


def _pipeline(folder: Path, *, is_half: bool = False) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    dtype = torch.float16 if is_half else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _painted(pipeline: Any, seed: int, image: bytes | None = None) -> str:
    """The hash of an image's raw pixels, by plain diffusers; from another image if there is one."""
    import torch
    from diffusers import AutoPipelineForImage2Image
    from PIL import Image

    fields: dict[str, Any] = {"width": SIDE_PX, "height": SIDE_PX}
    if image is not None:
        pipeline = AutoPipelineForImage2Image.from_pipe(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        fields = {"image": Image.open(io.BytesIO(image)), "strength": STRENGTH}
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipeline(prompt=PROMPT, num_inference_steps=STEPS, generator=generator, **fields).images[0]
    return sha256(made.convert("RGB").tobytes()).hexdigest()


def _gradient() -> bytes:
    """A PNG file."""
    from PIL import Image

    grey = Image.linear_gradient("L").resize((SIDE_PX, SIDE_PX))
    file = io.BytesIO()
    Image.merge("RGB", [grey, grey.rotate(90), grey]).save(file, "PNG")
    return file.getvalue()
