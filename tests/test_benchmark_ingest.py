"""The ingest benchmark, narrow and in this process: its keys and how they hang together."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from benchmarks import ingest

from understudyd.store.ingest import run_cli
from understudyd.store.store import Store


def test_its_last_line_is_the_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[str]] = []

    def run_here(store: Path, arguments: Sequence[str]) -> ingest.Run:
        assert run_cli(["--json", "--store", str(store), *arguments]) == 0
        held.append(Store.open(store, writable=False).names())
        return ingest.Run(wall_s=2.0, cpu_s=1.0)

    monkeypatch.setattr(ingest, "run_ingest", run_here)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on
    ingest.main(["--quick", "--json", "--models", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tunes = [f"tune-{number:04}" for number in range(3)]
    assert held == [tunes, tunes, ["base", "m"]]
    size_bytes = found.pop("checkpoint_bytes")
    assert size_bytes > 10_000_000
    assert found.pop("write_mb_s") > 0
    assert found == {
        "models": 3, "scan_s": 2.0, "scan_cpu_s": 1.0, "scan_ms_per_model": pytest.approx(2000 / 3, abs=1e-3),
        "rescan_s": 2.0, "checkpoint_s": 2.0, "checkpoint_cpu_s": 1.0,
        "checkpoint_mb_s": pytest.approx(size_bytes / 2e6, abs=1e-3),
    }  # fmt: skip
