"""Several stores: one writable, others read-only, which may vanish; local copies of what these hold."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from store_kit import listing
from test_store_store import add
from understudy import admin
from understudyd.shell import read_through
from understudyd.shell.read_through import ReadThrough
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import BlobRecord
from understudyd.store.store import Store
from understudyd.store.union import StoreUnion

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 1, "width": 32, "height": 32}


# -- the union --------------------------------------------------------------------------------------------


@pytest.fixture
def union(tmp_path: Path) -> StoreUnion:
    """`m` is everywhere, `near` in the own store, `far` and `both` in read-only ones."""
    own, one, two = (Store.open(tmp_path / name, writable=True) for name in ("own", "one", "two"))
    for store, names in ((own, ["m", "near"]), (one, ["m", "both"]), (two, ["m", "both", "far"])):
        for name in names:
            add(store, name, f"{store.path.name}"[:1].encode())
    return StoreUnion(own, [Store(one.path), Store(two.path)])


def test_the_writable_store_wins_then_the_order(union: StoreUnion, tmp_path: Path) -> None:
    found = union.inventory().found
    homes = {name: model.home.path.name for name, model in found.items()}
    assert homes == {"m": "own", "near": "own", "both": "one", "far": "two"}
    assert found["m"].shadowed == (tmp_path / "one", tmp_path / "two")
    assert found["both"].shadowed == (tmp_path / "two",) and found["near"].shadowed == ()
    for name, model in found.items():
        assert union.find(name) == model


def test_a_store_that_is_away_takes_its_models_with_it_and_no_others(
    union: StoreUnion, tmp_path: Path
) -> None:
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    inventory = union.inventory()
    assert list(inventory.away) == [tmp_path / "one"]
    assert inventory.found["both"].home.path == tmp_path / "two"
    (tmp_path / "elsewhere").rename(tmp_path / "one")
    assert union.inventory().found["both"].home.path == tmp_path / "one"


def test_a_damaged_model_gives_way_to_a_good_one_behind_it(union: StoreUnion) -> None:
    (union.own.model_folder("m") / "manifest.json").write_text("{")
    (union.own.model_folder("near") / "manifest.json").write_text("{")
    inventory = union.inventory()
    assert inventory.found["m"].home.path.name == "one" and list(inventory.damaged) == ["near"]
    with pytest.raises(StoreError) as caught:
        union.find("near")
    assert caught.value.code is StoreErrorCode.CORRUPT_STORE
    with pytest.raises(StoreError) as caught:
        union.find("nobody")
    assert caught.value.code is StoreErrorCode.NOT_FOUND


def test_looking_writes_nothing(union: StoreUnion, tmp_path: Path) -> None:
    before = {name: set((tmp_path / name).rglob("*")) for name in ("one", "two")}
    union.inventory()
    union.find("far")
    assert {name: set((tmp_path / name).rglob("*")) for name in ("one", "two")} == before


# -- who may delete ---------------------------------------------------------------------------------------


def test_nobody_deletes_what_somebody_serves(tmp_path: Path) -> None:
    serving, other = Store.open(tmp_path / "s", writable=True), Store(tmp_path / "s")
    old = add(serving, "m", b"a")
    (sha256,) = (c.blob.sha256 for c in old.components)
    serving.usage.begin()
    add(other, "m", b"b", replace=True)
    other.clean()
    serving.clean(keep={sha256})
    second = Store(tmp_path / "s")
    second.usage.begin()
    serving.clean()
    assert serving.blob_path(sha256).exists(), "kept, or another daemon serves from here, too"
    second.usage.end()
    serving.clean()
    assert not serving.blob_path(sha256).exists()
    (sha256,) = (c.blob.sha256 for c in serving.model("m").components)
    add(other, "m", b"c", replace=True)
    other.clean()
    assert serving.blob_path(sha256).exists(), "its lock is held again after it was alone"
    serving.usage.end()
    other.clean()
    assert not serving.blob_path(sha256).exists()


# -- local copies -----------------------------------------------------------------------------------------


def blobs(folder: Path, *contents: bytes) -> list[tuple[BlobRecord, Path]]:
    """Blobs of one size, whatever they hold."""
    store = Store.open(folder, writable=True)
    record = add(store, "m", *contents)
    return [(c.blob, store.blob_path(c.blob.sha256)) for c in record.components]


def copying(folder: Path, capacity_bytes: int, work: Callable[[ReadThrough], Any]) -> ReadThrough:
    """Open, do something, let the copies be made, close."""

    async def life() -> ReadThrough:
        cache = ReadThrough(folder, capacity_bytes, 0.0)
        cache.open()
        try:
            work(cache)
            if cache._task is not None:
                await cache._task
        finally:
            await cache.close()
        return cache

    return asyncio.run(life())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_copy_is_the_same_bytes_and_made_once(tmp_path: Path) -> None:
    ((blob, source),) = blobs(tmp_path / "far", b"a")

    def twice(cache: ReadThrough) -> None:
        assert cache.use(blob.sha256) is None
        cache.want(blob, source)
        cache.want(blob, source)
        assert len(cache._queue) == 1

    cache = copying(tmp_path / "cache", 10**6, twice)
    copy = cache.use(blob.sha256)
    assert copy is not None and copy.read_bytes() == source.read_bytes()
    assert cache.size_bytes == source.stat().st_size and names(tmp_path / "cache") == {copy.name}


def test_the_longest_unused_make_room_and_the_order_survives_a_restart(tmp_path: Path) -> None:
    far = blobs(tmp_path / "far", b"a", b"b", b"c", b"d")
    size = far[0][1].stat().st_size
    keys = [blob.sha256 for blob, _ in far]
    copying(tmp_path / "cache", 3 * size, lambda cache: [cache.want(*it) for it in far[:3]])
    for age_s, key in enumerate(reversed(keys[:3])):
        os.utime(tmp_path / "cache" / f"{key}.safetensors", (1e9 - age_s, 1e9 - age_s))

    def use_the_oldest(cache: ReadThrough) -> None:
        assert cache.use(keys[0]) is not None
        cache.want(*far[3], in_use={keys[1]})

    cache = copying(tmp_path / "cache", 3 * size, use_the_oldest)
    assert {key for key in keys if cache.use(key)} == {keys[0], keys[1], keys[3]}
    assert len(names(tmp_path / "cache")) == 3


def test_what_is_larger_than_the_cache_or_finds_all_in_use_is_not_copied(tmp_path: Path) -> None:
    far = blobs(tmp_path / "far", b"a", b"b")
    size = far[0][1].stat().st_size
    assert copying(tmp_path / "cache", size - 1, lambda cache: cache.want(*far[0])).size_bytes == 0
    copying(tmp_path / "cache", size, lambda cache: cache.want(*far[0]))
    cache = copying(tmp_path / "cache", size, lambda cache: cache.want(*far[1], in_use={far[0][0].sha256}))
    assert cache.use(far[0][0].sha256) and not cache.use(far[1][0].sha256)


def flip_a_bit(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_a_wrong_copy_is_no_copy(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    ((blob, source), good) = blobs(tmp_path / "far", b"a", b"b")
    damage(source)

    def both(cache: ReadThrough) -> None:
        cache.want(blob, source)
        cache.want(*good)

    cache = copying(tmp_path / "cache", 10**6, both)
    assert cache.use(blob.sha256) is None and cache.use(good[0].sha256)
    assert len(names(tmp_path / "cache")) == 1


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((blob, source),) = blobs(tmp_path / "far", b"a")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(read_through.os, "fsync", full)
    cache = copying(tmp_path / "cache", 10**6, lambda cache: cache.want(blob, source))
    assert cache.use(blob.sha256) is None and names(tmp_path / "cache") == set()
    monkeypatch.undo()
    assert copying(tmp_path / "cache", 10**6, lambda cache: cache.want(blob, source)).use(blob.sha256)


def test_what_a_dead_process_left_is_cleared_and_a_living_ones_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    living = folder / f"{read_through._UNFINISHED}x-{os.getpid()}"
    for path in (living, folder / f"{read_through._UNFINISHED}x-999999999"):
        path.write_bytes(b"half")
    copying(folder, 10**6, lambda cache: None)
    assert names(folder) == {living.name}


def test_a_copy_that_somebody_tidied_up_is_forgotten(tmp_path: Path) -> None:
    ((blob, source),) = blobs(tmp_path / "far", b"a")
    cache = copying(tmp_path / "cache", 10**6, lambda cache: cache.want(blob, source))
    shutil.rmtree(tmp_path / "cache")
    assert cache.use(blob.sha256) is None and cache.size_bytes == 0


# -- through the daemon -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mount(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ignored = shutil.ignore_patterns("*.lock")  # other tests' daemons have served from it
    return Path(shutil.copytree(family.store, tmp_path_factory.mktemp("mount") / "models", ignore=ignored))


@pytest.fixture(scope="module")
def daemon(mount: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """All models are on a read-only mount; the daemon's own store is empty."""
    folder = tmp_path_factory.mktemp("own")
    store = {"read_only": [str(mount), str(folder / "never-there")], "cache": "1GiB"}
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}, "store": store}
    with running_daemon(folder / "store", folder / "run", arena="32MiB", **more) as daemon:
        yield daemon


