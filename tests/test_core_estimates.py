"""What takes how long is learned from what took place, is not upset by outliers, and outlives the machine."""

import json
import random

import pytest

from understudyd.core.estimates import Estimates, Level
from understudyd.core.remembered import DamagedDocument

MB = 1_000_000


def loads(estimates: Estimates, *, from_pool: bool, rate: float, fixed_s: float, count: int = 30) -> None:
    dice = random.Random(7)
    for _ in range(count):
        size_bytes = dice.choice([167, 246, 1719]) * MB
        noise = dice.uniform(0.95, 1.05)
        seconds = (fixed_s + size_bytes / rate) * noise
        estimates.loaded(size_bytes, seconds, from_pool=from_pool, had_company=False)


def test_the_first_load_replaces_the_guess() -> None:
    estimates = Estimates()
    estimates.loaded(100 * MB, 2.0, from_pool=False, had_company=False)
    assert estimates.load_s(200 * MB, from_pool=False) == pytest.approx(4.0)


def test_routes_are_told_apart_and_fixed_costs_from_rates() -> None:
    estimates = Estimates()
    loads(estimates, from_pool=False, rate=500e6, fixed_s=0.2)
    loads(estimates, from_pool=True, rate=20e9, fixed_s=0.002)
    assert estimates.load_s(1000 * MB, from_pool=False) == pytest.approx(2.2, rel=0.1)
    assert estimates.load_s(1000 * MB, from_pool=True) == pytest.approx(0.052, rel=0.1)


def test_two_wild_loads_in_ten_change_little() -> None:
    estimates = Estimates()
    loads(estimates, from_pool=False, rate=500e6, fixed_s=0.0)
    for _ in range(2):
        estimates.loaded(1719 * MB, 600.0, from_pool=False, had_company=False)
    assert estimates.load_s(1719 * MB, from_pool=False) == pytest.approx(3.4, rel=0.3)


def test_slower_hardware_is_believed_within_ten_loads() -> None:
    estimates = Estimates()
    loads(estimates, from_pool=False, rate=5e9, fixed_s=0.0)
    loads(estimates, from_pool=False, rate=100e6, fixed_s=0.0, count=10)
    assert estimates.load_s(1000 * MB, from_pool=False) == pytest.approx(10.0, rel=0.1)


def test_company_counts_once_it_was_seen() -> None:
    estimates = Estimates()
    loads(estimates, from_pool=False, rate=500e6, fixed_s=0.0)
    alone_s = estimates.load_s(1000 * MB, from_pool=False)
    assert estimates.load_s(1000 * MB, from_pool=False, has_company=True) == alone_s
    estimates.loaded(1000 * MB, 4.0, from_pool=False, had_company=True)
    assert estimates.load_s(1000 * MB, from_pool=False, has_company=True) == pytest.approx(4.0)
    assert estimates.load_s(1000 * MB, from_pool=False) == alone_s


def test_runs_go_by_model_and_by_cost() -> None:
    estimates = Estimates()
    for _ in range(20):
        estimates.ran("fast", 30.0, 1.0)
        estimates.ran("slow", 60.0, 12.0)
    assert estimates.run_s("fast", 60.0) == pytest.approx(2.0)
    assert estimates.run_s("slow", 30.0) == pytest.approx(6.0)
    assert 1.0 < estimates.run_s("unknown", 30.0) < 6.0
    estimates.forget("slow")
    assert estimates.run_s("slow", 30.0) == estimates.run_s("unknown", 30.0)


def test_one_outlier_moves_a_level_by_a_tenth_at_most() -> None:
    level = Level(1.0)
    for _ in range(100):
        level.saw(2.0)
    level.saw(1e6)
    assert level.value == pytest.approx(2.0, rel=0.1)


def test_waits_are_as_late_as_they_lately_were() -> None:
    estimates = Estimates()
    for _ in range(50):
        estimates.waited(10.0, 15.0)
        estimates.waited(0.01, 15.0)
    assert estimates.wait_s(100.0) == pytest.approx(150.0, rel=0.01)
    assert estimates.wait_s(0.5) == 0.5


def test_another_life_expects_the_same() -> None:
    old, new = Estimates(), Estimates()
    loads(old, from_pool=False, rate=500e6, fixed_s=0.2)
    old.ran("a", 30.0, 1.0)
    old.ran("gone", 30.0, 1.0)
    old.viewed(0.003)
    old.prepared(0.3)
    old.folded(400 * MB, 0.12)
    new.restore(json.loads(json.dumps(old.document(), allow_nan=False)), {"a"})
    assert new.load_s(77 * MB, from_pool=False) == pytest.approx(old.load_s(77 * MB, from_pool=False))
    assert new.run_s("a", 10.0) == pytest.approx(old.run_s("a", 10.0), rel=1e-4)
    assert new.views_s == pytest.approx(old.views_s, rel=1e-4)
    assert new.prepare_s == pytest.approx(old.prepare_s, rel=1e-4)
    assert new.fold_s(100 * MB) == pytest.approx(0.03, rel=1e-4)
    assert "gone" not in new.document()["runs"]


def test_what_was_written_before_there_were_folds_is_believed() -> None:
    document = Estimates().document()
    del document["fold"]
    Estimates().restore(document, set())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 99), ("loads", []), ("loads", [[[1, -1.0]], [], [], []]), ("views", [1.0]), ("run", None),
        ("preparing", [float("nan"), 1]), ("fold", []), ("runs", []), ("runs", {"a": [1e9, 1]}),
    ],
)  # fmt: skip
def test_what_is_damaged_changes_nothing(key: str, value: object) -> None:
    estimates = Estimates()
    document = estimates.document()
    with pytest.raises(DamagedDocument):
        estimates.restore(document | {key: value}, {"a"})
    assert estimates.document() == document
