"""The CUDA target's control flow against a fake driver: order, waits, and a failure at every single call."""

from pathlib import Path

import pytest

from loader_cuda_kit import CUresult, FakeDriver, FakeGpu
from loader_kit import CHUNK_BYTES, HEADER_BYTES, MIB, Blob, make_blob
from understudyd.loader.cuda import Cuda, CudaError
from understudyd.loader.faults import CrashPoints
from understudyd.loader.pacing import Pacer
from understudyd.loader.progress import Progress
from understudyd.loader.reading import ReadCancelled, Reader, ReadError, Reading
from understudyd.loader.transport import TransportError
from understudyd.loader.transport_cuda import CudaTarget, open_cuda_target
from understudyd.loader.wire import Attach
from understudyd.shell.memory_cuda import CudaArena

OFFSET = 512


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def arena(gpu: FakeGpu) -> CudaArena:
    return CudaArena(MIB, gpu=1, driver=FakeDriver(gpu))


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


def attach(arena: CudaArena, *, readers: int = 2, copies_in_flight: int = 2) -> Attach:
    fields = arena.attach_fields()
    return Attach(
        transport=fields.transport,
        arena_bytes=fields.arena_bytes,
        ipc_handle=fields.ipc_handle,
        gpu_uuid=fields.gpu_uuid,
        chunk_bytes=CHUNK_BYTES,
        reader_threads=readers,
        copies_in_flight=copies_in_flight,
        parent_pid=1,
    )


def reader(target: CudaTarget, readers: int = 2) -> Reader:
    return Reader(
        target=target,
        arena_bytes=MIB,
        chunk_bytes=CHUNK_BYTES,
        threads=readers,
        pacer=Pacer(0),
        progress=Progress(),
        crash_points=CrashPoints(),
    )


def device_bytes(gpu: FakeGpu) -> bytes:
    (memory,) = gpu.memory.values()
    return memory.raw


@pytest.mark.parametrize("v13", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("copies_in_flight", [1, 2])
def test_bytes_arrive(
    gpu: FakeGpu, arena: CudaArena, blob: Blob, v13: bool, readers: int, copies_in_flight: int
) -> None:
    driver = FakeDriver(gpu, v13=v13)
    target = open_cuda_target(attach(arena, readers=readers, copies_in_flight=copies_in_flight), driver)
    assert Reading(blob.load(arena_offset=OFFSET), reader(target, readers)).run().verified
    size_bytes = len(blob.data)
    assert device_bytes(gpu)[OFFSET : OFFSET + size_bytes] == blob.data
    assert not any(device_bytes(gpu)[:OFFSET]) and not any(device_bytes(gpu)[OFFSET + size_bytes :])
    assert driver.most_in_flight == copies_in_flight
    target.close()
    assert driver.live == []


def test_one_open_serves_many_loads(gpu: FakeGpu, arena: CudaArena, blob: Blob) -> None:
    driver = FakeDriver(gpu)
    target = open_cuda_target(attach(arena), driver)
    for n in range(3):
        Reading(blob.load(arena_offset=n * 300_032), reader(target)).run()
    for n in range(3):
        assert device_bytes(gpu)[n * 300_032 :][: len(blob.data)] == blob.data
    assert driver.log.count("cuIpcOpenMemHandle") == 1
    target.close()


@pytest.mark.parametrize("fault", ["cancelled", "damaged"])
def test_a_load_that_ends_early_leaves_no_copy_behind(
    gpu: FakeGpu, arena: CudaArena, blob: Blob, fault: str
) -> None:
    driver = FakeDriver(gpu)
    target = open_cuda_target(attach(arena, readers=1), driver)
    wrong = (*blob.xxh3[:3], blob.xxh3[3] ^ 1, *blob.xxh3[4:])
    reading = Reading(blob.load(xxh3=wrong if fault == "damaged" else blob.xxh3), reader(target, 1))
    if fault == "cancelled":
        original = target._copy

        def copy_and_cancel(*arguments: object) -> None:
            original(*arguments)  # type: ignore[arg-type]
            reading.cancel()

        target._copy = copy_and_cancel  # type: ignore[method-assign]
    with pytest.raises(ReadError if fault == "damaged" else ReadCancelled):
        reading.run()
    assert not any(driver.pending.values())
    target.close()
    assert driver.live == []


def test_work_after_a_read_fault_finds_its_buffers(gpu: FakeGpu, arena: CudaArena, blob: Blob) -> None:
    """A slot that a failed fill held must go back into the ring."""
    target = open_cuda_target(attach(arena), FakeDriver(gpu))
    short = blob.path.with_name("short")
    short.write_bytes(blob.path.read_bytes()[: HEADER_BYTES + 10])
    for _ in range(10):
        with pytest.raises(ReadError):
            Reading(blob.load(path=str(short)), reader(target)).run()
    Reading(blob.load(), reader(target)).run()
    assert device_bytes(gpu)[: len(blob.data)] == blob.data
    target.close()


def calls_of_a_whole_life(gpu: FakeGpu, arena: CudaArena, blob: Blob) -> list[str]:
    driver = FakeDriver(gpu)
    target = open_cuda_target(attach(arena, readers=1), driver)
    Reading(blob.load(), reader(target, 1)).run()
    target.close()
    return driver.log


RELEASES = {
    "cuIpcCloseMemHandle": "ipc",
    "cuStreamDestroy": "stream",
    "cuMemFreeHost": "pinned",
    "cuEventDestroy": "event",
    "cuDevicePrimaryCtxRelease": "context",
}


def test_failure_at_every_call_is_named_and_leaks_nothing(gpu: FakeGpu, arena: CudaArena, blob: Blob) -> None:
    calls = calls_of_a_whole_life(gpu, arena, blob)
    assert len(calls) > 30
    for index, name in enumerate(calls):
        driver = FakeDriver(gpu)
        driver.fail_at = index
        driver.fail_with = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(TransportError, match=f"{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
            live_through(driver, arena, blob)
        left = [kind for kind, _ in driver.live]
        assert left == ([RELEASES[name]] if name in RELEASES else []), f"after {name} failed"


def live_through(driver: FakeDriver, arena: CudaArena, blob: Blob) -> None:
    target = open_cuda_target(attach(arena, readers=1), driver)
    try:
        Reading(blob.load(), reader(target, 1)).run()
    finally:
        target.close()


def test_refused_ipc_says_why(gpu: FakeGpu, arena: CudaArena) -> None:
    driver = FakeDriver(gpu)
    gpu.exported.clear()
    with pytest.raises(
        TransportError, match="cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_HANDLE: CUDA IPC is"
    ):
        open_cuda_target(attach(arena), driver)
    assert driver.live == []


def test_an_unknown_gpu_is_named(gpu: FakeGpu, arena: CudaArena) -> None:
    order = attach(arena)
    gpu.uuids.pop()
    with pytest.raises(TransportError, match=f"no visible GPU has the UUID {order.gpu_uuid}"):
        open_cuda_target(order, FakeDriver(gpu))


def test_a_missing_driver_library_is_a_cuda_error() -> None:
    """cuda-bindings raises RuntimeErrors where libcuda is not there."""

    class NoLibrary:
        def cuInit(self, flags: int) -> tuple[int]:
            raise RuntimeError("libcuda.so.1 was not found")

    with pytest.raises(CudaError, match="cuInit failed with RuntimeError: libcuda"):
        Cuda(NoLibrary()).device(0)
