"""kill -9 under load, cold and warm: `python -m benchmarks.restart [--json] [--quick] [--architecture NAME]`.

A daemon serves one real-size model (random weights, bfloat16, images of 64 pixels and one step: what is
measured is how the weights come back). It is killed with `kill -9` while requests are open, the page cache is
dropped of every blob (`posix_fadvise`), and it is started again: once with nothing kept, once with what a
service manager keeps for it, the host pool. For that second start the blob files are replaced by holes of
their size that nobody may read: whatever is served comes from memory. The clients stay and send again what is
open.

`*_first_image_s` counts from the kill to the first image, in two parts: `*_until_bound_s` until the request's
weights are bound on stage, and `*_image_s` of computing, which a restart does not change. Of the first part
`*_import_s` is the import of torch and diffusers, `*_device_s` making the arena's pages (a GPU has none to
make) and `*_weights_s` from the first load's start to the last one's end; all three are beside one another.
`disk_gbps` is what the cold start's loads came to. `requests_lost` never got an image,
`answers_duplicated` counts second answers for one id on the wire. `correct_without_blob_files`: every image
after the warm restart has the bytes that the first life gave for its seed.

The import of torch and diffusers is in both times, and so is the image; what remains is the disk. On a fast
one the ratio is nearer to one: `--disk-rate` slows the loaders' reads to a rate, in MB/s, and leaves memory
alone.

Expected, before the first run: a disk of 300 MB/s takes 23 s for SDXL's 6.9 GB, of which the import hides
nothing (it comes first on two cores); memory takes 2 s. So 35 s against 14.
"""

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.coldstart import covered_s
from benchmarks.kit import json_line, say, show_table, timed
from benchmarks.manager import Manager, managed
from understudy import AsyncClient, Progress, Result, admin
from understudy.errors import UnderstudyError
from understudy.trace import BIND, START_UP, Span, fetch
from understudy.wire import Failed, Finished, WireError, decode_reply

MODEL = "model"
SIDE_PX = 64
SEEDS = (1, 2, 3)
PATIENCE_S = 600.0
_SLACK_BYTES = 64 * 2**20
_TRACE_S = 3600.0


@dataclass(frozen=True)
class Scene:
    """A store with one model, and its daemon's manager."""

    store: Path
    size_bytes: int
    manager: Manager

    @property
    def blobs(self) -> list[Path]:
        return sorted((self.store / "blobs").iterdir())


@dataclass
class Clients:
    """Open requests, what became of them, and what was heard on the wire."""

    client: Any
    heard: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    lost: int = 0
    first_image_at_s: float = 0.0

    def __post_init__(self) -> None:
        session = self.client._session
        received = session.received

        def listen(frames: list[bytes], now: float) -> None:
            with contextlib.suppress(WireError):
                reply = decode_reply(frames[0])
                self.heard[reply.id] += isinstance(reply, Finished | Failed)
            received(frames, now)

        session.received = listen

    @property
    def duplicated(self) -> int:
        return sum(count - 1 for count in self.heard.values() if count > 1)

    async def open(self) -> list[Any]:
        """One request a seed, the first of which runs by now."""
        fields = {"steps": 1, "width": SIDE_PX, "height": SIDE_PX, "format": "raw"}
        handles = [await self.client.submit(MODEL, "a red circle", seed=seed, **fields) for seed in SEEDS]
        self.submitted += len(handles)
        return handles

    async def images(self, handles: list[Any]) -> dict[int, bytes]:
        """By seed, as they come; notes when the first did."""
        self.first_image_at_s = 0.0

        async def one(handle: Any) -> Result | None:
            try:
                result: Result = await handle.result()
            except UnderstudyError as error:
                say(f"  lost: {error}")
                self.lost += 1
                return None
            self.first_image_at_s = self.first_image_at_s or time.monotonic()
            return result

        results = await asyncio.gather(*map(one, handles))
        return {result.seed: result.images[0] for result in results if result is not None}


