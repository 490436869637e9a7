"""The quality benchmark's quick version: the promised keys, and figures that can be."""

import json

import pytest


@pytest.mark.timeout(300)
def test_the_benchmark_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.demo_quality import main

    main(["--quick", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"prompts", "passed_percent", "style_confusion_percent", "weights_mb"}
    assert found["prompts"] == 4
    assert 0 <= found["passed_percent"] <= 100 and 0 <= found["style_confusion_percent"] <= 100
    assert 1 < found["weights_mb"] < 24
