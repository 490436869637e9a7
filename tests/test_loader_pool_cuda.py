"""The daemon's parts on a GPU, against a fake driver: sizes, the GPU's name, loaders that are threads."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loader_cuda_kit import CUresult, FakeDriver, FakeGpu
from loader_kit import DEADLINE_S, MIB, make_blob
from understudyd import config
from understudyd.core.events import Event, LoaderReady, LoadFinished
from understudyd.loader.proof import PROOF_AREA_BYTES
from understudyd.shell import parts
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import Arena
from understudyd.shell.memory_cuda import CudaArena
from understudyd.shell.parts import Parts
from understudyd.shell.timeline import Timeline

FREE_BYTES = 64 * MIB


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Of a machine with two GPUs, for all of this process."""
    made = FakeDriver(FakeGpu(free_bytes=FREE_BYTES))
    for module in ("loader.cuda", "loader.transport_cuda", "shell.memory_cuda"):
        monkeypatch.setattr(f"understudyd.{module}.load_driver", lambda: made)
    return made


def on_gpu(device: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Parts:
    document = {"device": {"kind": "cuda", "gpu": "1", "reserve": 16 * MIB} | (device or {})} | sections
    return Parts(msgspec.convert(document, config.Config, dec_hook=config._decode))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def test_the_arena_is_what_is_free_but_for_the_reserve(driver: FakeDriver) -> None:
    arena = on_gpu().arena()
    assert isinstance(arena, CudaArena)
    assert arena.size_bytes == FREE_BYTES - 16 * MIB - PROOF_AREA_BYTES
    assert arena.ordinal == 1 and arena.open_fields().transport == "cuda_ipc"
    arena.close()
    assert driver.live == []


@pytest.mark.parametrize(("arena", "is_too_large"), [("48MiB", False), ("50MiB", True), ("auto", False)])
def test_an_arena_that_eats_the_reserve_is_told(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture, arena: str, is_too_large: bool
) -> None:
    on_gpu({"arena": arena}).arena().close()
    assert ("make device.arena smaller" in caplog.text) is is_too_large


def test_an_arena_for_threads_is_not_exported(driver: FakeDriver) -> None:
    arena = on_gpu({"arena": "4MiB"}, loader={"transport": "thread"}).arena()
    assert arena.size_bytes == 4 * MIB and arena.open_fields().transport == "cuda_local"
    assert "cuIpcGetMemHandle" not in driver.log
    arena.close()


def test_half_of_the_memory_is_for_host_copies(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> None:
    monkeypatch.setattr(parts, "memory_available_bytes", lambda: 9 * MIB)
    pool = on_gpu().host_pool()
    assert pool is not None and pool.size_bytes == 4 * MIB
    pool.close()
    assert on_gpu(host={"pool": "0"}).host_pool() is None
    assert on_gpu({"kind": "cpu"}).host_pool() is None, "the page cache is that tier there"


def test_on_the_cpu_arena_and_host_pool_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "memory_available_bytes", lambda: 40 * MIB)
    made = on_gpu({"kind": "cpu"}, host={"pool": "8MiB"})
    pool, arena = made.host_pool(), made.arena()
    assert (arena.size_bytes, pool and pool.size_bytes) == (16 * MIB, 8 * MIB)
    arena.close()
    if pool is not None:
        pool.close()


def test_where_the_arena_cannot_be_exported_threads_fill_it(driver: FakeDriver, tmp_path: Path) -> None:
    """From the daemon's parts to bytes on the device, by every route, and nothing is left on the device."""
    driver.fail_call, driver.fail_with = ("cuIpcGetMemHandle", 0), CUresult.CUDA_ERROR_NOT_SUPPORTED
    made = on_gpu({"arena": "4MiB"}, host={"pool": "2MiB"}, loader={"chunk": "64KiB", "count": 2})
    blob = make_blob(tmp_path / "blob")
    places = [0, MIB, 2 * MIB]

    async def scenario(arena: Arena, host_pool: HostPool | None) -> None:
        events: list[Event] = []
        pool = made.loader_pool(asyncio.get_running_loop(), Timeline(), host_pool)
        pool.start()
        try:
            pool.open(arena, events.append)
            assert pool.hand_over.kind == "threads" and "cuIpcGetMemHandle" in pool.hand_over.reason
            await until(lambda: sum(isinstance(event, LoaderReady) for event in events) == 2)
            loader_id = pool.status()[0].loader_id
            pool.start_load(loader_id, blob.task(1, places[0]))
            pool.start_load(loader_id, blob.task(2, places[1], pool_offset=8192))
            pool.start_load(loader_id, blob.task(3, places[2], pool_offset=8192, from_pool=True))
            await until(lambda: sum(isinstance(event, LoadFinished) for event in events) == 3)
        finally:
            await pool.stop()

    arena, host_pool = made.arena(), made.host_pool()
    asyncio.run(scenario(arena, host_pool))
    for offset in places:
        assert arena.read(offset, len(blob.data)) == blob.data
        assert not any(arena.read(offset + len(blob.data), MIB - len(blob.data)))
    arena.close()
    if host_pool is not None:
        host_pool.close()
    assert driver.live == []


def test_loaders_are_told_the_gpu_by_its_uuid(driver: FakeDriver) -> None:
    wanted = driver._gpu.uuid_text(1)
    for gpu in ("1", wanted):
        made = on_gpu({"gpu": gpu}).loader_pool(asyncio.new_event_loop(), Timeline(), None)
        assert made._gpu_uuid == wanted
        made._loop.close()
