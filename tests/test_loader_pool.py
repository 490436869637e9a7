"""The loader pool with real processes and real signals."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from loader_kit import (
    HEADER_BYTES,
    KIB,
    MIB,
    Blob,
    PoolKit,
    arena_bytes,
    is_alive,
    make_blob,
    running_pool,
)
from understudyd.core.events import (
    LoadCancelled,
    LoaderLost,
    LoaderReady,
    LoaderReaped,
    LoadFailed,
    LoadFinished,
)
from understudyd.core.types import ErrorCode
from understudyd.loader.faults import ENVIRONMENT_VARIABLE
from understudyd.shell.supervisor import LoaderState

SLOW_BYTES_PER_S = 64 * KIB


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


async def in_mid_load(kit: PoolKit, blob: Blob, load_id: int = 1) -> int:
    """Start a slow load on the first loader and wait until it has written something; the loader's pid."""
    loader_id = (await kit.first(LoaderReady)).loader_id
    kit.pool.start_load(loader_id, blob.task(load_id))
    await kit.until(lambda: kit.status_of(loader_id).bytes_done > 0)
    assert kit.status_of(loader_id).state is LoaderState.LOADING
    return kit.status_of(loader_id).pid


def test_a_load_from_order_to_event(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool() as kit:
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
            ((lane, name, started_at_s, ended_at_s),) = kit.spans
            assert (lane, name) == ("loader 0", "blob") and started_at_s < ended_at_s

    run(scenario())


def test_two_loaders_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        blobs = [make_blob(tmp_path / f"blob{n}", MIB // 2, seed=n) for n in range(4)]
        async with running_pool(count=2, rate_limit_bytes_per_s=4 * MIB) as kit:
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            ids = [ready.loader_id for ready in kit.of(LoaderReady)]
            for n, blob in enumerate(blobs):
                kit.pool.start_load(ids[n % 2], blob.task(load_id=n, arena_offset=n * MIB))
            await kit.until(lambda: len(kit.of(LoadFinished)) == 4)
            for n, blob in enumerate(blobs):
                assert arena_bytes(kit.arena, n * MIB, len(blob.data)) == blob.data
                assert not any(arena_bytes(kit.arena, n * MIB + len(blob.data), MIB - len(blob.data)))
            lanes = {
                lane: [span for span in kit.spans if span[0] == lane] for lane in ("loader 0", "loader 1")
            }
            (_, _, start_0, end_0), (_, _, start_1, end_1) = lanes["loader 0"][0], lanes["loader 1"][0]
            assert max(start_0, start_1) < min(end_0, end_1), "they did not work side by side"

    run(scenario())


@pytest.fixture(scope="module")
def uvloop() -> Any:
    """Its library opens a pipe for signals once a process, before anybody counts descriptors."""
    module = pytest.importorskip("uvloop")
    module.new_event_loop().close()
    return module


def test_it_works_on_uvloop(uvloop: Any, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            os.kill(await in_mid_load(kit, blob), signal.SIGKILL)
            await kit.first(LoaderReaped)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_killed_in_mid_load(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await in_mid_load(kit, blob)
            killed_at_s = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            lost = await kit.first(LoaderLost)
            assert await kit.first(LoaderReaped) == LoaderReaped(lost.loader_id)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            assert time.monotonic() - killed_at_s < 1.0, "a new loader at work within a second"
            new = kit.of(LoaderReady)[1].loader_id
            assert new != lost.loader_id
            assert not is_alive(pid)
            status = kit.status()
            assert (status.loader_id, status.slot, status.restarts) == (new, 0, 1)
            assert status.last_loss == "closed its connection"
            small = make_blob(blob.path.with_name("small"), 1000)
            kit.pool.start_load(lost.loader_id, small.task(load_id=8))  # an order that crossed the loss
            kit.pool.start_load(new, small.task(load_id=9, arena_offset=2 * MIB))
            await kit.first(LoadFinished)
            assert kit.of(LoadFinished) == [LoadFinished(9)]
            assert not any(arena_bytes(kit.arena, len(blob.data), 2 * MIB - len(blob.data)))
            assert kit.spans[-1][0] == "loader 0"

    run(scenario())


def test_frozen_is_declared_dead_within_three_seconds(blob: Blob) -> None:
    """With the settings a daemon has; the kit's quicker heart apart."""

    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await in_mid_load(kit, blob)
            stopped_at_s = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            lost = await kit.first(LoaderLost)
            assert 1.0 < time.monotonic() - stopped_at_s < 3.0
            assert "silent" in lost.reason
            await kit.first(LoaderReaped)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)

    run(scenario())


def test_frozen_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knew the loader, so nobody is told; the next one comes."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stop:open")

    async def scenario() -> None:
        async with running_pool(dead_after_s=0.3, start_timeout_s=10.0) as kit:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE)
            ready = await kit.first(LoaderReady)
            assert kit.events == [ready]
            assert kit.status().restarts == 1

    run(scenario())


def test_never_coming_up_is_noticed() -> None:
    async def scenario() -> None:
        command = (sys.executable, "-c", "import time; time.sleep(600)")
        async with running_pool(command=command, start_timeout_s=0.2) as kit:
            await kit.until(lambda: kit.status().restarts >= 2)
            assert kit.events == []

    run(scenario())


def test_a_command_that_cannot_be_run_is_tried_again() -> None:
    async def scenario() -> None:
        async with running_pool(command=("/nowhere/loader",), respawn_delay_s=0.01) as kit:
            await kit.until(lambda: kit.status().restarts >= 3)
            assert kit.status().pid == 0
            assert "/nowhere/loader" in kit.status().last_loss

    run(scenario())


def test_quick_deaths_slow_the_respawning(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_pool(command=(sys.executable, "-c", ""), respawn_delay_s=0.1) as kit:
            started_at_s = time.monotonic()
            await kit.until(lambda: kit.status().restarts >= 4)
            assert time.monotonic() - started_at_s > 0.1 + 0.2

    run(scenario())


def test_a_slow_read_is_not_death(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stall:read:2")

    async def scenario() -> None:
        async with running_pool(dead_after_s=0.3) as kit:
            await in_mid_load(kit, blob)
            await asyncio.sleep(1.0)
            assert kit.of(LoaderLost) == []
            assert kit.status().state is LoaderState.LOADING

    run(scenario())


def test_a_busy_parent_is_not_the_loaders_death(blob: Blob) -> None:
    """While the parent imports torch nobody reads heartbeats; they are read before judgement."""

    async def scenario() -> None:
        async with running_pool(dead_after_s=0.3) as kit:
            await kit.first(LoaderReady)
            ends_at_s = time.monotonic() + 0.8
            while time.monotonic() < ends_at_s:
                pass
            await asyncio.sleep(0.1)
            assert kit.of(LoaderLost) == []

    run(scenario())


@pytest.mark.parametrize("point", ["header", "read", "copy", "synchronise", "report", "idle"])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_death_at_every_point_of_a_load(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, point: str, action: str
) -> None:
    """Lost, reaped, followed; a neighbour's bytes stay; the same load succeeds on the next loader."""
    nth = ":2" if point == "idle" else ""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"{action}:{point}{nth}")

    async def scenario() -> None:
        async with running_pool(dead_after_s=0.3) as kit:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE)
            os.pwrite(kit.arena.fds()[0], b"neighbour", len(blob.data))
            first = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(first, blob.task(load_id=1))
            assert (await kit.first(LoaderLost)).loader_id == first
            await kit.first(LoaderReaped)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            assert kit.of(LoadFinished) == ([LoadFinished(1)] if point == "idle" else [])
            kit.pool.start_load(kit.of(LoaderReady)[1].loader_id, blob.task(load_id=2))
            await kit.until(lambda: LoadFinished(2) in kit.events)
            assert arena_bytes(kit.arena, 0, len(blob.data) + 9) == blob.data + b"neighbour"

    run(scenario())


def test_faults_of_files_have_codes(blob: Blob, tmp_path: Path) -> None:
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
        async with running_pool() as kit:
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
            assert [span[1] for span in kit.spans] == ["blob"]

    run(scenario())


def test_a_file_version_is_verified_once(blob: Blob) -> None:
    """A damage that leaves size, time and inode alone is not looked for again; a new version is."""

    async def scenario() -> None:
        async with running_pool() as kit:
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


def test_cancelled_in_mid_load(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await in_mid_load(kit, blob, load_id=5)
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


def test_too_many_checksums_fail_the_load_alone(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool() as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(loader_id, blob.task(1, xxh3=tuple(range(2**60, 2**60 + 40_000))))
            assert (await kit.first(LoadFailed)).load_id == 1
            kit.pool.start_load(loader_id, blob.task(2))
            await kit.first(LoadFinished)

    run(scenario())


BABBLER = """
import socket, sys
from understudyd.loader import wire
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
sock.send(wire.encode(wire.Ready(pid=1)))
for report in (wire.LoadStopped(load_id=123), wire.LoadFault(load_id=4, corrupt=True, message="")):
    sock.send(wire.encode(report))
sock.send({packet})
sock.recv(1)
sock.recv(1)
"""


@pytest.mark.parametrize(
    "packet",
    [
        "b'garbage'",
        "b'\\x91' * 60_000",
        "b'x' * 150_000",
        "b'\\x82\\xa4type\\xa5fatal\\xa7message\\xa2\\xff\\xfe'",
        "wire.encode(wire.Ready(pid=1))",
        "wire.encode(wire.Ready(pid=1, wire_version=99))",
        "wire.encode(wire.Fatal(message='enough'))",
    ],
)
def test_a_loader_that_talks_nonsense_is_replaced(packet: str) -> None:
    """Reports about loads it was never given are ignored; what cannot be a report is the end of it."""

    async def scenario() -> None:
        command = (sys.executable, "-P", "-c", BABBLER.format(packet=packet))
        async with running_pool(command=command) as kit:
            pid = kit.status().pid
            first = (await kit.first(LoaderReady)).loader_id
            await kit.first(LoaderReaped)
            assert kit.of(LoaderLost)[0].loader_id == first
            assert not is_alive(pid)
            assert kit.events[:3] == [LoaderReady(first), kit.of(LoaderLost)[0], LoaderReaped(first)]

    run(scenario())


def test_the_last_words_of_a_dying_loader_count(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reported a finished load, died with orders unread, and the parent looks only afterwards."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "idle:2")

    async def scenario() -> None:
        async with running_pool() as kit:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE)
            loader_id = (await kit.first(LoaderReady)).loader_id
            for load_id in (1, 2):
                kit.pool.start_load(loader_id, blob.task(load_id))
            status = Path(f"/proc/{kit.status().pid}/stat")
            while status.read_text().split()[2] != "Z":
                pass  # the loop stands still until it is dead
            await kit.first(LoaderLost)
            assert kit.events[1] == LoadFinished(1)
            assert LoadFinished(2) not in kit.events

    run(scenario())


@pytest.mark.parametrize("condition", ["idle", "loading", "frozen", "hanging", "starting"])
def test_stop_ends_every_loader(blob: Blob, monkeypatch: pytest.MonkeyPatch, condition: str) -> None:
    if condition == "hanging":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stall:read:2")

    async def scenario() -> None:
        async with running_pool(count=2, rate_limit_bytes_per_s=SLOW_BYTES_PER_S, stop_grace_s=0.8) as kit:
            pids = [status.pid for status in kit.pool.status()]
            if condition != "starting":
                await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            if condition in ("loading", "frozen", "hanging"):
                pid = await in_mid_load(kit, blob)
            if condition == "frozen":
                os.kill(pid, signal.SIGSTOP)
            await kit.pool.stop()
            assert not any(is_alive(pid) for pid in pids)
            assert kit.of(LoaderLost) == []

    run(scenario())


def test_stop_while_a_respawn_is_due() -> None:
    async def scenario() -> None:
        async with running_pool(command=(sys.executable, "-c", ""), respawn_delay_s=5.0) as kit:
            await kit.until(lambda: kit.status().restarts == 2)
            await kit.pool.stop()
            await asyncio.sleep(0)
            assert kit.status().state is LoaderState.LOST

    run(scenario())


def test_nothing_is_left_open(blob: Blob) -> None:
    def opened() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2)

    async def scenario() -> None:
        async with running_pool(count=2, rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            os.kill(await in_mid_load(kit, blob), signal.SIGKILL)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 3)

    before = len(os.listdir("/proc/self/fd"))
    run(scenario())
    assert len(os.listdir("/proc/self/fd")) == before, opened()


def test_chunks_of_the_default_size(tmp_path: Path) -> None:
    async def scenario() -> None:
        blob = make_blob(tmp_path / "blob", 40 * MIB + 5)
        async with running_pool(arena_size_bytes=64 * MIB, chunk_bytes=16 * MIB) as kit:
            kit.pool.start_load(
                (await kit.first(LoaderReady)).loader_id, blob.task(1, arena_offset=MIB, xxh3=())
            )
            await kit.first(LoadFinished)
            assert arena_bytes(kit.arena, MIB, len(blob.data)) == blob.data

    run(scenario())
