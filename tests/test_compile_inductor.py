"""Inductor in a real daemon: code is made before it is ready, fits every model, and outlives a restart."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daemon_kit import DaemonProcess, running_daemon
from understudy import Client, admin
from understudy_demo import tiny
from understudyd.store.ingest import ingest_many
from understudyd.store.store import Store

READY_S = 600.0  # where compilers share two cores with much else
pytestmark = [
    pytest.mark.timeout(2 * READY_S),
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None,
        reason="there is no C++ compiler here, without which inductor makes no code for the CPU",
    ),
]
MODELS = ("a", "b", "c")
SIZES = ((16, 16), (24, 16))
TOLERANCE = 2  # of 255: fused kernels round elsewhere
# Every kind of block takes a C++ compiler seconds: two kinds.
UNET: dict[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
SETTINGS: dict[str, Any] = {
    "policy": {"prefetch": False},
    "startup": {"models": ["a"], "prompts": ["warm"], "size": "16x16", "steps": 1},
}
ENVIRON = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": ""}  # torch sets it here


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    made = [(n, tiny.stable_diffusion(seed, **UNET)) for seed, n in enumerate(MODELS, 1)]
    store = Store.open(folder / "store", writable=True)
    ingest_many(store, [(name, tiny.save(pipeline, folder / name)) for name, pipeline in made])
    return store.path


def compiled(daemon: DaemonProcess) -> dict[str, Any]:
    found: dict[str, Any] = daemon.ask(admin.Status())["compiled"]
    return found


def there_and_back(daemon: DaemonProcess) -> dict[tuple[str, tuple[int, int]], bytes]:
    """PNGs by model and size: each is asked for twice and comes twice the same."""
    made: dict[tuple[str, tuple[int, int]], bytes] = {}
    with Client(endpoint=daemon.endpoint) as client:
        for model in [*MODELS, *reversed(MODELS)]:
            for size in SIZES:
                image = client.generate(model, "a red circle", seed=3, size=size, steps=2).images[0]
                assert made.setdefault((model, size), image) == image, (model, size)
    return made


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_code_is_made_once_and_kept(store: Path, tmp_path: Path) -> None:
    with running_daemon(store, tmp_path / "plain", **SETTINGS) as daemon:
        assert compiled(daemon) is None
        expected = there_and_back(daemon)
    on = SETTINGS | {"stage": {"compile": "on"}}
    lives = []
    for life in ("first", "second"):
        with running_daemon(store, tmp_path / life, wait=False, environ=ENVIRON, **on) as daemon:
            daemon.wait_for_log("ready after", READY_S)
            before = compiled(daemon)
            made = there_and_back(daemon)
            assert compiled(daemon) == before, "nothing is compiled once the daemon is ready"
        assert (before["recompiles"], before["pending"], before["failures"]) == (0, 0, {})
        assert before["graphs"] > 0
        for key, png in expected.items():
            assert abs(pixels(png) - pixels(made[key])).max() <= TOLERANCE, key
        lives.append((before, made))
    (cold, first), (warm, second) = lives
    assert first == second, "the same code gives the same images"
    assert list((store / "compiled").rglob("*.so")), "inductor's cache lies with the store"
    assert warm["graphs"] == cold["graphs"] and warm["compile_s"] < cold["compile_s"]
