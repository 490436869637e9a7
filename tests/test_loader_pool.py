"""The loader pool at work, its loaders being processes and being threads: loads, events, the way out."""

import asyncio
import ctypes
import gc
import os
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from loader_kit import (
    HEADER_BYTES,
    KIB,
    MIB,
    Blob,
    arena_bytes,
    is_alive,
    loader_threads,
    make_blob,
    running_pool,
)
from understudy.trace import lane
from understudyd.core.events import LoadCancelled, LoaderLost, LoaderReady, LoadFailed, LoadFinished
from understudyd.core.types import ErrorCode
from understudyd.shell.loading import Transport
from understudyd.shell.supervisor import LoaderState

SLOW_BYTES_PER_S = 64 * KIB


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.fixture(params=["process", "thread"])
def transport(request: pytest.FixtureRequest) -> Transport:
    return request.param


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


def test_a_load_from_order_to_event(transport: Transport, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(transport=transport) as kit:
            assert kit.status().state is LoaderState.STARTING
            loader_id = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(loader_id, blob.task(load_id=3, arena_offset=MIB))
            assert await kit.first(LoadFinished) == LoadFinished(3)
            assert arena_bytes(kit.arena, MIB, len(blob.data)) == blob.data
            assert not any(arena_bytes(kit.arena, 0, MIB))
            status = kit.status()
            assert (status.loader_id, status.state, status.load) == (loader_id, LoaderState.IDLE, None)
            assert (status.loads_done, status.bytes_total, status.restarts) == (1, len(blob.data), 0)
            assert status.rate_bytes_per_s > 0
            (span,) = kit.spans
            assert (span.lane, span.name) == ("loader 0", "blob") and span.start_s < span.end_s
            assert (span.route, span.size_bytes) == ("disk > arena", len(blob.data))

    run(scenario())


def test_by_way_of_the_host_pool(transport: Transport, blob: Blob) -> None:
    """To the pool and on; to the pool alone; from the pool when the file is gone."""

    async def scenario() -> None:
        async with running_pool(transport=transport, host_pool_bytes=4 * MIB) as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            tasks = [
                blob.task(1, arena_offset=MIB, pool_offset=8192),
                blob.task(2, arena_offset=None, pool_offset=2 * MIB),
                blob.task(3, arena_offset=2 * MIB, pool_offset=8192, from_pool=True),
                blob.task(4, arena_offset=3 * MIB, pool_offset=2 * MIB, from_pool=True),
            ]
            for task in tasks[:2]:
                kit.pool.start_load(loader_id, task)
            assert (kit.status().load, kit.status().route) == ("blob", "disk > host > arena")
            await kit.until(lambda: len(kit.of(LoadFinished)) == 2)
            blob.path.unlink()
            for task in tasks[2:]:
                kit.pool.start_load(loader_id, task)
            await kit.until(lambda: len(kit.of(LoadFinished)) == 4)
            for offset in (1, 2, 3):
                assert arena_bytes(kit.arena, offset * MIB, len(blob.data)) == blob.data
            assert not any(arena_bytes(kit.arena, 0, MIB))
            assert [span.route for span in kit.spans] == [
                "disk > host > arena",
                "disk > host",
                "host > arena",
                "host > arena",
            ]

    run(scenario())


def test_loads_rest_while_they_are_paused(transport: Transport, blob: Blob) -> None:
    """Loaders that come later rest too; a resting load is not stalled, and it can be cancelled."""

    async def scenario() -> None:
        async with running_pool(transport=transport, start=False, stalled_after_s=0.3) as kit:
            kit.pool.pause(True)
            kit.start()
            loader_id = (await kit.first(LoaderReady)).loader_id
            for load_id in (1, 2):
                kit.pool.start_load(loader_id, blob.task(load_id))
            rested_at_s = time.monotonic() + 0.6
            await kit.until(lambda: time.monotonic() > rested_at_s)
            assert kit.events == [LoaderReady(loader_id)] and kit.status().bytes_done == 0
            kit.pool.cancel_load(1)
            await kit.first(LoadCancelled)
            kit.pool.pause(False)
            await kit.first(LoadFinished)
            assert kit.events[1:] == [LoadCancelled(1), LoadFinished(2)]
            assert arena_bytes(kit.arena, 0, len(blob.data)) == blob.data

    run(scenario())


def test_two_loaders_at_once(transport: Transport, tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = [make_blob(tmp_path / f"blob{n}", MIB // 2, seed=n) for n in range(4)]
        async with running_pool(transport=transport, count=2, rate_limit_bytes_per_s=4 * MIB) as kit:
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            ids = [ready.loader_id for ready in kit.of(LoaderReady)]
            for n, blob in enumerate(blobs):
                kit.pool.start_load(ids[n % 2], blob.task(load_id=n, arena_offset=n * MIB))
            await kit.until(lambda: len(kit.of(LoadFinished)) == 4)
            for n, blob in enumerate(blobs):
                assert arena_bytes(kit.arena, n * MIB, len(blob.data)) == blob.data
                assert not any(arena_bytes(kit.arena, n * MIB + len(blob.data), MIB - len(blob.data)))
            one, other = (lane(kit.spans, name)[0] for name in ("loader 0", "loader 1"))
            assert max(one.start_s, other.start_s) < min(one.end_s, other.end_s), "not side by side"

    run(scenario())


def test_a_busy_parent_is_not_the_loaders_death(transport: Transport, blob: Blob) -> None:
    """While the parent imports torch nobody reads heartbeats, and no thread of it sends any."""

    async def scenario() -> None:
        async with running_pool(transport=transport, dead_after_s=0.3) as kit:
            await kit.first(LoaderReady)
            ctypes.PyDLL(None).usleep(800_000)  # keeps the interpreter
            await asyncio.sleep(0.1)
            assert kit.of(LoaderLost) == []

    run(scenario())


def test_faults_of_files_have_codes(transport: Transport, blob: Blob, tmp_path: Path) -> None:
    async def scenario() -> None:
        damaged = make_blob(tmp_path / "damaged", seed=1)
        with damaged.path.open("r+b") as file:
            file.seek(HEADER_BYTES + 70_000)
            file.write(b"???")
        truncated = make_blob(tmp_path / "truncated", seed=2)
        os.truncate(truncated.path, HEADER_BYTES + 10)
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "link").symlink_to(blob.path)
        tasks = [
            damaged.task(1),
            truncated.task(2),
            blob.task(3, path=str(tmp_path / "fifo")),
            blob.task(4, path=str(tmp_path / "link")),
            blob.task(5, path=str(tmp_path / "missing")),
            blob.task(6),
        ]
        async with running_pool(transport=transport) as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            for task in tasks:
                kit.pool.start_load(loader_id, task)
            assert await kit.first(LoadFinished) == LoadFinished(6)
            corrupt, failed = ErrorCode.MODEL_CORRUPT, ErrorCode.LOAD_FAILED
            assert [(f.load_id, f.code) for f in kit.of(LoadFailed)] == [
                (1, corrupt),
                (2, corrupt),
                (3, failed),
                (4, failed),
                (5, failed),
            ]
            assert kit.of(LoaderLost) == []
            assert [span.outcome for span in kit.spans] == [*["failed"] * 5, ""]

    run(scenario())


def test_a_file_version_is_verified_once(transport: Transport, blob: Blob) -> None:
    """A damage that leaves size, time and inode alone is not looked for again; a new version is."""

    async def scenario() -> None:
        async with running_pool(transport=transport) as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(loader_id, blob.task(1))
            await kit.until(lambda: LoadFinished(1) in kit.events)
            wrong = tuple(value ^ 1 for value in blob.xxh3)
            kit.pool.start_load(loader_id, blob.task(2, xxh3=wrong))
            await kit.until(lambda: LoadFinished(2) in kit.events)
            os.utime(blob.path, ns=(1, 1))
            kit.pool.start_load(loader_id, blob.task(3, xxh3=wrong))
            assert (await kit.first(LoadFailed)).code is ErrorCode.MODEL_CORRUPT

    run(scenario())


def test_cancelled_in_mid_load(transport: Transport, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(transport=transport, rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await kit.in_mid_load(blob, load_id=5)
            kit.pool.cancel_load(5)
            kit.pool.cancel_load(5)
            kit.pool.cancel_load(77)
            assert await kit.first(LoadCancelled) == LoadCancelled(5)
            assert kit.status().pid == pid and kit.status().state is LoaderState.IDLE
            small = make_blob(blob.path.with_name("small"), 1000)
            kit.pool.start_load(kit.status().loader_id, small.task(6))
            await kit.first(LoadFinished)
            assert kit.of(LoadCancelled) == [LoadCancelled(5)]

    run(scenario())


def test_too_many_checksums_fail_the_load_alone(transport: Transport, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(transport=transport) as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(loader_id, blob.task(1, xxh3=tuple(range(2**60, 2**60 + 40_000))))
            assert (await kit.first(LoadFailed)).load_id == 1
            kit.pool.start_load(loader_id, blob.task(2))
            await kit.first(LoadFinished)

    run(scenario())


def test_nothing_is_left_open(transport: Transport, blob: Blob) -> None:
    def opened() -> Counter[str]:
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return Counter(os.readlink(link) for link in links if os.path.lexists(link))  # but for the listing's

    async def scenario() -> None:
        async with running_pool(transport=transport, count=2, rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            await kit.in_mid_load(blob)
            kit.kill_loader()
            await kit.until(lambda: len(kit.of(LoaderReady)) == 3)

    before = opened()
    run(scenario())
    gc.collect()  # a cancelled load's traceback may hold a view of the arena
    assert opened() == before


def test_chunks_of_the_default_size(transport: Transport, tmp_path: Path) -> None:
    async def scenario() -> None:
        blob = make_blob(tmp_path / "blob", 40 * MIB + 5)
        async with running_pool(transport=transport, arena_size_bytes=64 * MIB, chunk_bytes=16 * MIB) as kit:
            kit.pool.start_load(
                (await kit.first(LoaderReady)).loader_id, blob.task(1, arena_offset=MIB, xxh3=())
            )
            await kit.first(LoadFinished)
            assert arena_bytes(kit.arena, MIB, len(blob.data)) == blob.data

    run(scenario())


@pytest.mark.parametrize("condition", ["idle", "loading", "paused", "starting"])
def test_stop_ends_every_loader(transport: Transport, blob: Blob, condition: str) -> None:
    async def scenario() -> None:
        async with running_pool(
            transport=transport, count=2, rate_limit_bytes_per_s=SLOW_BYTES_PER_S, stop_grace_s=10.0
        ) as kit:
            pids = {status.pid for status in kit.pool.status()} - {os.getpid()}
            if condition != "starting":
                await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            if condition in ("loading", "paused"):
                await kit.in_mid_load(blob)
            if condition == "paused":
                kit.pool.pause(True)
            started_at_s = time.monotonic()
            await kit.pool.stop()
            assert time.monotonic() - started_at_s < 5.0, "they were told and need not be killed"
            assert not any(is_alive(pid) for pid in pids) and not loader_threads()
            assert kit.of(LoaderLost) == []

    run(scenario())
