"""How loaders come up: in two steps, with a proof, as processes or, where those are refused, as threads."""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from loader_kit import Blob, PoolKit, arena_bytes, loader_threads, make_blob, running_pool
from understudyd.core.events import LoaderLost, LoaderReady, LoaderReaped, LoadFinished
from understudyd.shell.hand_over import HandOver
from understudyd.shell.loader_life import Loader, Slot
from understudyd.shell.loading import LoaderSettings
from understudyd.shell.memory import ArenaError, CpuArena, OpenFields

REFUSING = """
import socket, sys
from understudyd.loader import wire
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
sock.recv(wire.MAX_PACKET_BYTES)
sock.send(wire.encode(wire.Attached(pid=1)))
sock.recv(wire.MAX_PACKET_BYTES)
sock.send(wire.encode({report}))
sock.recv(1)
"""
REFUSALS = {
    "cuIpcOpenMemHandle failed": "wire.Fatal(message='cuIpcOpenMemHandle failed', is_refused=True)",
    "wrote its proof elsewhere": "wire.Ready()",
}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def refusing(report: str) -> tuple[str, ...]:
    """A loader process that attaches and then answers `OpenArena` with this report."""
    return (sys.executable, "-P", "-c", REFUSING.format(report=report))


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


async def finishes(kit: PoolKit, loader_id: int, blob: Blob) -> None:
    kit.pool.start_load(loader_id, blob.task(load_id=1))
    assert await kit.first(LoadFinished) == LoadFinished(1)
    assert arena_bytes(kit.arena, 0, len(blob.data)) == blob.data


