"""Adapters of every linear and convolution layer, of many kinds of pipelines, folded as diffusers does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_kit as kit
from adapter_kit import Making
from fold_kit import fold, fused, tensors
from ingest_kit import single_threaded
from understudyd.store.adapters.bases import loader_family
from understudyd.store.adapters.files import find_adapters
from understudyd.store.adapters.ingest import add_adapter
from understudyd.store.ingest import ingest
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.store import Store
from zoo.kinds import KINDS, Kind

SERVED = (
    "sd2", "lcm", "sd-inpaint", "controlnet", "sdxl", "sdxl-refiner", "sd3", "flux", "chroma", "lumina2",
    "z-image", "qwen-image", "sana", "auraflow", "animatediff", "wan-half", "ltx", "cogvideox",
)  # fmt: skip
TEXT_LAYERS = ("q_proj", "fc1", "fc2")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


def every_layer(pipeline: Any) -> dict[str, list[str]]:
    """What can be folded, by component; of text encoders what diffusers loads."""
    layers = {}
    for name in type(pipeline)._lora_loadable_modules:
        component = getattr(pipeline, name, None) or torch.nn.Identity()
        paths = [
            path
            for path, module in component.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and getattr(module, "groups", 1) == 1
        ]
        if name.startswith("text_encoder"):
            paths = [path for path in paths if path.endswith(TEXT_LAYERS)]
        if paths:
            layers[name] = paths
    return layers


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in SERVED], ids=lambda kind: kind.name)
def test_every_layer_of_every_kind_is_folded_as_diffusers_fuses_it(kind: Kind, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", writable=True)
    with quiet_libraries():
        pipeline = kind.build(0)
        folder = kind.save(0, tmp_path / "saved")
        made = kit.make_adapter(pipeline, Making(every_layer(pipeline), rank=2, alpha=3))
    model = ingest(store, "model", folder, dtype=kind.ingested_as)
    path = kit.write_diffusers(made, tmp_path / "lora.safetensors")
    (file,) = find_adapters(path)
    record = add_adapter(store, file)
    assert len(record.targets) * 2 == len(made.state())

    expected = fused(folder, kind.reference_dtype, [(path, 0.7)])
    for folded in fold(store, model, [("lora", 0.7)]):
        wanted = tensors(getattr(expected, folded.plan.component))
        unequal = [key for key, tensor in wanted.items() if not torch.equal(folded.bound[key], tensor)]
        assert wanted and not unequal
        assert all(folded.bound[key].dtype == tensor.dtype for key, tensor in wanted.items())


def test_pipelines_without_loras_are_known() -> None:
    assert loader_family("DiTPipeline") is None
    assert loader_family("NoSuchPipeline") is None
