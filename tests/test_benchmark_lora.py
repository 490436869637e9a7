"""The LoRA benchmark works at all, and fails when a folded weight is another than the fused one."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import lora
from benchmarks.real_size import sd15


@pytest.fixture
def scene(tmp_path: Path) -> lora.Scene:
    unet = sd15(narrow=True).builders["unet"]()
    return lora.Scene(unet.eval().requires_grad_(False), 4, tmp_path)


def test_figures_of_one_round(scene: lora.Scene) -> None:
    with torch.no_grad():
        found = lora.measure(scene, 1)
    json.dumps(found)
    assert found["targets"] == 128
    assert (found["drift_tensors"], found["diffusers_drift_tensors"]) == (0, 128)
    assert found["ratio_cold"] > 1


def test_a_wrong_fold_is_noticed(scene: lora.Scene) -> None:
    scene.read()
    scene.fold()
    with pytest.raises(lora.WrongFold):
        scene.compare()  # the base was not fused
