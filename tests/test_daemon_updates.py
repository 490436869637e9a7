"""A real daemon while its models change: nothing fails, nobody gets wrong bytes, files go when they may.

One daemon for all tests; each changes models of its own.
"""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin
from understudyd.store.store import Store

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 2, "width": 32, "height": 32, "guidance": 5.0}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, "width": 32, "height": 32}
REFERENCE["guidance_scale"] = 5.0
LONG_STEPS = 200


@pytest.fixture(scope="module")
def store(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(family.store, tmp_path_factory.mktemp("updates") / "store"))


@pytest.fixture(scope="module")
def daemon(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
    with running_daemon(store, tmp_path_factory.mktemp("run"), arena="32MiB", **more) as daemon:
        yield daemon


def blob_of(store: Path, name: str, component: str = "unet") -> Path:
    record = Store.open(store, writable=False).model(name)
    (sha256,) = (c.blob.sha256 for c in record.components if c.name == component)
    return store / "blobs" / f"{sha256}.safetensors"


def replace(daemon: DaemonProcess, name: str, source: Path) -> Any:
    return daemon.ask(admin.Add(name=name, source=str(source), replace=True), timeout_s=90)


def until(daemon: DaemonProcess, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Ask the daemon something until what it does in the background is done."""
    asked = threading.Event()
    deadline = threading.Timer(timeout_s, asked.set)
    deadline.start()
    try:
        while not condition():
            assert not asked.is_set(), "never came to be"
            daemon.ask(admin.Status())
    finally:
        deadline.cancel()
        deadline.join()


class LongRun:
    """A request that runs until it has done its many steps, on a thread of its own."""

    def __init__(self, daemon: DaemonProcess, model: str) -> None:
        self.started = threading.Event()
        self.result: understudy.Result | None = None
        self._daemon, self._model = daemon, model
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.started.wait(30)

    def _run(self) -> None:
        with understudy.Client(endpoint=self._daemon.endpoint) as client:
            for event in client.stream(self._model, PROMPT, **(OPTIONS | {"steps": LONG_STEPS})):
                if isinstance(event, understudy.Progress):
                    self.started.set()
                elif isinstance(event, understudy.Result):
                    self.result = event

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> list[bytes]:
        self._thread.join(60)
        assert self.result is not None
        return [pixels(image) for image in self.result.images]


def test_replaced_under_a_stream_of_requests(daemon: DaemonProcess, family: Family, store: Path) -> None:
    """Every request is served; first all by the old model, from some moment on all by the new one."""
    old, new = family.reference("sd-a", **REFERENCE), family.reference("sd-c", **REFERENCE)
    daemon.ask(admin.Pin(name="sd-a"))
    before = blob_of(store, "sd-a")
    swapped = threading.Event()

    async def stream() -> list[list[bytes]]:
        results = []
        async with understudy.AsyncClient(endpoint=daemon.endpoint) as client:
            rounds = 0
            while rounds < 3:  # three more after the swap
                rounds += swapped.is_set()
                asked = [client.generate("sd-a", PROMPT, **OPTIONS) for _ in range(3)]
                results += [[pixels(i) for i in r.images] for r in await asyncio.gather(*asked)]
        return results

    with ThreadPoolExecutor(1) as thread:
        streaming = thread.submit(lambda: asyncio.run(stream()))
        try:
            answer = replace(daemon, "sd-a", family.folders["sd-c"])
        finally:
            swapped.set()
        images = streaming.result(60)
    assert answer["name"] == "sd-a"
    assert all(image in (old, new) for image in images)
    first_new = images.index(new)
    assert images[0] == old and first_new > 0 and all(image == new for image in images[first_new:])
    (row,) = [row for row in daemon.ask(admin.Models()) if row["name"] == "sd-a"]
    assert row["requests"] == len(images) and row["pinned"] and row["tier"] in ("bound", "resident")
    until(daemon, lambda: not before.exists())
    assert blob_of(store, "sd-a") == blob_of(store, "sd-c")
    daemon.ask(admin.Unpin(name="sd-a"))


def test_what_runs_finishes_on_the_old_bytes(daemon: DaemonProcess, family: Family, store: Path) -> None:
    """Even if its files go, and another writer cleans up meanwhile."""
    before = blob_of(store, "sd-b")
    with understudy.Client(endpoint=daemon.endpoint) as client:
        expected = client.generate("sd-b", PROMPT, **(OPTIONS | {"steps": LONG_STEPS}))
        run = LongRun(daemon, "sd-b")
        replace(daemon, "sd-b", family.folders["sd-c"])
        if run.is_running():
            with Store.open(store, writable=True).writing() as writer:
                writer.collect_garbage()
            assert before.exists() or not run.is_running(), "a daemon serves from here: nobody else deletes"
        assert run.join() == [pixels(image) for image in expected.images]
        until(daemon, lambda: not before.exists())
        images = client.generate("sd-b", PROMPT, **OPTIONS).images
        assert [pixels(image) for image in images] == family.reference("sd-c", **REFERENCE)


def test_removed_when_the_last_request_is_done(daemon: DaemonProcess, family: Family, store: Path) -> None:
    folder = store / "models" / "sd-c"
    run = LongRun(daemon, "sd-c")
    with ThreadPoolExecutor(2) as threads, understudy.Client(endpoint=daemon.endpoint) as client:
        deck = threads.submit(client.generate, "sd-c", PROMPT, **OPTIONS)
        until(daemon, lambda: len(daemon.ask(admin.Queue())) == 2)
        removing = threads.submit(daemon.ask, admin.Remove(name="sd-c"))
        until(daemon, lambda: not any(entry.name == "sd-c" for entry in client.models()))
        assert not run.is_running() or (folder.exists() and not removing.done())
        with pytest.raises(understudy.UnknownModel, match=r"did you mean 'sd-[ab]'\?"):
            client.generate("sd-c", PROMPT, **OPTIONS)
        with pytest.raises(admin.AdminError, match="being removed"):
            replace(daemon, "sd-c", family.folders["sd-a"])
        assert run.join()
        assert [pixels(i) for i in deck.result(30).images] == family.reference("sd-c", **REFERENCE)
        assert removing.result(30)["name"] == "sd-c"
    assert not folder.exists()


def test_what_was_not_there_is_added_and_what_is_damaged_is_repaired(
    daemon: DaemonProcess, family: Family, store: Path
) -> None:
    replace(daemon, "brand-new", family.folders["sd-c"])
    path = blob_of(store, "xl")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with understudy.Client(endpoint=daemon.endpoint) as client:
        with pytest.raises(understudy.UnderstudyError, match=r"checksum|damaged|corrupt"):
            client.generate("xl", PROMPT, **OPTIONS)
        replace(daemon, "xl", family.folders["xl"])
        images = client.generate("xl", PROMPT, **OPTIONS).images
        assert [pixels(image) for image in images] == family.reference("xl", **REFERENCE)
        new = client.generate("brand-new", PROMPT, **OPTIONS).images
        assert [pixels(image) for image in new] == family.reference("sd-c", **REFERENCE)


def test_an_update_from_outside_is_found_by_a_rescan(
    daemon: DaemonProcess, family: Family, store: Path
) -> None:
    from understudyd.store.ingest import ingest

    own = Store.open(store, writable=True)
    ingest(own, "brand-new", family.folders["sd-a"], replace=True)
    ingest(own, "late", family.folders["sd-a"])
    shutil.rmtree(store / "models" / "xl-b")
    report = daemon.ask(admin.Rescan(), timeout_s=60)
    assert (report["added"], report["replaced"], report["removed"]) == (["late"], ["brand-new"], ["xl-b"])
    with understudy.Client(endpoint=daemon.endpoint) as client:
        for name, like in (("brand-new", "sd-a"), ("late", "sd-a")):
            images = client.generate(name, PROMPT, **OPTIONS).images
            assert [pixels(image) for image in images] == family.reference(like, **REFERENCE)
        with pytest.raises(understudy.UnknownModel):
            client.generate("xl-b", PROMPT, **OPTIONS)
    again = daemon.ask(admin.Rescan(), timeout_s=60)
    assert not (again["added"] or again["replaced"] or again["removed"] or again["damaged"])
