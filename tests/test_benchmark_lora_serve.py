"""Adapters through three daemons, small; every image is compared with diffusers' fused pipeline."""

import json
from pathlib import Path

import pytest
from benchmarks import lora_serve, serve
from benchmarks.lora_serve_scene import LoraPlan
from benchmarks.serve_client import Ask

from understudy_demo.workload import Request

PLAN = LoraPlan(
    models=8, bases=2, resident=2, requests=12, clients=2, outstanding=2, rounds=2, rank=4, widths=(32, 64)
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
    assert len(runs[serve.OURS].round_throughputs_per_s) == 1, "the second round is ours alone"
    assert (found["completed"], found["lost"], found["wrong_image"]) == (12, 0, 0)
    assert (found["adapters"], found["bases"]) == (6, 2)
    ours, resident, demand = (runs[name] for name in (serve.OURS, serve.ALL_RESIDENT, serve.ON_DEMAND))
    assert resident.folds == 0, "all were folded beforehand"
    assert ours.folds > 0 and demand.folds > 0, "there is not room for all"
    assert ours.fold_ms is not None and ours.fold_ms > 0
    assert ours.figures.requests == 12, "every image has its span on stage"


def test_a_disturbed_round_does_not_spoil_the_median() -> None:
    def run(*throughputs: float) -> serve.Run:
        return serve.Run(
            completed=0, lost=0, wrong=0, figures=None, throughput_per_s=0.0,  # type: ignore[arg-type]
            round_throughputs_per_s=throughputs, load_ms=None,
        )  # fmt: skip

    runs = {
        serve.OURS: run(9.0, 1.0, 9.0, 5.0),
        serve.ALL_RESIDENT: run(10.0, 10.0, 10.0, 4.0),
        serve.ON_DEMAND: run(5.0, 5.0, 5.0, 5.0),
    }
    assert lora_serve.median_gap_closed(runs) == pytest.approx(0.8)
    assert lora_serve.median_gap_closed({name: run() for name in runs}) is None
