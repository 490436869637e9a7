"""Tens of thousands of hostile frames at a real daemon, beside a client that gets every answer."""

from pathlib import Path

import pytest
from benchmarks.fuzz import Figures, measure
from benchmarks.hostile import Hostile

from family_kit import Family

FRAMES = 40_000


@pytest.mark.timeout(600)
def test_a_client_is_served_beside_hostile_frames(family: Family, tmp_path: Path) -> None:
    figures = measure(family.store, tmp_path, FRAMES, model="sd-a", steps=2, quiet_requests=30)
    assert figures.frames >= FRAMES
    assert figures.answered_right == figures.requests > 0
    # The bounds of `make fuzz`, with room for what else the machine does.
    assert figures.p99_ms < max(4 * figures.quiet_p99_ms, figures.quiet_p99_ms + 1000.0), figures
    assert figures.memory_growth_mb < 80.0, figures


def test_the_same_seed_is_the_same_hostility_and_every_kind_comes() -> None:
    one, two = Hostile(7), Hostile(7)
    messages = [one.message() for _ in range(2000)]
    assert messages == [two.message() for _ in range(2000)] and one.frames == sum(map(len, messages))
    assert max(map(len, messages)) > 10 and any(frame.startswith(b"\x89PNG") for m in messages for frame in m)


def test_what_does_not_hold() -> None:
    good = Figures(
        frames=1, messages=1, frames_per_s=1.0, requests=10, answered_right=10, quiet_p50_ms=1.0,
        quiet_p99_ms=1.0, p50_ms=1.0, p99_ms=1.0, p99_ratio=1.9, memory_growth_mb=49.0,
    )  # fmt: skip
    assert good.holds()
    for change in ({"answered_right": 9}, {"p99_ratio": 2.1}, {"memory_growth_mb": 51.0}, {"requests": 0}):
        assert not Figures(**vars(good) | change).holds()
