"""The restart benchmark, narrow: its keys, and what holds at any size."""

import json

import pytest
from benchmarks import restart


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
    ]
    assert found["correct_without_blob_files"] is True
    assert found["requests_lost"] == found["answers_duplicated"] == 0
    assert found["warm_first_image_s"] > 0
