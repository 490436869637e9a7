"""How a loader opens a GPU's arena, and whole lives of loaders over a fake driver."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader_cuda_kit import (
    POOL_BYTES,
    SEED,
    FakeDriver,
    FakeGpu,
    attach,
    no_notice,
    opening,
)
from loader_kit import MIB, Blob, cpu_host_pool, make_blob
from understudyd.loader import wire
from understudyd.loader.child import run
from understudyd.loader.cuda import Cuda, CudaError
from understudyd.loader.faults import CrashPoints
from understudyd.loader.mapping import Mapping
from understudyd.loader.proof import PROOF_BYTES, holds, pattern
from understudyd.loader.transport import SharingRefused, TransportError
from understudyd.loader.transport_cuda import CudaTarget, open_cuda_target
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory_cuda import CudaArena


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
    return make_blob(tmp_path / "blob")


# -- opening -----------------------------------------------------------------------------------------


def test_refused_ipc_says_why(gpu: FakeGpu, driver: FakeDriver, arena: CudaArena) -> None:
    gpu.exported.clear()
    target = open_cuda_target(attach(arena), None, no_notice, driver)
    with pytest.raises(
        SharingRefused, match="cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_HANDLE: CUDA IPC is"
    ):
        target.open_arena(opening(arena), ())
    target.close()
    assert driver.live == []


def test_a_thread_of_the_parent_uses_the_address_and_leaves_the_context_alone(
    driver: FakeDriver, arena: CudaArena
) -> None:
    target = open_cuda_target(attach(arena, parent_pid=0), None, no_notice, driver)
    target.open_arena(opening(arena, transport="cuda_local", address=arena.open_fields().address), ())
    assert target.read(MIB, PROOF_BYTES) == pattern(SEED, PROOF_BYTES)
    target.close()
    assert not {"cuDevicePrimaryCtxSetFlags", "cuIpcOpenMemHandle"} & set(driver.log)
    assert driver.live == []


@pytest.mark.parametrize(
    "changes", [{"transport": "memfd"}, {"transport": "cuda_local", "address": 4096}, {"ipc_handle": b"12"}]
)
def test_what_a_process_cannot_open(driver: FakeDriver, arena: CudaArena, changes: dict[str, object]) -> None:
    target = open_cuda_target(attach(arena), None, no_notice, driver)
    with pytest.raises(TransportError) as caught:
        target.open_arena(opening(arena, **changes), ())
    assert not isinstance(caught.value, SharingRefused)
    target.close()
    assert driver.live == []


def test_an_unknown_gpu_is_named(gpu: FakeGpu, driver: FakeDriver, arena: CudaArena) -> None:
    gpu.uuids.pop()
    with pytest.raises(TransportError, match=f"no visible GPU has the UUID {arena.gpu_uuid}"):
        open_cuda_target(attach(arena), None, no_notice, driver)
    assert driver.live == []


def test_a_missing_driver_library_is_a_cuda_error() -> None:
    """cuda-bindings raises RuntimeErrors where libcuda is not there."""

    class NoLibrary:
        def cuInit(self, flags: int) -> tuple[int]:
            raise RuntimeError("libcuda.so.1 was not found")

    with pytest.raises(CudaError, match="cuInit failed with RuntimeError: libcuda"):
        Cuda(NoLibrary()).device(0)


# -- a whole loader over the fake driver -------------------------------------------------------------


@contextlib.contextmanager
def loader(arena: CudaArena, driver: FakeDriver, pool: HostPool) -> Iterator[socket.socket]:
    """A loader on a thread, as if it were a process; the parent's end of its socket."""

    def open_fake(order: wire.Attach, fds: object, notify: Callable[[str], None]) -> CudaTarget:
        return open_cuda_target(order, Mapping(fds, order.pool_bytes), notify, driver)  # type: ignore[arg-type]

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(20)
    thread = threading.Thread(target=run, args=(theirs, CrashPoints(), open_fake))
    with ours, theirs:
        thread.start()
        try:
            order = attach(arena, parent_pid=0, heartbeat_s=60.0)
            socket.send_fds(ours, [wire.encode(order)], list(pool.fds()))
            yield ours
        finally:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
            thread.join(20)
    assert not thread.is_alive()


def next_report(sock: socket.socket) -> wire.Reports:
    """Whatever is no heartbeat."""
    while isinstance(report := wire.decode_report(sock.recv(wire.MAX_PACKET_BYTES)), wire.Heartbeat):
        pass
    return report


def local_opening(arena: CudaArena, **changes: object) -> bytes:
    fields = {"transport": "cuda_local", "address": arena.open_fields().address}
    return wire.encode(opening(arena, **fields | changes))


def test_a_loader_from_attach_to_stop(
    driver: FakeDriver, arena: CudaArena, pool: HostPool, blob: Blob
) -> None:
    with loader(arena, driver, pool) as sock:
        assert isinstance(next_report(sock), wire.Attached)
        assert "pinned" in dict(driver.live) and driver.log.count("cuMemAlloc") == 0
        sock.send(local_opening(arena))
        assert isinstance(next_report(sock), wire.Ready)
        assert holds(arena.read(MIB, PROOF_BYTES), SEED + 1)
        sock.send(wire.encode(blob.load(pool_offset=0)))
        assert isinstance(next_report(sock), wire.Loaded)
        assert arena.read(0, len(blob.data)) == blob.data
        sock.send(wire.encode(wire.Stop()))
    assert driver.live == []


@pytest.mark.parametrize("fault", ["open", "proof"])
def test_a_loader_says_that_sharing_is_refused(
    gpu: FakeGpu, driver: FakeDriver, arena: CudaArena, pool: HostPool, fault: str
) -> None:
    with loader(arena, driver, pool) as sock:
        assert isinstance(next_report(sock), wire.Attached)
        if fault == "open":
            gpu.exported.clear()
            sock.send(wire.encode(opening(arena)))
        else:
            sock.send(local_opening(arena, proof_seed=99))
        fatal = next_report(sock)
        assert isinstance(fatal, wire.Fatal) and fatal.is_refused
        assert sock.recv(1) == b""
    assert driver.live == []


def test_a_loader_whose_device_breaks_says_so_and_lets_go(
    driver: FakeDriver, arena: CudaArena, pool: HostPool, blob: Blob
) -> None:
    with loader(arena, driver, pool) as sock:
        next_report(sock)
        sock.send(local_opening(arena))
        next_report(sock)
        driver.fail_call = ("cuEventRecord", 0)
        sock.send(wire.encode(blob.load()))
        fatal = next_report(sock)
        assert isinstance(fatal, wire.Fatal) and not fatal.is_refused
        assert "cuEventRecord failed with CUDA_ERROR_INVALID_VALUE" in fatal.message
        assert sock.recv(1) == b""
    assert driver.live == []


def test_a_loader_passes_the_notice_on(driver: FakeDriver, arena: CudaArena, pool: HostPool) -> None:
    driver.fail_call = ("cuMemHostRegister", 0)
    with loader(arena, driver, pool) as sock:
        reports = {type(next_report(sock)) for _ in range(2)}
        assert reports == {wire.Attached, wire.Notice}
