"""The arithmetic behind the demo's table and the benchmark's line."""

import io
import json

import pytest
from benchmarks.kit import json_line

from understudy.trace import Span, fetch, lane
from understudy_demo.measure import (
    Served,
    figures,
    gap_closed,
    percentile,
    switch_share,
    turns,
    visible_switches_s,
)


def served(index: int, model: str, sent_s: float, ended_s: float, tier: str = "disk") -> Served:
    return Served(index, model, tier, sent_s, ended_s)


def stage(*pieces: tuple[str, float, float]) -> list[Span]:
    return [Span("stage", name, start_s, end_s) for name, start_s, end_s in pieces]


def test_percentile_is_the_nearest_rank() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([4, 1, 3, 2], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert percentile(range(1, 101), 100) == 100


def test_switch_share_counts_neighbours() -> None:
    assert switch_share([]) == switch_share(["a"]) == 0
    assert switch_share(["a", "a", "b", "a"]) == pytest.approx(2 / 3)


def test_gap_closed_is_the_share_of_the_way() -> None:
    assert gap_closed(9.0, 10.0, 5.0) == pytest.approx(0.8)
    assert gap_closed(5.0, 10.0, 5.0) == 0
    assert gap_closed(4.0, 10.0, 5.0) < 0
    with pytest.raises(ValueError, match="not faster than on demand"):
        gap_closed(5.0, 5.0, 5.0)


def test_a_turn_waits_from_the_end_of_the_last_while_work_is_there() -> None:
    asked = [served(0, "a", 0.0, 2.1), served(1, "b", 0.5, 3.1), served(2, "b", 0.6, 4.1)]
    taken = turns(asked, stage(("a", 1.0, 2.0), ("b", 2.25, 3.0), ("b", 3.0, 4.0)))
    assert [t.served.index for t in taken] == [0, 1, 2]
    assert [t.waited_s for t in taken] == pytest.approx([1.0, 0.25, 0.0])
    assert [t.switched for t in taken] == [True, True, False]
    assert visible_switches_s(taken) == pytest.approx([1.0, 0.25])
    assert visible_switches_s(taken, "resident") == []


def test_a_stage_without_work_does_not_wait() -> None:
    asked = [served(0, "a", 0.0, 1.1), served(1, "b", 5.0, 6.4)]
    taken = turns(asked, stage(("a", 0.0, 1.0), ("b", 5.4, 6.4)))
    assert [t.waited_s for t in taken] == pytest.approx([0.0, 0.4]), "it waited since 5.0, not since 1.0"


def test_a_stage_waits_for_any_work_not_only_for_the_next() -> None:
    """`c` came late and ran first; `b` had been waiting all the time."""
    asked = [served(0, "a", 0.0, 1.0), served(1, "b", 0.1, 4.0), served(2, "c", 1.9, 3.0)]
    taken = turns(asked, stage(("a", 0.0, 1.0), ("c", 2.0, 3.0), ("b", 3.0, 4.0)))
    assert taken[1].served.model == "c" and taken[1].waited_s == pytest.approx(1.0)


def test_spans_of_others_are_left_out() -> None:
    warm_up = ("a", -9.0, -8.0)
    taken = turns([served(0, "a", 0.0, 1.0)], stage(warm_up, ("a", 0.1, 1.0), ("z", 1.0, 2.0)))
    assert len(taken) == 1 and taken[0].span.start_s == 0.1


def test_figures_of_a_run() -> None:
    asked = [served(0, "a", 0.0, 1.0), served(1, "b", 0.0, 2.0), served(2, "a", 0.0, 4.0)]
    run = figures(turns(asked, stage(("a", 0.0, 1.0), ("b", 1.5, 2.5), ("a", 2.5, 4.0))))
    assert (run.requests, run.models, run.switches, run.switch_share) == (3, 2, 2, 1.0)
    assert run.throughput_per_s == pytest.approx(3 / 4)
    assert run.idle_while_waiting_percent == pytest.approx(100 * 0.5 / 3.5)
    assert run.switch_ms_p50 == 0 and run.switch_ms_p99 == pytest.approx(500)
    with pytest.raises(ValueError, match="no request was served"):
        figures([])


def test_trace_becomes_spans_in_lanes() -> None:
    document = {
        "now_s": 3.0,
        "spans": [
            {"lane": "stage", "name": "b", "start_s": 2, "end_s": 3},
            {"lane": "loader 0", "name": "b unet", "start_s": 1.0, "end_s": 2.0},
            {"lane": "stage", "name": "a", "start_s": 1, "end_s": 2},
        ],
    }
    assert [span.name for span in lane(fetch(lambda _: document, 60.0).spans, "stage")] == ["a", "b"]


def test_the_last_line_is_one_json_object() -> None:
    out = io.StringIO()
    json_line({"p50": 0.123456, "none": None, "deep": {"n": 3}}, out)
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue()) == {"p50": 0.1235, "none": None, "deep": {"n": 3}}
