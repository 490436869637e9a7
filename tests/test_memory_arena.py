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
from understudyd.shell import memory, memory_cuda
from understudyd.shell.memory import ArenaError, CpuArena
from understudyd.shell.memory_cuda import CudaArena, DeviceMemory


def test_every_page_is_there() -> None:
    with cpu_arena(8 * MIB) as arena:
        assert os.fstat(arena.fds()[0]).st_blocks * 512 == 8 * MIB


def test_prefault_without_the_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*arguments: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.linux, "populate", too_old)
    with cpu_arena(8 * MIB) as arena:
        assert os.fstat(arena.fds()[0]).st_blocks * 512 == 8 * MIB


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


def test_auto_size_is_a_share_of_what_is_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9999999 kB\nMemAvailable:    1048577 kB\n")
    assert memory.auto_size_bytes(0.5, meminfo=meminfo) == 512 * MIB
    meminfo.write_text("MemTotal: 1 kB\n")
    with pytest.raises(ArenaError, match="does not say"):
        memory.auto_size_bytes(0.5, meminfo=meminfo)


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
    fields = arena.attach_fields()
    assert (fields.transport, fields.arena_bytes, fields.gpu_uuid) == ("cuda", MIB, gpu.uuid_text(1))
    assert gpu.exported[fields.ipc_handle] in gpu.memory
    assert arena.fds() == ()
    assert driver.log.count("cuIpcGetMemHandle") == 1
    arena.synchronise()
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


def test_cuda_arena_failure_at_every_call() -> None:
    gpu = FakeGpu()
    driver = FakeDriver(gpu)
    CudaArena(MIB, driver=driver)
    calls = driver.log[: driver.log.index("cuIpcGetMemHandle") + 1]
    assert len(calls) > 5
    for index, name in enumerate(calls):
        driver = FakeDriver(gpu)
        driver.fail_at = index
        driver.fail_with = CUresult.CUDA_ERROR_NOT_SUPPORTED
        with pytest.raises(ArenaError, match=f"{name} failed with CUDA_ERROR_NOT_SUPPORTED"):
            CudaArena(MIB, driver=driver)
        gc.collect()
        assert driver.live == [], f"after {name} failed"


def test_cuda_arena_too_large_says_what_to_do() -> None:
    gpu = FakeGpu(free_bytes=MIB)
    with pytest.raises(ArenaError, match="CUDA_ERROR_OUT_OF_MEMORY: the arena does not fit"):
        CudaArena(2 * MIB, driver=FakeDriver(gpu))


def test_a_failing_free_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(FakeGpu())
    arena = CudaArena(MIB, driver=driver)
    driver.fail_at = len(driver.log) + 1
    arena.close()
    assert "cuMemFree failed with CUDA_ERROR_INVALID_VALUE" in caplog.text
    assert "context" not in dict(driver.live)


def test_cuda_auto_size_leaves_the_reserve() -> None:
    driver = FakeDriver(FakeGpu(free_bytes=100 * MIB + 17))
    assert memory_cuda.auto_size_bytes(31 * MIB, driver=driver) == 68 * MIB
    assert driver.live == []
    with pytest.raises(ArenaError, match="reserve less"):
        memory_cuda.auto_size_bytes(99 * MIB, driver=driver)


def test_without_cuda_bindings_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ArenaError, match="pip install"):
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
