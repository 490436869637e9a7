"""The GPU check's comparison: what it makes of the figures, and when it does not begin."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare_scene import Plan
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.runner import Skip
from benchmarks.gpu.sections import ON_DEMAND, SECTIONS, compare
from benchmarks.gpu.sections.compare import IN_SHORT, compare_in_short


def test_it_runs_when_it_is_named_only() -> None:
    assert [section.name for section in ON_DEMAND] == ["compare"]
    assert "compare" not in {section.name for section in SECTIONS}


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_image_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    plans: list[Plan] = []

    def measure(plan: Plan, folder: Path, programs: Any) -> dict[str, Any]:
        plans.append(plan)
        assert programs is None
        return {"wrong_images": wrong, "throughput_ratio": 1.5}

    monkeypatch.setitem(compare.__globals__, "measure", measure)
    found = compare(Bench("cpu", "tiny", tmp_path))
    assert found["checks"] == {"images_equal": wrong == 0}
    assert found["targets"] == {"faster_than_all_others": True}
    assert (plans[0].device, plans[0].size) == ("cpu", "tiny")


def test_without_room_on_disk_it_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare.__globals__, "_MODEL_BYTES", 1e15)
    with pytest.raises(Skip, match="choose a --work"):
        compare(Bench("cpu", "real", tmp_path))


def test_in_short_it_still_has_twenty_models_and_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Plan, Any]] = []

    def measure(plan: Plan, folder: Path, programs: Any) -> dict[str, Any]:
        seen.append((plan, programs))
        return {"wrong_images": 0, "throughput_ratio": 0.9}

    monkeypatch.setitem(compare.__globals__, "measure", measure)
    monkeypatch.setitem(compare.__globals__, "_MODEL_BYTES", 0.0)
    found = compare_in_short(Bench("cpu", "real", tmp_path))
    assert found["targets"] == {"faster_than_all_others": False} and found["checks"]["images_equal"]
    ((plan, programs),) = seen
    assert (
        plan.models >= 20
        and plan.size == "real"
        and plan.requests < Plan.of("cpu", "real", quick=False).requests
    )
    assert programs == IN_SHORT and "per_switch" in programs, "what images are compared with"
    assert not list(tmp_path.iterdir()), "the models are gone"
