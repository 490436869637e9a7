"""The hand-over benchmark, narrow: its keys, its daemon under fire, and a leak count that can see a leak."""

import json

import pytest
from benchmarks import handover
from benchmarks.calm import leaked


def test_its_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    handover.main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [
        "load_gbps",
        "raw_gbps",
        "ratio_raw",
        "host_tier_gbps",
        "respawn_ms",
        "failed_requests",
        "leaked_bytes",
    ]
    assert found["ratio_raw"] == pytest.approx(found["load_gbps"] / found["raw_gbps"], rel=0.01)
    assert 0 < found["respawn_ms"] < 1000
    assert found["failed_requests"] == found["leaked_bytes"] == 0


def test_what_is_neither_free_nor_at_rest_has_leaked() -> None:
    pool = {"size_bytes": 50, "free_bytes": 30, "ready_bytes": 20}
    before = {"arena": {"free_bytes": 100}, "host_pool": pool}
    assert leaked(before, before) == 0
    assert leaked(before, {"arena": {"free_bytes": 93}, "host_pool": pool}) == 7
    assert leaked(before, {"arena": {"free_bytes": 100}, "host_pool": pool | {"ready_bytes": 15}}) == 5
