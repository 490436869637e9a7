"""The LoRA benchmark works at all, and fails when a folded weight is another than the fused one."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import lora


@pytest.fixture
def scene(tmp_path: Path) -> lora.Scene:
    return lora.Scene(lora.random_unet(True, torch.float16), 4, tmp_path)


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
