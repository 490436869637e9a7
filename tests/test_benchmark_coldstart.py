"""The cold start benchmark, narrow: its keys and its sums."""

import json

import pytest
from benchmarks import coldstart

from understudy.trace import START_UP, Span

SPANS = {
    name: Span(START_UP, name, start_s, end_s)
    for name, start_s, end_s in [
        ("loaders", 1.0, 2.5),
        ("arena", 1.5, 2.25),
        ("import", 1.0, 5.0),
        ("stage", 6.0, 6.5),
        ("weights", 3.0, 4.0),
        ("warm-up", 7.0, 9.0),
    ]
}


def test_its_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    coldstart.main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {
        "import_s",
        "device_s",
        "weights_s",
        "warmup_s",
        "first_image_s",
        "overlapped_s",
    }
    assert 0 < found["weights_s"] < found["import_s"] < found["first_image_s"]
    assert 0 < found["overlapped_s"] < found["import_s"], "beside the import"


def test_the_phases_are_what_the_daemon_s_cover() -> None:
    phases = coldstart.phases_of(SPANS)
    assert phases == {"import_s": 4.5, "device_s": 1.5, "weights_s": 1.0, "warmup_s": 2.0}
    with pytest.raises(KeyError, match="warm-up"):
        coldstart.phases_of({name: span for name, span in SPANS.items() if name != "warm-up"})