@contextlib.contextmanager
def scene_in(folder: Path, *, architecture: str, quick: bool, disk_rate: int) -> Iterator[Scene]:
    """Make the model and the daemon's configuration; start nothing."""
    import torch

    from benchmarks import real_store
    from benchmarks.real_size import sd15, sdxl
    from understudyd.store.store import Store

    made = (sd15 if architecture == "sd15" else sdxl)(narrow=quick, sample_size=SIDE_PX // 8)
    store = Store.open(folder / "store", writable=True)
    dtype = torch.float32 if architecture == "sd15" else torch.bfloat16
    dtypes = dict.fromkeys(made.builders, dtype)
    record = real_store.publish(store, made, MODEL, seed=0, dtypes=dtypes)
    size_bytes = sum(component.blob.size_bytes for component in record.components) + _SLACK_BYTES
    config = folder / "understudyd.toml"
    config.write_text(
        f'[store]\npath = "{store.path}"\n[server]\nruntime_dir = "{folder / "run"}"\n'
        f'[device]\nkind = "cpu"\narena = "{size_bytes}B"\n[host]\npool = "{size_bytes}B"\n'
        f'[loader]\nrate_limit = "{disk_rate * 500_000}B/s"\n[stage]\nwarm_up = false\n'
        '[log]\nformat = "text"\n'
    )
    with managed(config, folder / "run", folder / "manager") as manager:
        yield Scene(store.path, size_bytes - _SLACK_BYTES, manager)


def drop_page_cache(scene: Scene) -> None:
    """Have the next reader of a blob ask the disk."""
    for path in scene.blobs:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


@contextlib.contextmanager
def unreadable_blobs(scene: Scene) -> Iterator[None]:
    """Holes in their places: of the same length, for nobody to read, and wrong for who may all the same."""
    hidden = scene.store / "hidden"
    blobs = scene.blobs
    hidden.mkdir()
    for path in blobs:
        size_bytes = path.stat().st_size
        path.rename(hidden / path.name)
        path.touch(0o000)
        os.truncate(path, size_bytes)
    try:
        yield
    finally:
        for path in blobs:
            path.unlink()
            (hidden / path.name).rename(path)
        hidden.rmdir()


@dataclass(frozen=True, slots=True)
class Restart:
    """One kill and what followed, in seconds from the kill; the start-up's phases; the images by seed."""

    first_image_s: float
    until_bound_s: float
    import_s: float
    device_s: float
    weights_s: float
    images: dict[int, bytes]

    def figures(self, life: str) -> dict[str, float]:
        """By key, each beginning with the `life`."""
        return {
            f"{life}_until_bound_s": self.until_bound_s,
            f"{life}_image_s": self.first_image_s - self.until_bound_s,
            f"{life}_import_s": self.import_s,
            f"{life}_device_s": self.device_s,
            f"{life}_weights_s": self.weights_s,
        }


async def restarted(scene: Scene, clients: Clients, *, keep: bool) -> Restart:
    """Kill the daemon under load, start it again, and look at its timeline when all images are there."""
    handles = await clients.open()
    while not isinstance(await handles[0].next_event(), Progress):
        pass
    killed_s = time.monotonic()
    scene.manager.kill()
    drop_page_cache(scene)
    with unreadable_blobs(scene) if keep else contextlib.nullcontext():
        scene.manager.start(keep=keep)
        images = await clients.images(handles)
    spans = await asyncio.to_thread(timeline, scene.manager)
    return Restart(
        first_image_s=clients.first_image_at_s - killed_s,
        until_bound_s=min(span.end_s for span in spans if span.lane == BIND) - killed_s,
        import_s=covered_s(span for span in spans if span.lane == START_UP and span.name == "import"),
        device_s=covered_s(span for span in spans if span.lane == START_UP and span.name == "arena"),
        weights_s=covered_s(span for span in spans if span.lane.startswith("loader")),
        images=images,
    )


def timeline(manager: Manager) -> list[Span]:
    """All that this life did."""
    return fetch(partial(admin.call, manager.admin_socket), _TRACE_S).spans


async def measure_in(scene: Scene) -> dict[str, float]:
    """Three lives: one for the images to be had, one cold, one warm."""
    scene.manager.start()
    await asyncio.to_thread(scene.manager.wait_for, "READY=1", PATIENCE_S)
    async with AsyncClient(scene.manager.endpoint, reconnect_s=PATIENCE_S) as client:
        clients = Clients(client)
        expected = await clients.images(await clients.open())
        with timed("cold"):
            cold = await restarted(scene, clients, keep=False)
        with timed("warm"):
            warm = await restarted(scene, clients, keep=True)
    assert cold.images == expected, "the cold daemon's images differ"
    return {
        "cold_first_image_s": cold.first_image_s,
        "warm_first_image_s": warm.first_image_s,
        "warm_ratio": warm.first_image_s / cold.first_image_s,
        "correct_without_blob_files": warm.images == expected and len(warm.images) == len(SEEDS),
        "requests_lost": clients.lost,
        "answers_duplicated": clients.duplicated,
        **cold.figures("cold"),
        **warm.figures("warm"),
        "disk_gbps": scene.size_bytes / 1e9 / cold.weights_s,
    }


def measure(*, architecture: str, quick: bool, disk_rate: int) -> dict[str, float]:
    """The benchmark's figures."""
    with (
        tempfile.TemporaryDirectory(prefix="understudy-") as name,
        timed("everything"),
        scene_in(Path(name), architecture=architecture, quick=quick, disk_rate=disk_rate) as scene,
    ):
        say(f"one model of {scene.size_bytes / 1e9:.2f} GB")
        return asyncio.run(measure_in(scene))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a narrow model, for tests")
    parser.add_argument("--architecture", choices=["sdxl", "sd15"], default="sdxl")
    parser.add_argument("--disk-rate", type=int, default=0, help="MB/s of a slower disk; 0 is the disk's own")
    options = parser.parse_args(arguments)
    found = measure(architecture=options.architecture, quick=options.quick, disk_rate=options.disk_rate)
    show_table("restart", ["figure", ""], [[key, f"{value:.2f}"] for key, value in found.items()])
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
