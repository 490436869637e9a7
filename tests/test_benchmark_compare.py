"""The comparison, small: everybody's figures and equal images; keepers that hold what they should."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import compare
from benchmarks.baselines import names
from benchmarks.baselines.keepers import KEEPERS, BackgroundThread, Lru, Means, PerSwitch
from benchmarks.compare_scene import Plan
from benchmarks.compare_work import Answers, Painted, Spent

FIGURES = list(compare.Figures.__dataclass_fields__)
WEIGHTS_BYTES = 4 * (8 * 8 + 8)


class Disk:
    """Counts what is read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def load(self, model: str) -> Any:
        self.read.append(model)
        return SimpleNamespace(components={"unet": torch.nn.Linear(8, 8), "tokenizer": object()}, name=model)

    def means(self, pipelines: int) -> Means:
        return Means(folders={}, budget_bytes=pipelines * WEIGHTS_BYTES, device="cpu", load=self.load)


@pytest.fixture
def disk() -> Disk:
    return Disk()


def bring(keeper: Any, wanted: str) -> None:
    for number, model in enumerate(wanted):
        assert keeper.bring(model, wanted[number + 1 :]).name == model


def test_at_every_switch_one_pipeline_is_read(disk: Disk) -> None:
    bring(PerSwitch(disk.means(9)), "aabab")
    assert "".join(disk.read) == "abab"


def test_an_lru_holds_what_the_budget_holds(disk: Disk) -> None:
    bring(Lru(disk.means(2)), "abacab")
    assert "".join(disk.read) == "abcb", "c drives b out, not a"


def test_a_thread_reads_the_next_one_that_is_wanted(disk: Disk) -> None:
    keeper = BackgroundThread(disk.means(3))
    keeper.bring("a", ["a", "b", "c"])
    keeper.bring("b", ["c"])
    keeper.bring("c", [])
    assert "".join(disk.read) == "abc", "each once, though b and c came from the thread"


def test_two_loads_never_overlap(disk: Disk) -> None:
    """`from_pretrained` cannot bear it."""
    loading, is_thread_loading, may_thread_end = [0], threading.Event(), threading.Event()

    def load(model: str) -> Any:
        loading[0] += 1
        assert loading[0] == 1, "two at once"
        if model == "b":
            is_thread_loading.set()
            assert may_thread_end.wait(60.0)
        loading[0] -= 1
        return disk.load(model)

    keeper = BackgroundThread(replace(disk.means(3), load=load))
    keeper.bring("a", ["b"])
    assert is_thread_loading.wait(60.0)
    with ThreadPoolExecutor(1) as stage:
        bringing = stage.submit(keeper.bring, "c", [])
        wait([bringing], timeout=0.2)  # were it let, it would load now
        may_thread_end.set()
        assert bringing.result(60.0).name == "c"
    assert sorted(disk.read) == ["a", "b", "c"]


@pytest.mark.parametrize("make", [Lru, BackgroundThread])
def test_one_that_is_larger_than_the_budget_is_served_too(disk: Disk, make: Callable[[Means], Any]) -> None:
    bring(make(replace(disk.means(1), budget_bytes=1)), "aba")
    assert disk.read[0] == "a"


def test_offloading_means_something_on_a_gpu_only() -> None:
    assert "cpu_offload" not in names("cpu")
    assert set(names("cuda")) == set(KEEPERS)


def painted(index: int, model: str, arrived_s: float, started_s: float, ended_s: float) -> Painted:
    return Painted(
        index=index, model=model, arrived_s=arrived_s, started_s=started_s, ended_s=ended_s, sha256=f"{index}"
    )


def test_a_switch_is_what_nothing_was_painted_for() -> None:
    answers = Answers(
        painted=(
            painted(0, "a", 0.0, 1.0, 2.0),
            painted(1, "a", 0.0, 2.0, 3.0),
            painted(2, "b", 0.0, 3.5, 4.5),
            painted(3, "a", 5.0, 5.25, 7.25),
        ),
        loads=(Spent(name="b", started_s=5.0, ended_s=9.0),),
        memory_bytes=1,
    )
    found = compare.figures(answers)
    assert found.switch_ms_p50 == pytest.approx(500), (
        "1.0, 0.5 and 0.25 s: nobody wanted anything from 4.5 on"
    )
    assert found.switch_ms_p99 == pytest.approx(1000)
    assert found.images_per_s == pytest.approx(4 / 7.25)
    assert found.step_inflation == pytest.approx(2.0)


def test_another_image_is_noticed() -> None:
    one = Answers(painted=(painted(0, "a", 0.0, 0.0, 1.0),), loads=(), memory_bytes=1)
    other = Answers(painted=(painted(0, "a", 0.0, 0.0, 1.0),), loads=(), memory_bytes=1)
    assert compare.wrong_images({"per_switch": one, "lru": other}) == 0
    bent = Answers(
        painted=tuple(Painted(**{name: getattr(p, name) for name in p.__struct_fields__} | {"sha256": "x"})
                      for p in other.painted),
        loads=(), memory_bytes=1,
    )  # fmt: skip
    assert compare.wrong_images({"per_switch": one, "lru": bent}) == 1


@pytest.mark.timeout(600)
def test_the_comparison_from_end_to_end(tmp_path: Path) -> None:
    plan = replace(Plan.of("cpu", "tiny", quick=True), models=4, requests=8, steps=1)
    found = compare.measure(plan, tmp_path)
    assert json.dumps(found)
    assert (found["requests"], found["wrong_images"]) == (8, 0)
    for name in (*names("cpu"), compare.OURS):
        assert list(found[name]) == FIGURES
        assert found[name]["images_per_s"] > 0 and found[name]["memory_mb"] > 0
        assert found[name]["loads"] > 0