def served(daemon: DaemonProcess, name: str) -> list[bytes]:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        return [pixels(image) for image in client.generate(name, PROMPT, **OPTIONS).images]


def cached(daemon: DaemonProcess) -> set[str]:
    folder = daemon.runtime_dir.parent / "store" / "cache"
    return {path.name for path in folder.glob("*.safetensors")}


def wait_for_copies(daemon: DaemonProcess, name: str) -> None:
    parts = daemon.ask(admin.Show(name=name))["components"]
    while not {f"{part['blob']}.safetensors" for part in parts} <= cached(daemon):
        daemon.ask(admin.Status())


def test_the_second_load_reads_the_local_copy(daemon: DaemonProcess, family: Family, mount: Path) -> None:
    """Shown by taking the mount away."""
    before = listing(mount)
    assert served(daemon, "sd-c") == family.reference("sd-c", **REFERENCE)
    wait_for_copies(daemon, "sd-c")
    daemon.ask(admin.Evict(name="sd-c"))
    away = mount.rename(mount.parent / "away")
    try:
        assert served(daemon, "sd-c") == family.reference("sd-c", **REFERENCE)
    finally:
        away.rename(mount)
    assert listing(mount) == before and not (mount / "serving.lock").exists()


def test_a_mount_that_vanishes_and_comes_back(daemon: DaemonProcess, family: Family, mount: Path) -> None:
    """Its models fail, with a reason and for a retry; the rest is served; then all is as before."""
    assert served(daemon, "sd-a") == family.reference("sd-a", **REFERENCE)
    wait_for_copies(daemon, "sd-a")
    away = mount.rename(mount.parent / "away")
    try:
        with pytest.raises(understudy.DaemonError) as caught:
            served(daemon, "xl")
        assert caught.value.code == "load_failed" and caught.value.retryable
        assert served(daemon, "sd-a") == family.reference("sd-a", **REFERENCE)
        report = daemon.ask(admin.Rescan())
        assert str(mount) in report["away"] and not report["removed"], "what is away is not gone"
    finally:
        away.rename(mount)
    assert served(daemon, "xl") == family.reference("xl", **REFERENCE)


