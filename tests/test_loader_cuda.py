"""The CUDA target's control flow against a fake driver: order, waits, and a failure at every single call."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader_cuda_kit import (
    PIECE_BYTES,
    POOL_BYTES,
    SEED,
    CUresult,
    FakeDriver,
    FakeGpu,
    attach,
    no_notice,
    opening,
)
from loader_kit import CHUNK_BYTES, HEADER_BYTES, MIB, Blob, cpu_host_pool, make_blob
from understudyd.loader.child import prove
from understudyd.loader.faults import CrashPoints
from understudyd.loader.mapping import Mapping
from understudyd.loader.pacing import Pacer, Pause
from understudyd.loader.progress import Progress
from understudyd.loader.proof import PROOF_BYTES, pattern
from understudyd.loader.reading import ReadCancelled, Reader, ReadError, Reading
from understudyd.loader.transport import SharingRefused, TransportError
from understudyd.loader.transport_cuda import CudaTarget, open_cuda_target
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory_cuda import CudaArena

OFFSET = 513
POOL_OFFSET = 4099
SIZE_BYTES = 300_001
WAYS = {
    "arena": {},
    "through the pool": {"pool_offset": POOL_OFFSET},
    "pool": {"pool_offset": POOL_OFFSET, "arena_offset": None},
    "from the pool": {"pool_offset": POOL_OFFSET, "from_pool": True, "path": "/nowhere"},
}


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def driver(gpu: FakeGpu) -> FakeDriver:
    return FakeDriver(gpu)


@pytest.fixture
def arena(gpu: FakeGpu) -> Iterator[CudaArena]:
    arena = CudaArena(MIB, gpu=1, driver=FakeDriver(gpu))
    arena.write(MIB, pattern(SEED, PROOF_BYTES))
    yield arena
    arena.close()


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with cpu_host_pool(POOL_BYTES) as pool:
        yield pool


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob", SIZE_BYTES)


def open_target(
    arena: CudaArena,
    driver: FakeDriver,
    pool: HostPool | None = None,
    notify: Callable[[str], None] = no_notice,
    **changes: object,
) -> CudaTarget:
    """A target with its arena open, and pinned as far as that goes."""
    mapping = None if pool is None else Mapping(pool.fds(), pool.size_bytes)
    target = open_cuda_target(attach(arena, **changes), mapping, notify, driver)
    try:
        if target._pinning is not None and "cuMemHostRegister" not in driver.holds:
            target._pinning._thread.join()
        target.open_arena(opening(arena), ())
    except BaseException:
        with contextlib.suppress(TransportError):
            target.close()
        raise
    return target


def reader(target: CudaTarget, readers: int = 2) -> Reader:
    return Reader(
        target=target,
        arena_bytes=MIB,
        chunk_bytes=CHUNK_BYTES,
        threads=readers,
        pacer=Pacer(0),
        pause=Pause(),
        progress=Progress(),
        crash_points=CrashPoints(),
    )


def device_bytes(gpu: FakeGpu) -> bytes:
    (memory,) = gpu.memory.values()
    return memory.raw[:MIB]


def padded(offset: int, data: bytes, size_bytes: int) -> bytes:
    return bytes(offset) + data + bytes(size_bytes - offset - len(data))


@pytest.mark.parametrize("v13", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("copies_in_flight", [1, 2])
def test_bytes_arrive(
    gpu: FakeGpu, arena: CudaArena, blob: Blob, v13: bool, readers: int, copies_in_flight: int
) -> None:
    driver = FakeDriver(gpu, v13=v13)
    target = open_target(arena, driver, reader_threads=readers, copies_in_flight=copies_in_flight)
    assert Reading(blob.load(arena_offset=OFFSET), reader(target, readers)).run().verified
    assert device_bytes(gpu) == padded(OFFSET, blob.data, MIB)
    assert driver.most_in_flight == copies_in_flight
    target.close()
    assert driver.live == []


@pytest.mark.parametrize("pinned_pieces", [0, 1, 6])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_with_the_pool_pinned_in_part(
    gpu: FakeGpu, arena: CudaArena, pool: HostPool, blob: Blob, pinned_pieces: int, readers: int, way: str
) -> None:
    driver = FakeDriver(gpu)
    gate = threading.Semaphore(pinned_pieces)
    if pinned_pieces < 6:
        driver.holds["cuMemHostRegister"] = gate
    target = open_target(arena, driver, pool, reader_threads=readers)
    wait_pinned(target, pinned_pieces)
    if way == "from the pool":
        target.pool[POOL_OFFSET : POOL_OFFSET + SIZE_BYTES] = blob.data
    Reading(blob.load(**{"arena_offset": OFFSET} | WAYS[way]), reader(target, readers)).run()
    assert bytes(target.pool) == padded(POOL_OFFSET, b"" if way == "arena" else blob.data, POOL_BYTES)
    assert device_bytes(gpu) == padded(OFFSET, b"" if way == "pool" else blob.data, MIB)
    assert driver.most_in_flight <= 2
    straight = driver.copied_from.count("registered")
    if way in ("through the pool", "from the pool"):  # five chunks, one of them across two pieces
        assert straight == {0: 0, 1: 4, 6: 6}[pinned_pieces]
    else:
        assert straight == 0
    gate.release(6)
    target.close()
    assert driver.live == [] and not driver.registered


def wait_pinned(target: CudaTarget, pieces: int) -> None:
    assert target._pinning is not None
    while target._pinning._pinned_bytes < min(pieces * PIECE_BYTES, POOL_BYTES):
        assert not threading.Event().wait(0.001)


def test_closing_does_not_wait_until_all_is_pinned(gpu: FakeGpu, arena: CudaArena, pool: HostPool) -> None:
    driver = FakeDriver(gpu)
    gate = driver.holds["cuMemHostRegister"] = threading.Semaphore(2)
    target = open_target(arena, driver, pool)
    wait_pinned(target, 2)
    closing = threading.Thread(target=target.close)
    closing.start()
    assert target._pinning is not None
    assert target._pinning._closing.wait(10)
    gate.release(6)
    closing.join(10)
    assert driver.log.count("cuMemHostRegister") == 3  # the one that was under way is the last
    assert driver.live == []


def test_a_pool_that_cannot_be_pinned_is_a_notice(
    gpu: FakeGpu, arena: CudaArena, pool: HostPool, blob: Blob
) -> None:
    """Loads go through the ring where pinning has not come, for good."""
    for call, index in (("cuMemHostRegister", 1), ("cuMemHostRegister", 0), ("cuCtxSetCurrent", 1)):
        driver = FakeDriver(gpu)
        driver.fail_call = (call, index)
        driver.fail_with = CUresult.CUDA_ERROR_OUT_OF_MEMORY
        notices: list[str] = []
        target = open_target(arena, driver, pool, notify=notices.append)
        assert notices == [notices[0]] and f"{call} failed with CUDA_ERROR_OUT_OF_MEMORY" in notices[0]
        pinned = call == "cuMemHostRegister" and index == 1
        assert f"{PIECE_BYTES if pinned else 0} of {POOL_BYTES} bytes" in notices[0]
        Reading(blob.load(pool_offset=POOL_OFFSET), reader(target)).run()
        assert device_bytes(gpu) == padded(0, blob.data, MIB)
        assert driver.copied_from.count("registered") == (4 if pinned else 0)
        target.close()
        assert driver.live == []


def test_one_open_serves_many_loads(gpu: FakeGpu, driver: FakeDriver, arena: CudaArena, blob: Blob) -> None:
    target = open_target(arena, driver)
    for n in range(3):
        Reading(blob.load(arena_offset=n * 300_032), reader(target)).run()
    for n in range(3):
        assert device_bytes(gpu)[n * 300_032 :][: len(blob.data)] == blob.data
    assert driver.log.count("cuIpcOpenMemHandle") == 1
    target.close()


@pytest.mark.parametrize("way", ["arena", "through the pool", "from the pool"])
@pytest.mark.parametrize("fault", ["cancelled", "damaged"])
def test_a_load_that_ends_early_leaves_no_copy_behind(
    driver: FakeDriver, arena: CudaArena, pool: HostPool, blob: Blob, fault: str, way: str
) -> None:
    if (fault, way) == ("damaged", "from the pool"):
        return  # nothing is verified there
    target = open_target(arena, driver, pool, reader_threads=1)
    wrong = (*blob.xxh3[:3], blob.xxh3[3] ^ 1, *blob.xxh3[4:])
    load = blob.load(**{"xxh3": wrong if fault == "damaged" else blob.xxh3} | WAYS[way])
    reading = Reading(load, reader(target, 1))
    if fault == "cancelled":
        original = target._send

        def send_and_cancel(*arguments: object) -> None:
            original(*arguments)  # type: ignore[arg-type]
            reading.cancel()

        target._send = send_and_cancel  # type: ignore[method-assign]
    with pytest.raises(ReadError if fault == "damaged" else ReadCancelled):
        reading.run()
    assert not any(driver.pending.values())
    target.close()
    assert driver.live == []


def test_work_after_a_read_fault_finds_its_buffers(
    gpu: FakeGpu, driver: FakeDriver, arena: CudaArena, blob: Blob
) -> None:
    """A slot that a failed fill held must go back into the ring."""
    target = open_target(arena, driver)
    short = blob.path.with_name("short")
    short.write_bytes(blob.path.read_bytes()[: HEADER_BYTES + 10])
    for _ in range(10):
        with pytest.raises(ReadError):
            Reading(blob.load(path=str(short)), reader(target)).run()
    Reading(blob.load(), reader(target)).run()
    assert device_bytes(gpu)[: len(blob.data)] == blob.data
    target.close()


# -- every single call fails once --------------------------------------------------------------------


def live_through(
    driver: FakeDriver, arena: CudaArena, pool: HostPool, blob: Blob, notify: Callable[[str], None]
) -> None:
    """Open, prove, load through the ring, to, through and from the pool, close."""
    target = open_target(arena, driver, pool, notify, reader_threads=1)
    try:
        prove(target, opening(arena))
        for changes in WAYS.values():
            Reading(blob.load(**changes), reader(target, 1)).run()
    finally:
        target.close()


RELEASES = {
    "cuIpcCloseMemHandle": "ipc",
    "cuStreamDestroy": "stream",
    "cuMemFreeHost": "pinned",
    "cuMemHostUnregister": "registered",
    "cuEventDestroy": "event",
    "cuDevicePrimaryCtxRelease": "context",
}


def test_failure_at_every_call_is_named_and_leaks_nothing(
    gpu: FakeGpu, driver: FakeDriver, arena: CudaArena, pool: HostPool, blob: Blob
) -> None:
    live_through(driver, arena, pool, blob, no_notice)
    assert {"cuMemHostRegister", "cuMemHostUnregister", "cuMemcpyDtoHAsync"} <= set(driver.log)
    first_register = driver.log.index("cuMemHostRegister")
    for index, name in enumerate(driver.log):
        arena.write(MIB, pattern(SEED, PROOF_BYTES))
        failing = FakeDriver(gpu)
        failing.fail_at = index
        failing.fail_with = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        message = f"{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS"
        notices: list[str] = []
        if name == "cuMemHostRegister" or index == first_register - 1:  # no reason to give up
            live_through(failing, arena, pool, blob, notices.append)
            assert message in notices[0]
        else:
            kind = SharingRefused if name == "cuIpcOpenMemHandle" else TransportError
            with pytest.raises(TransportError, match=message) as caught:
                live_through(failing, arena, pool, blob, notices.append)
            assert type(caught.value) is kind and not notices
        left = [kind for kind, _ in failing.live]
        assert left == ([RELEASES[name]] if name in RELEASES else []), f"after {name} failed"
