"""Cost profiles from a GPU check's document."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.measured import write_profiles

from understudyd.simulate import profiles

RATES = {
    "pinned_copy_gbps": 50.0,
    "one_loader": {"pool_gbps": 45.0, "disk_gbps": 3.0},
    "two_loaders": {"pool_gbps": 48.0, "disk_gbps": 5.0},
}
DOCUMENT: dict[str, Any] = {
    "gpu": {"name": "NVIDIA H200 NVL"},
    "sections": {
        "rates": RATES,
        "switch_sd15": {"bind_ms": {"p50": 0.5, "p99": 2.0}},
        "switch_sdxl": {"error": "broken"},
        "steps": {"chunk_mib": {"4": {"resting_ms_p50": 21.0}, "8": {"resting_ms_p50": 20.0}}},
    },
}


def test_a_profile_has_what_was_measured_and_names_the_gpu(tmp_path: Path) -> None:
    (path,) = write_profiles(DOCUMENT, tmp_path / "new")
    assert path.name == "h200-nvl-sd15.toml"
    profile, published = profiles.load(str(path)), profiles.load("h100-sd15")
    assert profile.bind_s.value == pytest.approx(0.0005)
    assert profile.step_s.value == pytest.approx(0.020)
    assert profile.bus_bytes_per_s.value == 50e9 and profile.loader_bytes_per_s.value == 45e9
    assert profile.disk_bytes_per_s.value == 5e9
    assert "NVIDIA H200 NVL" in profile.step_s.source
    assert profile.components == published.components and profile.encode_s == published.encode_s


def test_what_was_not_measured_keeps_its_published_source(tmp_path: Path) -> None:
    sections = {"switch_sdxl": {"bind_ms": {"p50": 1.0, "p99": 2.0}}, "rates": {"skipped": "no time left"}}
    (path,) = write_profiles({"gpu": {"name": "NVIDIA A100"}, "sections": sections}, tmp_path)
    profile, published = profiles.load(str(path)), profiles.load("h100-sdxl")
    assert path.name == "a100-sdxl.toml" and profile.bind_s.value == pytest.approx(0.001)
    assert profile.step_s == published.step_s and profile.bus_bytes_per_s == published.bus_bytes_per_s


def test_without_a_gpu_there_is_none(tmp_path: Path) -> None:
    assert write_profiles({"gpu": None, "sections": DOCUMENT["sections"]}, tmp_path) == []
