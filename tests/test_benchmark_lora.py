"""The LoRA benchmark works at all, and fails when a folded weight is another than the fused one."""

import argparse
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


def test_changes_on_the_stage(tmp_path: Path) -> None:
    options = argparse.Namespace(quick=True, dtype="fp32", threads=1)
    with torch.no_grad():
        found = lora.changes_on_stage(options, tmp_path)
    json.dumps(found)
    assert 0 < found["visible_switch_ms_p50"] < found["stage_fold_ms_rank_16"]
    assert found["step_ms"] > 0 and found["fold_beside_step_ms"] > 0


def test_a_wrong_fold_is_noticed(scene: lora.Scene) -> None:
    scene.read()
    scene.fold()
    with pytest.raises(lora.WrongFold):
        scene.compare()  # the base was not fused
