"""The restart benchmark, narrow: its keys, and what holds at any size."""

import json

import pytest
from benchmarks import restart

PHASES = ("until_bound", "image", "import", "device", "weights")


def test_nothing_is_lost_at_any_size(capsys: pytest.CaptureFixture[str]) -> None:
    restart.main(["--quick", "--json", "--architecture", "sd15"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [
        "cold_first_image_s",
        "warm_first_image_s",
        "warm_ratio",
        "correct_without_blob_files",
        "requests_lost",
        "answers_duplicated",
        *(f"{life}_{phase}_s" for life in ("cold", "warm") for phase in PHASES),
        "disk_gbps",
    ]
    assert found["correct_without_blob_files"] is True
    assert found["requests_lost"] == found["answers_duplicated"] == 0
    for life in ("cold", "warm"):
        parts = found[f"{life}_until_bound_s"] + found[f"{life}_image_s"]
        assert parts == pytest.approx(found[f"{life}_first_image_s"], abs=0.001)
        assert all(found[f"{life}_{phase}_s"] > 0 for phase in PHASES)
        assert found[f"{life}_import_s"] < found[f"{life}_until_bound_s"]