@pytest.mark.parametrize("transport", ["process", "thread"])
def test_loaders_attach_before_there_is_an_arena(transport: str, blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(start=False, transport=transport, count=2) as kit:
            kit.pool.start()
            await kit.pool.attached()
            ids = {status.loader_id for status in kit.pool.status()}
            kit.pool.open(kit.arena, kit.events.append)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            assert {ready.loader_id for ready in kit.of(LoaderReady)} == ids
            await finishes(kit, min(ids), blob)

    run(scenario())


def test_nobody_waits_for_ever_for_loaders_to_attach(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running_pool(start=False, start_timeout_s=0.05) as kit:  # not even spawned
            await kit.pool.attached()
            assert "not every loader has come up" in caplog.text

    run(scenario())


@pytest.mark.parametrize("command", [("/nowhere/loader",), (sys.executable, "-c", "")])
def test_loaders_that_cannot_come_up_are_not_waited_for(command: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with running_pool(start=False, command=command) as kit:
            kit.pool.start()
            async with asyncio.timeout(10.0):
                await kit.pool.attached()

    run(scenario())


@pytest.mark.parametrize("reason", REFUSALS)
def test_where_processes_are_refused_threads_take_over(
    blob: Blob, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    """For every slot, with one warning that says why."""

    async def scenario() -> None:
        async with running_pool(count=2, command=refusing(REFUSALS[reason])) as kit:
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            assert len(loader_threads()) == 2
            assert {status.pid for status in kit.pool.status()} == {os.getpid()}
            assert kit.pool.hand_over.kind == "threads" and reason in kit.pool.hand_over.reason
            await finishes(kit, kit.status(1).loader_id, blob)
            assert kit.of(LoaderLost) == [], "the core never knew those who could not come up"

    run(scenario())
    warnings = [r for r in caplog.records if "loaders are threads" in r.getMessage()]
    assert len(warnings) == 1 and reason in warnings[0].getMessage()


def test_processes_alone_where_that_is_configured() -> None:
    async def scenario() -> None:
        command = refusing(REFUSALS["cuIpcOpenMemHandle failed"])
        async with running_pool(command=command, transport="process", respawn_delay_s=0.01) as kit:
            await kit.until(lambda: kit.status().restarts >= 3)
            assert kit.pool.hand_over.kind == "processes" and not loader_threads()
            assert "cuIpcOpenMemHandle failed" in kit.status().last_loss

    run(scenario())


class FakeArena(CpuArena):
    """One on a GPU, as far as the question goes how a loader reaches it."""

    def __init__(self, refusal: str | None) -> None:
        self.ipc_refusal = refusal

    def open_fields(self) -> OpenFields:
        return LOCAL if self.ipc_refusal else SHARED


LOCAL = OpenFields("cuda_local", 100, address=7)
SHARED = OpenFields("cuda_ipc", 100, ipc_handle=b"handle", address=7)


def test_an_arena_that_cannot_be_exported_is_for_threads() -> None:
    chosen = HandOver(LoaderSettings())
    chosen.look_at(FakeArena(None))
    assert chosen.kind == "processes" and chosen.open_fields(FakeArena(None)) == SHARED
    chosen.look_at(FakeArena("not here"))
    assert (chosen.kind, chosen.reason) == ("threads", "not here")
    assert chosen.open_fields(FakeArena("not here")) == LOCAL
    with pytest.raises(ArenaError, match=r"not here.*loader\.transport"):
        HandOver(LoaderSettings(transport="process")).look_at(FakeArena("not here"))


def test_a_thread_reaches_by_its_address_what_a_process_opens_by_a_handle() -> None:
    threads = HandOver(LoaderSettings(transport="thread"))
    assert threads.open_fields(FakeArena(None)) == LOCAL
    assert threads.kind == "threads" and threads.reason == "as configured"


def test_processes_make_way_for_threads_when_the_arena_cannot_be_shared(blob: Blob) -> None:
    async def scenario() -> None:
        async with running_pool(start=False, count=2) as kit:
            kit.pool.start()
            await kit.pool.attached()
            assert not loader_threads()
            kit.arena.ipc_refusal = "not here"  # type: ignore[misc]
            kit.pool.open(kit.arena, kit.events.append)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            assert len(loader_threads()) == 2 and kit.of(LoaderLost) == []
            await finishes(kit, kit.status().loader_id, blob)

    run(scenario())


def test_a_thread_that_hangs_is_never_reaped(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is declared lost and followed by another; only its end, if it comes, frees its extents."""
    hanging, go_on = threading.Event(), threading.Event()
    read = os.preadv

    def hang_once(*arguments: Any) -> int:
        if not hanging.is_set():
            hanging.set()
            assert go_on.wait(30.0)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", hang_once)

    async def scenario() -> None:
        async with running_pool(transport="thread", stalled_after_s=0.3, stop_grace_s=0.2) as kit:
            first = (await kit.first(LoaderReady)).loader_id
            kit.pool.start_load(first, blob.task(load_id=9, arena_offset=2**20))
            lost = await kit.first(LoaderLost)
            assert lost.loader_id == first and "makes no progress" in lost.reason
            await kit.until(lambda: "cannot be killed" in caplog.text)
            await kit.until(lambda: len(kit.of(LoaderReady)) == 2)
            await finishes(kit, kit.of(LoaderReady)[1].loader_id, blob)
            assert kit.of(LoaderReaped) == []
            go_on.set()
            assert await kit.first(LoaderReaped) == LoaderReaped(first)
            assert kit.of(LoadFinished) == [LoadFinished(1)]

    with caplog.at_level(logging.WARNING):
        run(scenario())


@pytest.mark.parametrize(
    ("known", "ends_at_s", "reason"),
    [
        ({"asked_at_s": 5.0}, 35.0, "does not come up"),
        ({"asked_at_s": 5.0, "heard_at_s": 6.0}, 8.0, "is silent"),
        ({"heard_at_s": 50.0}, 52.0, "is silent"),  # attached, and nobody has told it the arena yet
        ({"heard_at_s": 50.0, "has_task": True, "progressed_at_s": 1.0}, 11.0, "makes no progress"),
        (
            {"heard_at_s": 50.0, "has_task": True, "progressed_at_s": 1.0, "is_paused": True},
            52.0,
            "is silent",
        ),
    ],
)
def test_patience_with_a_loader(known: dict[str, Any], ends_at_s: float, reason: str, blob: Blob) -> None:
    settings = LoaderSettings(start_timeout_s=30.0, dead_after_s=2.0, stalled_after_s=10.0)
    is_paused, has_task = known.pop("is_paused", False), known.pop("has_task", False)
    loader = Loader(0, Slot(0), None, 0.0, None, **known)  # type: ignore[arg-type]
    if has_task:
        loader.tasks[1] = blob.task(1)
    assert loader.patience(settings, is_paused) == (ends_at_s, reason)
