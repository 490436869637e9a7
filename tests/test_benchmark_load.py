"""The load benchmark, narrow: its keys, its checksums, its ratios; peers that are not installed."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks import load
from benchmarks.load_peers import PEERS, Scene

FIGURES = ["understudy_gbps", "raw_gbps", "ratio_raw", "peers", "ratio_best_peer", "mapped"]
INSTALLED = ("safetensors", "from_pretrained", "safetensors_mapped")


def test_its_last_line_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    peers = [argument for name in INSTALLED for argument in ("--peer", name)]
    load.main(["--quick", "--json", *peers])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == [*FIGURES, "cold", "absent"]
    for block in (found, found["cold"]):
        assert block["ratio_raw"] == pytest.approx(block["understudy_gbps"] / block["raw_gbps"], rel=0.01)
        best = max(block["peers"].values())
        assert block["ratio_best_peer"] == pytest.approx(block["understudy_gbps"] / best, rel=0.01)
        assert (set(block["peers"]), set(block["mapped"])) == (set(INSTALLED[:2]), set(INSTALLED[2:]))
    assert found["absent"] == {}


def test_what_leaves_weights_in_the_page_cache_is_shown_and_not_compared() -> None:
    rates = {"understudy": 10.0, "raw": 20.0, "safetensors": 4.0, "safetensors_mapped": 30.0}
    found = load.summary(rates)
    assert (found["ratio_raw"], found["ratio_best_peer"]) == (0.5, 2.5)
    assert found["mapped"] == {"safetensors_mapped": 30.0}
    assert load.summary({"understudy": 1.0, "raw": 1.0})["ratio_best_peer"] is None


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    _, scene = load.write_unet("sd15", tmp_path_factory.mktemp("unet"), narrow=True)
    return scene


def test_a_peer_that_is_not_installed_is_absent(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = scene.folder / "absent"
    absent.mkdir()
    package = PEERS["tensorizer"].package
    (absent / f"{package}.py").write_text("raise ImportError('not installed here')\n")
    monkeypatch.setenv("PYTHONPATH", str(absent), prepend=":")
    peer = load.PeerProcess("tensorizer", scene, sys.executable)
    try:
        peer.wait_ready()
        assert peer.absent == "not installed here"
    finally:
        peer.close()


def test_other_bytes_than_the_file_s_are_noticed(scene: Scene) -> None:
    peer = load.PeerProcess("safetensors", scene, sys.executable)
    try:
        peer.wait_ready()
        expected = load.file_digest(scene.file)
        assert peer.load(expected) > 0
        header_bytes = scene.file.stat().st_size - load.read_header(scene.file).data_size_bytes
        with scene.file.open("r+b") as file:
            file.seek(header_bytes)
            (first,) = file.read(1)
            file.seek(header_bytes)
            file.write(bytes([first ^ 1]))
        with pytest.raises(load.WrongBytes, match="safetensors"):
            peer.load(expected)
    finally:
        peer.close()


def test_pages_are_dropped_and_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    load.drop_pages(path)
    load.read_pages(path)
    assert path.read_bytes() == bytes(1 << 20)
