"""A folded weight equals the one that diffusers' `load_lora_weights` and `fuse_lora` make, bit for bit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_kit as kit
from adapter_kit import Making
from fold_kit import base_tensors, fold, fused, tensors
from ingest_kit import single_threaded
from understudy_demo import tiny
from understudyd.store.adapters.files import AdapterFile
from understudyd.store.adapters.ingest import AdapterOptions, add_adapter
from understudyd.store.ingest import DType, ingest
from understudyd.store.records import ModelRecord
from understudyd.store.store import Store
from zoo import diffusion_transformers, unets

DTYPES: Mapping[DType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
BUILDERS: Mapping[str, Callable[[int], Any]] = {
    "sd": unets.stable_diffusion,
    "sdxl": unets.stable_diffusion_xl,
    "sd3": diffusion_transformers.stable_diffusion_3,
    "flux": diffusion_transformers.flux,
}


@dataclass(frozen=True)
class Written:
    """One adapter of a case: what it changes, in which format, at which scale."""

    making: Making
    scale: float = 1.0
    write: Callable[[kit.MadeAdapter, Path], Path] = kit.write_diffusers


@dataclass(frozen=True)
class Case:
    """A base and what is folded into it."""

    name: str
    base: str
    adapters: Sequence[Written] = field(default_factory=tuple)


def kohya(*alphas: float) -> Callable[[kit.MadeAdapter, Path], Path]:
    return lambda made, path: kit.write_kohya(made, path, alphas=alphas)


def flux_alphas(dtype: torch.dtype) -> Callable[[kit.MadeAdapter, Path], Path]:
    return lambda made, path: kit.write_with_alphas(made, path, alpha=3.3, dtype=dtype)


UNET = {"unet": kit.UNET_LAYERS}
ATTENTION = {"unet": kit.UNET_LAYERS[:4]}
CONV = {"unet": kit.CONV_LAYERS}
TEXT = {"text_encoder": kit.TEXT_LAYERS}
XL_TEXT = {"text_encoder": kit.TEXT_LAYERS, "text_encoder_2": kit.TEXT_LAYERS}
FLUX = {"transformer": kit.FLUX_LAYERS}
RANKS = {"rank_pattern": {"to_q": 2, "proj_in": 3, "fc1": 2}}
PATTERNS = {"rank_pattern": {"to_q": 2, "proj_in": 3}, "alpha_pattern": {"to_k": 5, "to_q": 3}}

CASES = [
    Case("one", "sd", [Written(Making(UNET))]),
    Case("bare", "sd", [Written(Making(UNET, rank=3), 0.7, kit.write_diffusers_bare)]),
    Case("two", "sd", [Written(Making(UNET), 0.8), Written(Making(CONV, rank=5, alpha=3, seed=2), -0.35)]),
    Case("text", "sd", [Written(Making(UNET | TEXT, alpha=3), 0.6)]),
    Case("text-only", "sd", [Written(Making(TEXT, rank=2, alpha=1), 1.3)]),
    Case("conv", "sd", [Written(Making(CONV, rank=6, alpha=5), 0.9)]),
    Case("patterns", "sd", [Written(Making(CONV, settings=PATTERNS), 0.77)]),
    Case("rank-stabilised", "sd", [Written(Making(UNET, rank=3, settings={"use_rslora": True}), 0.77)]),
    Case("kohya", "sd", [Written(Making(CONV | TEXT), 0.8, kohya(2.0))]),
    Case("kohya-alphas", "sd", [Written(Making(CONV | TEXT), 0.8, kohya(1.0, 2.0, 4.5))]),
    Case("kohya-ranks", "sd", [Written(Making(CONV | TEXT, settings=RANKS), 0.8, kohya(1.0, 2.0, 5.0))]),
    Case("bare-ranks", "sd", [Written(Making(CONV, settings=RANKS), 0.8, kit.write_diffusers_bare)]),
    Case("half-file", "sd", [Written(Making(CONV | TEXT, dtype=torch.float16), 0.8, kohya(1.0, 3.0))]),
    Case("old", "sd", [Written(Making(ATTENTION), 0.5, kit.write_attn_processors_prefixed)]),
    Case("xl", "sdxl", [Written(Making(CONV | XL_TEXT, alpha=3), 0.6)]),
    Case("xl-kohya", "sdxl", [Written(Making(CONV | XL_TEXT), 0.6, kohya(1.0, 2.0))]),
    Case("xl-civitai", "sdxl", [Written(Making(CONV), 0.6, kit.write_civitai_xl)]),
    Case("xl-two", "sdxl", [Written(Making(CONV), 0.6),
                            Written(Making(UNET | XL_TEXT, rank=2, seed=3), 1.1)]),
    Case("sd3", "sd3", [Written(Making({"transformer": kit.FLUX_LAYERS} | XL_TEXT, alpha=3), 0.6)]),
    Case("flux", "flux", [Written(Making(FLUX | TEXT, alpha=3), 0.6),
                          Written(Making(FLUX, rank=2, seed=3), 0.4)]),
    Case("flux-alphas", "flux", [Written(Making(FLUX), 0.7, flux_alphas(torch.float32))]),
    Case("flux-half-alphas", "flux", [Written(Making(FLUX), 0.7, flux_alphas(torch.bfloat16))]),
    Case("flux-kohya", "flux", [Written(Making({}), 0.7, lambda made, path: kit.write_flux_kohya(path))]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@dataclass
class Bases:
    """Tiny models, saved once, and a store that has each in each dtype."""

    root: Path
    store: Store
    saved: dict[str, tuple[Any, Path]] = field(default_factory=dict)
    models: dict[str, ModelRecord] = field(default_factory=dict)

    def pipeline(self, name: str) -> tuple[Any, Path]:
        if name not in self.saved:
            made = BUILDERS[name](0)
            self.saved[name] = (made, tiny.save(made, self.root / name))
        return self.saved[name]

    def model(self, name: str, dtype: DType) -> ModelRecord:
        key = f"{name}-{dtype}"
        if key not in self.models:
            self.models[key] = ingest(self.store, key, self.pipeline(name)[1], dtype=dtype)
        return self.models[key]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    root = tmp_path_factory.mktemp("bases")
    return Bases(root, Store.open(root / "store", writable=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_weight_equals_the_fused_pipelines(
    case: Case, dtype: DType, bases: Bases, tmp_path: Path
) -> None:
    pipeline, folder = bases.pipeline(case.base)
    model = bases.model(case.base, dtype)
    applied, files = [], []
    for number, written in enumerate(case.adapters):
        name = f"{case.name}-{dtype}-{number}"
        path = written.write(kit.make_adapter(pipeline, written.making), tmp_path / f"{name}.safetensors")
        add_adapter(bases.store, AdapterFile(path, name, str(path), 0), AdapterOptions(base=model.name))
        applied.append((name, written.scale))
        files.append((path, written.scale))

    expected = fused(folder, DTYPES[dtype], files)
    plain = base_tensors(bases.store, model)
    changed = set()
    for folded in fold(bases.store, model, applied):
        component = folded.plan.component
        assert folded.is_base_untouched
        wanted = tensors(getattr(expected, component))
        assert wanted.keys() <= folded.bound.keys()
        for path, tensor in wanted.items():
            assert folded.bound[path].dtype == tensor.dtype
            assert torch.equal(folded.bound[path], tensor), f"{component}.{path}"
        differs = {p for p, t in wanted.items() if not torch.equal(plain[component][p], t)}
        assert {weight.base.path for weight in folded.plan.weights} == differs
        changed.add(component)
    assert changed >= {name for written in case.adapters for name in written.making.layers} and changed
