"""kill -9 on a real daemon whose descriptors are kept: host copies outlive it, and are checked."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.manager import Life, Manager, managed

import understudy
from daemon_kit import configuration
from family_kit import Family, pixels
from understudy import admin
from understudyd.shell.kept_pool import INDEX, POOL
from understudyd.shell.pool_index import PoolIndex
from understudyd.store.store import Store

POOL_BYTES = 48 * 2**20
PROMPT = "a red circle on blue"
OPTIONS: dict[str, Any] = {"seed": 7, "steps": 8, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 8, "width": 32, "height": 32}
MODELS = ["sd-a", "sd-b", "sd-c"]


@dataclass
class Scene:
    """One manager and the lives of its daemon, over a store that tests may spoil."""

    manager: Manager
    store: Path
    spare: Path
    family: Family

    def live(self) -> Life:
        self.manager.start()
        return self.manager.wait_for("READY=1")

    def check(self, result: understudy.Result) -> None:
        expected = self.family.reference(result.model, **REFERENCE)
        assert [pixels(image) for image in result.images] == expected, result.model

    def serve(self, *models: str) -> None:
        with understudy.Client(endpoint=self.manager.endpoint) as client:
            for model in models:
                self.check(client.generate(model, PROMPT, **OPTIONS))

    def routes(self) -> set[str]:
        """Where the loads of this life came from."""
        spans = admin.call(self.manager.admin_socket, admin.Trace(seconds=600))["spans"]
        return {span["route"] for span in spans if span["lane"].startswith("loader")}

    def spoil_files(self) -> None:
        """Every blob's file keeps its length and none of its bytes, and most people may not read it."""
        for path in (self.store / "blobs").iterdir():
            size_bytes = path.stat().st_size
            path.unlink()
            path.touch(0o000)
            os.truncate(path, size_bytes)

    def restore_files(self) -> None:
        for path in (self.store / "blobs").iterdir():
            path.unlink()
            shutil.copy(self.spare / path.name, path)

    def spoil_copies(self) -> None:
        """One bit of each."""
        pool = self.manager.kept[POOL]
        for copy in PoolIndex(self.manager.kept[INDEX]).read().found.copies:
            middle = copy.offset + copy.size_bytes // 2
            os.pwrite(pool, bytes([os.pread(pool, 1, middle)[0] ^ 1]), middle)


@pytest.fixture
def scene(family: Family, tmp_path: Path) -> Iterator[Scene]:
    folder = tmp_path
    store = Path(shutil.copytree(family.store, folder / "store"))
    config = folder / "understudyd.toml"
    sections: dict[str, Any] = {"stage": {"warm_up": False}, "host": {"pool": f"{POOL_BYTES}B"}}
    config.write_text(configuration(store, folder / "run", **sections))
    with managed(config, folder / "run", folder / "manager", {"OMP_NUM_THREADS": "1"}) as manager:
        yield Scene(manager, store, family.store / "blobs", family)


def test_killed_and_upgraded(scene: Scene) -> None:
    """Three lives: killed under load, then stopped for an upgrade."""
    scene.live()
    assert set(scene.manager.kept) == {POOL, INDEX}
    scene.serve(*MODELS)
    everything_is_written_down(scene)

    results = asyncio.run(killed_under_load(scene))
    assert [result.model for result in results] == MODELS * 2
    for result in results:
        scene.check(result)
    assert scene.routes() == {"host > arena"}, "no file was left to read"
    assert "the host pool of the last daemon is taken over" in scene.manager.log.read_text()

    assert scene.manager.kill(signal.SIGTERM) == 0
    scene.restore_files()
    scene.spoil_copies()
    life = scene.live()
    scene.serve("sd-a")
    assert "in the host pool is damaged; it is read from disk instead" in scene.manager.log.read_text()
    assert "models resident" in life.status


def everything_is_written_down(scene: Scene) -> None:
    store = Store.open(scene.store, writable=False)
    record = PoolIndex(scene.manager.kept[INDEX]).read()
    held = {c.blob.sha256 for model in MODELS for c in store.model(model).components}
    assert held <= {copy.blob for copy in record.found.copies} and record.pool_bytes == POOL_BYTES


async def killed_under_load(scene: Scene) -> list[understudy.Result]:
    """Clients see a pause; meanwhile all files are spoilt."""
    async with understudy.AsyncClient(endpoint=scene.manager.endpoint) as client:
        handles = [await client.submit(model, PROMPT, **OPTIONS) for model in MODELS * 2]
        while not isinstance(await handles[0].next_event(), understudy.Progress):
            pass
        await asyncio.to_thread(scene.manager.kill)
        scene.spoil_files()
        scene.manager.start()
        return [await handle.result() for handle in handles]
