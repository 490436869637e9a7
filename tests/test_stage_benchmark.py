"""The switch benchmark, narrow: real tensor counts, tiny channels. Its proof must be able to fail."""

import json
from pathlib import Path

import pytest
from benchmarks import switch
from benchmarks.real_size import sd15, sdxl


def test_its_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    switch.main(["--quick", "--json", "--switches", "5"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(results) == ["sd15", "sdxl"]
    # The published UNets hold 686 and 1,680 tensors; text encoders and VAE are the rest.
    assert (results["sd15"]["tensors"], results["sdxl"]["tensors"]) == (1131, 2643)
    for found in results.values():
        assert found["switches"] == 5
        assert found["tensors_checked"] == 2 * found["tensors"]
        assert 0 < found["bind_ms_p50"] <= found["visible_ms_p50"]


def test_real_sizes() -> None:
    assert round(sd15().size_bytes / 1e9, 2) == 2.13
    assert round(sdxl().size_bytes / 1e9, 2) == 6.94


def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    theatre = switch.Theatre(sd15(narrow=True), tmp_path)
    try:
        theatre.arena[theatre.architecture.size_bytes // 2] ^= 1
        with pytest.raises(RuntimeError, match="WrongBytes"):
            theatre.switch(2, check=lambda i: True)
    finally:
        theatre.stage.close()
