"""Arenas: present, sealed, shared without a copy, and gone when the last user is."""

import ctypes
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loader_cuda_kit import CUresult, FakeDriver, FakeGpu
from loader_kit import MIB, cpu_arena
from understudyd.loader.proof import PROOF_AREA_BYTES
from understudyd.shell import memory, memory_cuda
from understudyd.shell.memory import ArenaError, CpuArena
from understudyd.shell.memory_cuda import CudaArena, DeviceMemory


def test_every_page_is_there() -> None:
    with cpu_arena(8 * MIB) as arena:
        assert os.fstat(arena.fds()[0]).st_blocks * 512 == 8 * MIB + PROOF_AREA_BYTES


def test_prefault_without_the_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.linux, "populate", too_old)
    with cpu_arena(8 * MIB) as arena:
        assert os.fstat(arena.fds()[0]).st_blocks * 512 == 8 * MIB + PROOF_AREA_BYTES


@pytest.mark.parametrize("whole_bytes", [1, 4096, 3 * MIB + 17, 65 * MIB])
def test_prefault_in_short_writes(monkeypatch: pytest.MonkeyPatch, whole_bytes: int) -> None:
    """A signal may cut a write short anywhere."""

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwrite(fd, bytes(buffers[0][: len(buffers[0]) // 2 + 1]), offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    fd = os.memfd_create("test")
    os.ftruncate(fd, whole_bytes)
    with mmap.mmap(fd, whole_bytes) as mapping:
        memory._prefault(fd, mapping)
    status = os.fstat(fd)
    os.close(fd)
    assert (status.st_size, status.st_blocks * 512) == (whole_bytes, -(-whole_bytes // 4096) * 4096)


def test_memory_that_is_not_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwritev(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(ArenaError, match=r"cannot have .* GiB of shared memory"):
        CpuArena(MIB)
    assert set(os.listdir("/proc/self/fd")) == before


def test_nobody_can_shrink_it() -> None:
    with cpu_arena(MIB) as arena, pytest.raises(PermissionError):
        os.ftruncate(arena.fds()[0], 4096)


@pytest.mark.parametrize("size_bytes", [0, -1, 1 << 60])
def test_a_senseless_size_is_refused_and_leaves_nothing(size_bytes: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError, match="is not possible"):
        CpuArena(size_bytes)
    assert set(os.listdir("/proc/self/fd")) == before


def test_closing_twice_is_harmless() -> None:
    arena = CpuArena(MIB)
    arena.close()
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        arena.tensor()


def test_tensor_is_the_arena_and_outlives_it() -> None:
    import torch

    arena = CpuArena(MIB)
    tensor = arena.tensor()
    assert tensor.shape == (MIB,) and tensor.dtype == torch.uint8
    other = mmap.mmap(arena.fds()[0], MIB, mmap.MAP_SHARED)  # as a loader sees it
    other[512:517] = b"hello"
    assert bytes(tensor[512:517].tolist()) == b"hello"
    tensor[1024] = 7
    assert other[1024] == 7
    assert tensor.data_ptr() == arena.tensor().data_ptr()
    arena.close()
    gc.collect()
    assert bytes(tensor[512:517].tolist()) == b"hello"
    other.close()


def test_a_few_bytes_are_read_and_written_behind_the_arena_too() -> None:
    with cpu_arena(MIB) as arena:
        arena.write(MIB - 2, b"1234")
        assert arena.read(MIB - 3, 6) == b"\0001234\0"
        assert bytes(arena.tensor()[-2:].tolist()) == b"12"


# -- what memory is available ------------------------------------------------------------------------


def fake_system(root: Path, cgroup: str, files: dict[str, str], available_kb: int = 8 * 1024 * 1024) -> Path:
    """/proc and /sys with 8 GiB available and these files in /sys/fs/cgroup."""
    for name, content in {
        "proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available_kb} kB\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v2(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 7\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\nshmem 9\n"
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": stat,
    }


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{used}\n",
        f"memory/{folder}memory.stat": f"active_file 1\ntotal_active_file {cached}\ntotal_inactive_file 0\n",
    }


GIB = 1024 * MIB
V1_NO_LIMIT = 9223372036854771712
V1_LINES = "5:devices:/a\n4:cpu,memory:/a/b\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "available_bytes"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/a/b\n", v2("a/b/", "max\n", GIB), 8 * GIB),
        ("0::/a/b\n", v2("a/b/", f"{4 * GIB}\n", GIB), 3 * GIB),
        ("0::/a/b\n", v2("a/b/", f"{4 * GIB}\n", 4 * GIB, cached=3 * GIB), 3 * GIB),
        ("0::/a/b\n", v2("a/b/", "max\n", 0) | v2("a/", f"{2 * GIB}\n", GIB), GIB),
        ("0::/a/b\n", v2("a/b/", f"{GIB}\n", 2 * GIB), 0),
        ("0::/gone\n", v2("", f"{2 * GIB}\n", GIB), GIB),
        ("0::/a/b\n", v2("a/c/", "1\n", 1), 8 * GIB),
        (V1_LINES, v1("a/b/", V1_NO_LIMIT, GIB), 8 * GIB),
        (V1_LINES, v1("a/b/", 4 * GIB, 4 * GIB, cached=GIB), GIB),
        (V1_LINES, v1("a/b/", V1_NO_LIMIT, 0) | v1("", 2 * GIB, GIB), GIB),
        (V1_LINES, v1("a/b/", 4 * GIB, 0) | v2("", f"{GIB}\n", 0), GIB),
    ],
)
def test_available_memory_is_what_every_control_group_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, str], available_bytes: int
) -> None:
    assert memory.memory_available_bytes(fake_system(tmp_path, cgroup, files)) == available_bytes


