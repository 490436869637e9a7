"""The LoRA benchmark works at all, and fails when a folded weight is another than the fused one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import lora
from benchmarks.lora_scene import Scene, WrongFold
from benchmarks.real_size import Architecture, sd15, sdxl

from ingest_kit import single_threaded

NARROW = replace(sd15(narrow=True, sample_size=16), dtype=torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@pytest.mark.parametrize("architecture", [NARROW, sdxl(narrow=True)])
def test_figures_of_one_round(tmp_path: Path, architecture: Architecture) -> None:
    scene = Scene(architecture, 4, tmp_path, threads=2)
    with torch.no_grad():
        found = lora.measure(scene, 1)
    scene.close()
    json.dumps(found)
    assert (
        found["targets"]
        == found["diffusers_drift_tensors"]
        == (560 if "XL" in architecture.pipeline_class else 128)
    )
    assert found["drift_tensors"] == 0
    assert found["ratio_cold_cpu"] > 1


def test_changes_on_the_stage(tmp_path: Path) -> None:
    with torch.no_grad():
        found = lora.changes_on_stage(NARROW, 1, tmp_path, switches=10, calls=1)
    json.dumps(found)
    assert 0 < found["visible_switch_ms_p50"] < found["stage_fold_ms_rank_16"]
    assert found["step_ms"] > 0 and found["fold_beside_step_ms"] > 0
    figures = {"read_ms": 1.0, "fold_ms": 2.0, "diffusers_load_fuse_unfuse_ms": 1000.0}
    both = lora.with_stage(figures, found, 64)
    assert both["cold_ms"] > 3
    assert both["ratio_cold"] < 1000 / 3 < both["ratio_hot"] * found["visible_switch_ms_p50"]


def test_a_wrong_fold_is_noticed(tmp_path: Path) -> None:
    scene = Scene(NARROW, 4, tmp_path)
    scene.read()
    scene.fold()
    with pytest.raises(WrongFold):
        scene.compare()  # the base was not fused
    scene.close()
