"""What of a GPU check is kept for docs/benchmarks.md."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.kept import keep
from benchmarks.report.gpu_section import gpu_section
from benchmarks.report.results import read_all

DOCUMENT: dict[str, Any] = {
    "gpu": {
        "name": "NVIDIA H200 NVL",
        "uuid": "GPU-1234",
        "total_bytes": 150 << 30,
        "cuda": "12.8",
        "driver": 1,
    },
    "device": "cuda",
    "size": "real",
    "machine": {"cores": 16, "kernel": "6.1.0-site-local", "packages": {"torch": "2.11.0"}},
    "started_unix_s": 1_770_000_000.0,
    "failed": ["steps"],
    "sections": {
        "rates": {"pool_of_pinned": 0.912345, "targets": {"pool": True}, "checks": {"checksums": True}},
        "steps": {"error": "OSError: /mnt/scratch/site/x.bin is missing", "traceback": "File /secret"},
    },
}


def test_it_is_kept_without_what_tells_of_the_machine(tmp_path: Path) -> None:
    path = keep(DOCUMENT, tmp_path / "new")
    assert path is not None and path.name == "h200-nvl-2026-02-02.json"
    text = path.read_text()
    for secret in ("GPU-1234", "traceback", "/mnt", "/secret", "site-local"):
        assert secret not in text
    (check,) = read_all(path.parent).gpus
    assert check.sections["rates"]["pool_of_pinned"] == 0.9123
    shown = gpu_section(check)
    assert "## On NVIDIA H200 NVL" in shown and "**failed**: OSError: x.bin is missing" in shown
    assert "| `rates` | pool | met |" in shown and "Wrong: steps." in shown


def test_a_later_run_of_the_day_joins_it(tmp_path: Path) -> None:
    keep(DOCUMENT, tmp_path)
    path = keep(DOCUMENT | {"sections": {"compare": {"throughput_ratio": 2.0}, "steps": {"ok": 1}}}, tmp_path)
    assert path is not None
    sections = json.loads(path.read_text())["sections"]
    assert set(sections) == {"rates", "steps", "compare"} and sections["steps"] == {"ok": 1}


def test_neither_a_cpu_nor_narrow_models_are_kept(tmp_path: Path) -> None:
    assert keep(DOCUMENT | {"gpu": None}, tmp_path) is None
    assert keep(DOCUMENT | {"size": "tiny"}, tmp_path) is None
    assert not list(tmp_path.iterdir())
