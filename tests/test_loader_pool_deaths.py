"""Loaders that die, freeze, get stuck or talk nonsense, with real processes and real signals."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from loader_kit import KIB, MIB, Blob, arena_bytes, is_alive, make_blob, running_pool
from understudyd.core.events import LoaderLost, LoaderReady, LoaderReaped, LoadFinished
from understudyd.loader.faults import ENVIRONMENT_VARIABLE
from understudyd.shell.supervisor import LoaderState

SLOW_BYTES_PER_S = 64 * KIB


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


@pytest.fixture(scope="module")
def uvloop() -> Any:
    """Its library opens a pipe for signals once a process, before anybody counts descriptors."""
    module = pytest.importorskip("uvloop")
    module.new_event_loop().close()
    return module


def test_it_works_on_uvloop(uvloop: Any, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            os.kill(await kit.in_mid_load(blob), signal.SIGKILL)
            await kit.first(LoaderReaped)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_killed_in_mid_load(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await kit.in_mid_load(blob)
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
            assert [(s.lane, s.outcome) for s in kit.spans] == [("loader 0", "lost"), ("loader 0", "")]

    run(scenario())


def test_frozen_is_declared_dead_within_three_seconds(blob: Blob) -> None:
    """With the settings a daemon has; the kit's quicker heart apart."""

    async def scenario() -> None:
        async with running_pool(rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            pid = await kit.in_mid_load(blob)
            stopped_at_s = time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            lost = await kit.first(LoaderLost)
            assert 1.0 < time.monotonic() - stopped_at_s < 3.0
            assert "silent" in lost.reason
            await kit.first(LoaderReaped)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)

    run(scenario())


def test_when_everything_stood_still_nobody_is_dead(blob: Blob) -> None:
    """A machine that was suspended, or was too busy: the daemon goes on a moment before its loader does."""

    async def scenario() -> None:
        async with running_pool(dead_after_s=0.4) as kit:
            loader_id = (await kit.first(LoaderReady)).loader_id
            pid = kit.status().pid
            os.kill(pid, signal.SIGSTOP)
            threading.Event().wait(0.8)
            asyncio.get_running_loop().call_later(0.02, os.kill, pid, signal.SIGCONT)
            kit.pool.start_load(loader_id, blob.task())
            await kit.first(LoadFinished)
            assert kit.status().restarts == 0 and not kit.of(LoaderLost)
            os.kill(pid, signal.SIGSTOP)
            assert "silent" in (await kit.first(LoaderLost)).reason, "and who is dead is dead"

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
            await kit.in_mid_load(blob)
            await asyncio.sleep(1.0)
            assert kit.of(LoaderLost) == []
            assert kit.status().state is LoaderState.LOADING

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


BABBLER = """
import os, socket, sys
from understudyd.loader import wire
from understudyd.loader.proof import pattern
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
sock.recv(wire.MAX_PACKET_BYTES)
sock.send(wire.encode(wire.Attached(pid=1)))
packet, (fd,), _, _ = socket.recv_fds(sock, wire.MAX_PACKET_BYTES, 1)
order = wire.decode_order(packet)
os.pwrite(fd, pattern(order.proof_seed + 1, order.proof_bytes), order.proof_offset)
sock.send(wire.encode(wire.Ready()))
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
        "wire.encode(wire.Ready())",
        "wire.encode(wire.Attached(pid=1, wire_version=99))",
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


def test_stop_while_a_respawn_is_due() -> None:
    async def scenario() -> None:
        async with running_pool(command=(sys.executable, "-c", ""), respawn_delay_s=5.0) as kit:
            await kit.until(lambda: kit.status().restarts == 2)
            await kit.pool.stop()
            await asyncio.sleep(0)
            assert kit.status().state is LoaderState.LOST

    run(scenario())


@pytest.mark.parametrize("condition", ["frozen", "hanging"])
def test_stop_ends_a_loader_that_does_not_listen(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    if condition == "hanging":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stall:read:2")

    async def scenario() -> None:
        async with running_pool(count=2, rate_limit_bytes_per_s=SLOW_BYTES_PER_S, stop_grace_s=0.8) as kit:
            pid = await kit.in_mid_load(blob)
            if condition == "frozen":
                os.kill(pid, signal.SIGSTOP)
            await kit.pool.stop()
            assert not is_alive(pid)
            assert kit.of(LoaderLost) == []

    run(scenario())


def test_a_load_without_progress_costs_the_loader_its_life(
    blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heart beats on, but a read that hangs must not hold an extent for ever."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stall:read:2")

    async def scenario() -> None:
        async with running_pool(stalled_after_s=0.4) as kit:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE)
            await kit.in_mid_load(blob)
            lost = await kit.first(LoaderLost)
            assert "makes no progress" in lost.reason
            assert await kit.first(LoaderReaped) == LoaderReaped(lost.loader_id)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            kit.pool.start_load(kit.status().loader_id, blob.task(2))
            await kit.first(LoadFinished)

    run(scenario())


def test_slow_progress_is_progress(tmp_path: Path) -> None:
    """A load that takes three times as long as it may stand still."""

    async def scenario() -> None:
        blob = make_blob(tmp_path / "blob", 120 * KIB)
        async with running_pool(stalled_after_s=0.6, rate_limit_bytes_per_s=SLOW_BYTES_PER_S) as kit:
            kit.pool.start_load((await kit.first(LoaderReady)).loader_id, blob.task(1))
            await kit.first(LoadFinished)
            assert kit.of(LoaderLost) == []
            (span,) = kit.spans
            assert span.end_s - span.start_s > 1.5

    run(scenario())
