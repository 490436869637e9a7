"""The GPU check without a GPU: how it runs sections, what it says, and every section on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sections.peers import FROM_POOL, compare_peers, peer_names, summary
from benchmarks.load import OURS, RAW

ROOT = Path(__file__).parent.parent
FROM_THE_TREE = dict(os.environ) | {"PYTHONPATH": "client:daemon", "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, env: dict[str, str] = FROM_THE_TREE) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a run of made-up sections."""
    out = tmp_path_factory.mktemp("made-up") / "out.json"
    done = run("tests/gpu_check_child.py", out, env=dict(os.environ) | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def test_a_section_that_fails_is_recorded_and_stops_no_other(made_up: dict[str, Any]) -> None:
    sections = made_up["sections"]
    assert sections["raise_an_error"]["error"] == "ValueError: broken on purpose"
    assert "in raise_an_error" in sections["raise_an_error"]["traceback"]
    assert sections["die"]["error"] == "ended with 3"
    assert sections["work"]["figure"] == 0.3333


def test_a_section_that_hangs_is_ended_and_shows_where(made_up: dict[str, Any]) -> None:
    assert made_up["sections"]["hang"]["error"] == "took longer than 0 s"
    assert "in hang" in made_up["sections"]["hang"]["traceback"]


def test_results_are_on_disk_before_the_next_section(made_up: dict[str, Any]) -> None:
    assert made_up["sections"]["look_back"]["seen"] == ["raise_an_error", "work"]


def test_what_is_wrong_is_named(made_up: dict[str, Any]) -> None:
    assert made_up["failed"] == ["raise_an_error", "die", "hang", "look_back.bad"]
    assert made_up["sections"]["skip"]["skipped"] == "not here"
    assert "no time left" in made_up["sections"]["late"]["skipped"]
    assert made_up["sections"]["cut"]["skipped"].startswith("cut off: no time left"), "not its own fault"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    env = FROM_THE_TREE | {"CUDA_VISIBLE_DEVICES": ""}
    done = run("-m", "benchmarks.gpu", "--out", out, env=env)
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA GPU" in done.stderr
    document = json.loads(out.read_text())
    assert document["gpu"] is None and document["sections"] == {}


def test_without_a_driver_nothing_else_is_needed(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    out = tmp_path / "check.json"
    bare = {"PYTHONPATH": "client:daemon", "PATH": os.environ["PATH"]}
    done = run("-S", "-m", "benchmarks.gpu", "--out", out, env=bare)  # -S: without installed packages
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == {"gpu": None, "why": "there is no NVIDIA driver here"}


SLOW = {"peers", "serving"}  # many processes that import torch: of each below, or in another test


def on_the_cpu(out: Path, *sections: str) -> "subprocess.CompletedProcess[str]":
    place = ("--out", out, "--work", out.parent)
    return run("-m", "benchmarks.gpu", "--device", "cpu", "--size", "tiny", *place, "--only", *sections)


@pytest.mark.timeout(420)
def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = on_the_cpu(out, *(section.name for section in SECTIONS if section.name not in SLOW))
    document = json.loads(out.read_text())
    assert done.returncode == 0, f"{document['failed']}\n{done.stderr}"
    sections = document["sections"]
    assert [name for name, found in sections.items() if "skipped" in found] == ["registering"]
    for kind in ("sd15", "sdxl"):
        assert sections[f"images_{kind}"]["checks"]["equal_to_from_pretrained"]
        assert sections[f"switch_{kind}"]["switches"] == 2
    assert sections["upcast"]["checks"]["was_upcast_every_time"]
    assert sections["steps"]["chunk_mib"]["4"]["copied_gbps"] > 0
    assert sections["killed_loader"]["kills"] == 5
    assert sections["blocks_flux"]["checks"]["same_again_after_another"]
    assert sections["compile"]["checks"]["no_recompiles"] and sections["compile"]["graphs"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"], "the work folder is gone"


@pytest.mark.timeout(600)
def test_peers_are_told_to_load_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_peers.__globals__, "peer_names", lambda: ["safetensors", "from_pretrained"])
    found = compare_peers(Bench("cpu", "tiny", tmp_path))
    assert set(found["peers"]) == {"safetensors", "from_pretrained"} and found["absent"] == {}
    assert min(*found["peers"].values(), found["understudy_gbps"], found["pinned_copy_gbps"]) > 0


def test_what_stays_in_a_file_is_no_peer_on_a_device() -> None:
    assert "from_pretrained" in peer_names() and not [name for name in peer_names() if "mapped" in name]


def test_the_best_peer_counts_and_none_is_no_target() -> None:
    rates = {OURS: 10.0, RAW: 50.0, FROM_POOL: 46.0, "safetensors": 4.0, "tensorizer": 6.0}
    found = summary(rates)
    assert found["ratio_best_peer"] == pytest.approx(10 / 6) and found["ratio_pinned"] == pytest.approx(0.92)
    assert found["targets"] == {"pool_of_pinned_at_least_0.9": True, "times_best_peer_at_least_2": False}
    alone = summary({name: rates[name] for name in (OURS, RAW, FROM_POOL)})
    assert alone["ratio_best_peer"] is None and list(alone["targets"]) == ["pool_of_pinned_at_least_0.9"]


def test_the_check_fits_ten_minutes_by_its_own_limit() -> None:
    from benchmarks.gpu.__main__ import LIMIT_S

    longest_s = max(section.budget_s for section in SECTIONS)
    assert LIMIT_S + 60 <= 600, "what is begun ends with the limit; a minute for imports and the report"
    assert longest_s < LIMIT_S and all(section.least_s <= section.budget_s for section in SECTIONS)
