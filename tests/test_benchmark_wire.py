"""The wire benchmark, short: its keys, and that nothing is refused while the front end is kept busy."""

import json

import pytest
from benchmarks import wire

OVERHEAD = [
    "p50_ms",
    "p99_ms",
    "raw_p50_ms",
    "raw_p99_ms",
    "requests_per_s",
    "image_1mb_p50_ms",
    "blocking_client_p50_ms",
]


@pytest.mark.timeout(600)
def test_its_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    wire.main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [*OVERHEAD, "tcp", "interference"]
    assert list(found["tcp"]) == OVERHEAD
    for block in (found, found["tcp"]):
        assert 0 < block["raw_p50_ms"] < block["p50_ms"] <= block["p99_ms"]
        assert block["image_1mb_p50_ms"] > block["p50_ms"]
    disturbed = found["interference"]
    assert disturbed["refused"] == 0
    assert disturbed["models_loaded"] == 1
    assert disturbed["requests_per_s"] > 0
    assert disturbed["step_p50_ms"] > 0 and disturbed["ping_p50_ms"] > 0
