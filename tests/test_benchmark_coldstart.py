"""The cold start benchmark, narrow: its keys and its sums."""

import json

import pytest
from benchmarks import coldstart

SPANS = {"loaders": 0.5, "arena": 1.0, "import": 4.0, "weights": 2.0, "warm-up": 3.0}


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
    assert found["overlapped_s"] < found["weights_s"], "nothing but the weights can come beside other work"


def test_the_phases_are_sums_of_the_daemon_s() -> None:
    phases = coldstart.phases_of(SPANS)
    assert phases == {"import_s": 4.0, "device_s": 1.5, "weights_s": 2.0, "warmup_s": 3.0}
    with pytest.raises(KeyError, match="warm-up"):
        coldstart.phases_of({name: length for name, length in SPANS.items() if name != "warm-up"})