def test_available_memory_without_control_groups(tmp_path: Path) -> None:
    root = fake_system(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert memory.memory_available_bytes(root) == 8 * GIB
    (root / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(ArenaError, match="does not say"):
        memory.memory_available_bytes(root)


def test_available_memory_here() -> None:
    assert 0 < memory.memory_available_bytes() < 1 << 60


def test_the_module_imports_no_torch() -> None:
    code = (
        "import sys, understudyd.shell.memory, understudyd.shell.memory_cuda; print('torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"


# -- on a GPU, against a fake driver -----------------------------------------------------------------


def test_cuda_arena_is_exported_once_and_freed() -> None:
    gpu = FakeGpu()
    driver = FakeDriver(gpu)
    arena = CudaArena(MIB, gpu=1, driver=driver)
    fields = arena.open_fields()
    assert (fields.transport, fields.arena_bytes, arena.gpu_uuid) == ("cuda_ipc", MIB, gpu.uuid_text(1))
    assert arena.ipc_refusal is None
    assert gpu.exported[fields.ipc_handle] == fields.address
    assert len(gpu.memory[fields.address]) == MIB + PROOF_AREA_BYTES
    assert arena.fds() == ()
    assert driver.log.count("cuIpcGetMemHandle") == 1
    arena.synchronise()
    arena.close()
    arena.close()
    assert driver.live == []
    for use in (arena.open_fields, arena.synchronise, arena.tensor, lambda: arena.read(0, 1)):
        with pytest.raises(ArenaError, match="closed"):
            use()


@pytest.mark.parametrize("size_bytes", [0, 5, 64 * 1024, 300_001])
def test_cuda_arena_reads_and_writes_on_its_own_stream(size_bytes: int) -> None:
    gpu = FakeGpu()
    driver = FakeDriver(gpu)
    arena = CudaArena(MIB, driver=driver)
    content = os.urandom(size_bytes)
    arena.write(MIB - 7, content)
    (held,) = gpu.memory.values()
    assert held.raw == bytes(MIB - 7) + content + bytes(PROOF_AREA_BYTES + 7 - size_bytes)
    assert arena.read(MIB - 7, size_bytes) == content
    assert not {"cuCtxSynchronize", "cuMemHostRegister"} & set(driver.log)
    for offset, length in ((-1, 2), (MIB + PROOF_AREA_BYTES - 1, 2)):
        with pytest.raises(ArenaError, match="not in the arena"):
            arena.read(offset, length)
    arena.close()
    assert driver.live == []


@pytest.mark.parametrize("share", [True, False])
def test_cuda_arena_that_is_not_shared_is_reached_by_its_address(share: bool) -> None:
    driver = FakeDriver(FakeGpu())
    driver.fail_call = ("cuIpcGetMemHandle", 0)
    driver.fail_with = CUresult.CUDA_ERROR_NOT_SUPPORTED
    arena = CudaArena(MIB, driver=driver, share=share)
    fields = arena.open_fields()
    assert (fields.transport, fields.ipc_handle) == ("cuda_local", b"")
    assert ("memory", fields.address) in driver.live
    why = (
        "cuIpcGetMemHandle failed with CUDA_ERROR_NOT_SUPPORTED: CUDA IPC is" if share else "not to be shared"
    )
    assert arena.ipc_refusal is not None and why in arena.ipc_refusal
    arena.close()
    assert driver.live == []


def test_cuda_arena_by_uuid() -> None:
    gpu = FakeGpu()
    arena = CudaArena(MIB, gpu=gpu.uuid_text(1), driver=FakeDriver(gpu, v13=True))
    assert arena.ordinal == 1
    with pytest.raises(ArenaError, match="no visible GPU"):
        CudaArena(MIB, gpu="GPU-00000000-0000-0000-0000-000000000000", driver=FakeDriver(gpu))


def test_cuda_memory_lives_while_something_holds_it() -> None:
    """Torch keeps the object whose `__cuda_array_interface__` it wrapped."""
    driver = FakeDriver(FakeGpu())
    arena = CudaArena(MIB, driver=driver)
    held = arena._memory
    assert isinstance(held, DeviceMemory)
    interface = held.__cuda_array_interface__
    assert interface["shape"] == (MIB,) and interface["data"] == (held.address, False)
    arena.close()
    assert "memory" in dict(driver.live)
    del held
    assert driver.live == []


def test_cuda_arena_failure_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    """Named, and nothing is left: an error to begin with, or while it is used, or a warning at the end."""

    def live_through(driver: FakeDriver) -> None:
        arena = CudaArena(MIB, driver=driver)
        try:
            arena.write(0, b"1")
            arena.read(0, 1)
            arena.synchronise()
        finally:
            arena.close()

    gpu = FakeGpu()
    whole = FakeDriver(gpu)
    live_through(whole)
    closes_at = len(whole.log) - whole.log[::-1].index("cuCtxSynchronize")
    for index, name in enumerate(whole.log):
        driver = FakeDriver(gpu)
        driver.fail_at = index
        driver.fail_with = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        message = f"{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS"
        caplog.clear()
        if index >= closes_at:
            live_through(driver)
            assert message in caplog.text
        elif name == "cuIpcGetMemHandle":
            live_through(driver)
        else:
            with pytest.raises(ArenaError, match=message):
                live_through(driver)
        gc.collect()
        left = [kind for kind, _ in driver.live]
        assert left == ([RELEASES[name]] if index >= closes_at and name in RELEASES else []), f"after {name}"


RELEASES = {
    "cuMemFree": "memory",
    "cuMemFreeHost": "pinned",
    "cuStreamDestroy": "stream",
    "cuDevicePrimaryCtxRelease": "context",
}


def test_cuda_arena_too_large_says_what_to_do() -> None:
    gpu = FakeGpu(free_bytes=3 * MIB)
    with pytest.raises(ArenaError, match="CUDA_ERROR_OUT_OF_MEMORY: the arena does not fit"):
        CudaArena(2 * MIB, driver=FakeDriver(gpu))


def test_cuda_auto_size_leaves_the_reserve_and_the_proof_area() -> None:
    driver = FakeDriver(FakeGpu(free_bytes=100 * MIB + 17))
    assert memory_cuda.free_bytes(driver=driver) == 100 * MIB + 17
    size_bytes = memory_cuda.auto_size_bytes(31 * MIB, driver=driver)
    assert size_bytes == 66 * MIB
    assert driver.live == []
    arena = CudaArena(size_bytes, driver=driver)
    arena.close()
    with pytest.raises(ArenaError, match="reserve less"):
        memory_cuda.auto_size_bytes(97 * MIB, driver=driver)


def test_cuda_auto_size_failure_at_every_call() -> None:
    whole = FakeDriver(FakeGpu())
    memory_cuda.auto_size_bytes(MIB, driver=whole)
    for index, name in enumerate(whole.log):
        driver = FakeDriver(FakeGpu())
        driver.fail_at = index
        if name == "cuDevicePrimaryCtxRelease":
            assert memory_cuda.auto_size_bytes(MIB, driver=driver) > 0
            continue
        with pytest.raises(ArenaError, match=f"{name} failed with CUDA_ERROR_INVALID_VALUE"):
            memory_cuda.auto_size_bytes(MIB, driver=driver)
        assert driver.live == []


def test_without_cuda_bindings_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ArenaError, match="extra cuda"):
        CudaArena(MIB)


def test_fake_copies_wait_for_a_wait() -> None:
    """The fake itself: nothing has moved before something waited."""
    driver = FakeDriver(FakeGpu())
    driver.cuCtxSetCurrent(1)
    stream, source, target = (
        driver.cuStreamCreate(1)[1],
        driver.cuMemHostAlloc(4, 0)[1],
        driver.cuMemAlloc(4)[1],
    )
    ctypes.memmove(source, b"abcd", 4)
    driver.cuMemcpyHtoDAsync(int(target), source, 4, stream)
    assert ctypes.string_at(int(target), 4) == bytes(4)
    driver.cuStreamSynchronize(stream)
    assert ctypes.string_at(int(target), 4) == b"abcd"