def test_new_models_on_the_mount_are_found(daemon: DaemonProcess, family: Family, mount: Path) -> None:
    from understudyd.store.ingest import ingest

    ingest(Store.open(mount, writable=True), "late", family.folders["sd-b"])
    assert daemon.ask(admin.Rescan())["added"] == ["late"]
    assert served(daemon, "late") == family.reference("sd-b", **REFERENCE)
    assert daemon.ask(admin.Show(name="late"))["store"] == str(mount)


def test_a_read_only_model_is_replaced_here_and_shows_again_when_that_is_removed(
    daemon: DaemonProcess, family: Family, mount: Path
) -> None:
    with pytest.raises(admin.AdminError, match="read-only") as refused:
        daemon.ask(admin.Remove(name="sd-b"))
    assert refused.value.code == "read_only"
    daemon.ask(admin.Add(name="sd-b", source=str(family.folders["sd-c"]), replace=True), timeout_s=90)
    shown = daemon.ask(admin.Show(name="sd-b"))
    assert shown["shadowed"] == [str(mount)] and shown["store"] != str(mount)
    assert served(daemon, "sd-b") == family.reference("sd-c", **REFERENCE)
    daemon.ask(admin.Remove(name="sd-b"))
    while "sd-b" not in {row["name"] for row in daemon.ask(admin.Models())}:
        pass
    assert served(daemon, "sd-b") == family.reference("sd-b", **REFERENCE)
