"""Adapters through three daemons, small; every image is compared with diffusers' fused pipeline."""

import json
from pathlib import Path

import pytest
from benchmarks import lora_serve, serve
from benchmarks.lora_serve_scene import LoraPlan
from benchmarks.serve_client import Ask

from understudy_demo.workload import Request

PLAN = LoraPlan(
    models=8, bases=2, resident=2, requests=24, clients=2, outstanding=2, rounds=2, rank=4, widths=(32, 64)
)


def test_a_combination_is_asked_for_as_a_base_and_adapters() -> None:
    def asked(model: str) -> Ask:
        return serve.ask(Request(3, 0, model, "a prompt", 7, 1, 8, 8, 0.0))

    assert asked("base-1+lora-004@0.8").adapters == (("lora-004", 0.8),)
    assert asked("base-1+lora-004@0.8").model == asked("base-1").model == "base-1"
    assert asked("base-1").adapters == ()


@pytest.mark.timeout(300)
def test_the_benchmark_from_end_to_end(tmp_path: Path) -> None:
    scene, runs = lora_serve.benchmark(PLAN, tmp_path)
    assert len(set(scene.references.values())) == len(scene.references), "no two images are alike"
    found = lora_serve.summary(PLAN, runs)
    assert json.dumps(found)
    assert (found["completed"], found["lost"], found["wrong_image"]) == (24, 0, 0)
    assert (found["adapters"], found["bases"]) == (6, 2)
    ours, resident, demand = (runs[name] for name in (serve.OURS, serve.ALL_RESIDENT, serve.ON_DEMAND))
    assert resident.folds == 0, "all were folded beforehand"
    assert ours.folds > 0 and demand.folds > 0, "there is not room for all"
    assert ours.fold_ms is not None and ours.fold_ms > 0
    assert ours.figures.requests == 24, "every image has its span on stage"
