"""Compiled blocks serve every fine-tune, overlay and size of a signature; nothing is compiled on the stage."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapter_kit import Making
from overlay_kit import CONV, UNET, AdaptedFamily, OverlayRig
from stage_kit import pixels
from understudy_demo import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compilers have many of their own

SIZES = [(32, 32), (48, 32)]
ADAPTERS = [(("style", 1.0),), (("shape", 0.9), ("style", 0.5))]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdaptedFamily:
    family = AdaptedFamily(tmp_path_factory.mktemp("family"))
    for i, name in enumerate("abc", 1):
        family.add(name, tiny.stable_diffusion(i))
    family.add("half", tiny.stable_diffusion(1), "fp16")
    family.adapt("a", "style", Making(UNET))
    family.adapt("a", "shape", Making(CONV, rank=5, alpha=3, seed=2))
    return family


def all_served(rig: OverlayRig) -> list[str]:
    rig.serve("a", "b", "c")
    return ["a", "b", *(rig.serve_derived("a", adapters) for adapters in ADAPTERS), "c"]


def test_one_compilation_serves_a_family(family: AdaptedFamily) -> None:
    """Three fine-tunes, two overlays, sizes, batches and schedulers, there and back; then another dtype."""
    plain, rig = OverlayRig(family), OverlayRig(family, compile_backend="eager")
    try:
        models = all_served(plain)
        assert all_served(rig) == models
        rig.run("a")
        rig.stage.wait_compiled()
        first = rig.stage.compile_report()
        assert first is not None and first.graphs > 0 and not first.failures and first.recompiles == 0, first
        made: dict[Any, list[bytes]] = {}
        for model in [*models, *reversed(models)]:
            for width, height in SIZES:
                for more in ({}, {"images": 2}, {"guidance": 1.0}, {"scheduler": "EulerDiscreteScheduler"}):
                    asked = {"width": width, "height": height, **more}
                    key = (model, *asked.items())
                    images = pixels(rig.run(model, **asked))
                    if key not in made:
                        made[key] = images
                        assert images == pixels(plain.run(model, **asked)), key
                    assert images == made[key], "served again it is the same, bit for bit"
        rig.stage.wait_compiled()
        assert rig.stage.compile_report() == first
    finally:
        plain.close()
        rig.close()
