"""A hundred changes of adapters leave the base as it was; a compiled component is not compiled again."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from overlay_kit import AdaptedFamily, OverlayRig, adapted_stable_diffusion
from stage_kit import pixels
from understudy_demo import tiny

CHANGES = 100
COMBINATIONS = [
    (("style", 1.0),),
    (("shape", -0.35),),
    (("words", 0.6),),
    (("style", 0.5), ("words", 1.0)),
    (("words", 1.0), ("style", 0.5)),
    (("shape", 0.9), ("style", 0.8), ("words", 0.3)),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdaptedFamily:
    family = adapted_stable_diffusion(tmp_path_factory.mktemp("family"))
    family.add("half", tiny.stable_diffusion(1), "fp16")
    return family


@pytest.fixture
def rig(family: AdaptedFamily) -> Iterator[OverlayRig]:
    rig = OverlayRig(family)
    yield rig
    rig.close()


@pytest.mark.parametrize("base", ["sd", "half"])
def test_a_hundred_changes_leave_no_trace(rig: OverlayRig, family: AdaptedFamily, base: str) -> None:
    """Overlays come and go over two places for each component, folded anew or still there."""
    rig.serve(base)
    blobs = {c.name: c.blob for c in rig.store.model(base).components}
    before = {name: rig.extent(blob.sha256, blob.size_bytes).clone() for name, blob in blobs.items()}
    plain = pixels(rig.run(base))
    assert plain == family.plain_images(base)
    derived = [rig.derive(base, adapters) for adapters in COMBINATIONS]
    for model in derived:
        rig.prepare(model)
    rooms = {
        name: [rig.take(max(sizes)) for _ in range(2)]
        for name, sizes in {
            name: [d.overlays[name].plan.size_bytes for d in derived if name in d.overlays]
            for name in ("text_encoder", "unet")
        }.items()
    }
    chance = random.Random(1)
    lying: dict[int, tuple[str, int]] = {}  # by place: overlay and generation
    images: dict[str, list[bytes]] = {}
    for _ in range(CHANGES):
        model = chance.choice(derived)
        for name, overlay in model.overlays.items():
            if overlay.key not in [key for key, _ in lying.values()]:
                place = chance.choice(rooms[name])
                if place in lying:
                    rig.stage.drop_views(*lying[place])
                lying[place] = (overlay.key, rig.fold(overlay, place))
        made = pixels(rig.run(model.key, steps=1))
        assert images.setdefault(model.key, made) == made
    different = {frozenset(adapters) for adapters in COMBINATIONS}  # of the order only the rounding depends
    assert len({tuple(made) for made in images.values()}) >= len(different)
    assert pixels(rig.run(base)) == plain
    assert rig.stage.strays() == []
    for name, blob in blobs.items():
        assert torch.equal(rig.extent(blob.sha256, blob.size_bytes), before[name]), name


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_component_serves_every_overlay(rig: OverlayRig) -> None:
    models = ["sd", rig.serve_derived("sd", COMBINATIONS[0]), rig.serve_derived("sd", COMBINATIONS[5])]
    skeleton = rig.skeleton("UNet2DConditionModel")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(skeleton.module, backend=counter, dynamic=False)
    sample, words = torch.randn(1, 4, 4, 4), torch.randn(1, 8, skeleton.module.config.cross_attention_dim)

    def compute(module: Any, model: str) -> torch.Tensor:
        for part in rig.stage._repertoire.find(model).components:
            part.bind(rig.stage._resident)
        return module(sample, torch.tensor(3), words).sample

    with torch.no_grad():
        compute(compiled, "sd")
        graphs = counter.frame_count
        assert graphs > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            for model in [*models, *reversed(models)]:
                assert torch.equal(compute(compiled, model), compute(skeleton.module, model))
    assert counter.frame_count == graphs
    torch._dynamo.reset()
