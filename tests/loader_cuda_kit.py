"""A CUDA driver without a GPU: cuda-bindings' call conventions and the documented return codes.

`FakeGpu` is the hardware, `FakeDriver` is one process's view of it. Copies on a stream happen only when
something waits for them, so that a forgotten wait shows as wrong bytes. Every call can be made to fail.
Whatever a real driver would do slowly or wrongly without an error is an assertion here.
"""

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from loader_kit import CHUNK_BYTES, KIB, MIB
from understudyd.loader import wire
from understudyd.loader.proof import PROOF_BYTES
from understudyd.shell.memory_cuda import CudaArena

IPC_HANDLE_BYTES = 64


# What each function gives beside its status; a call that fails gives as many times None.
_VALUES = {
    "cuDeviceGetCount": 1,
    "cuDeviceGet": 1,
    "cuDeviceGetUuid": 1,
    "cuDeviceGetUuid_v2": 1,
    "cuDevicePrimaryCtxRetain": 1,
    "cuMemAlloc": 1,
    "cuMemGetInfo": 2,
    "cuIpcGetMemHandle": 1,
    "cuIpcOpenMemHandle": 1,
    "cuMemHostAlloc": 1,
    "cuStreamCreate": 1,
    "cuEventCreate": 1,
}


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_MAP_FAILED = 205
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_SUPPORTED = 801


class Number:
    """CUdeviceptr, CUcontext, CUstream and the like: an opaque number."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value

    def __index__(self) -> int:
        return self._value


class CUipcMemHandle:
    def __init__(self) -> None:
        self.content = (ctypes.c_char * IPC_HANDLE_BYTES)()

    def getPtr(self) -> int:
        return ctypes.addressof(self.content)


class CUuuid:
    def __init__(self, content: bytes) -> None:
        self.bytes = content


class FakeGpu:
    """Device memory shared by all processes, and the UUIDs of the GPUs that there are."""

    def __init__(self, count: int = 2, free_bytes: int = 1 << 30) -> None:
        self.uuids = [bytes([0x10 * (n + 1)] * 16) for n in range(count)]
        self.free_bytes = free_bytes
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.exported: dict[bytes, int] = {}

    def uuid_text(self, ordinal: int) -> str:
        h = self.uuids[ordinal].hex()
        return f"GPU-{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"

    def allocate(self, size_bytes: int) -> int:
        buffer = (ctypes.c_char * size_bytes)()
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address


class FakeDriver:
    """The module `cuda.bindings.driver` of one process; `v13` leaves out what 13.x left out."""

    CUipcMemHandle = CUipcMemHandle

    def __init__(self, gpu: FakeGpu, *, v13: bool = False) -> None:
        self._gpu = gpu
        self._v13 = v13
        self._current = threading.local()
        self._numbers = itertools.count(1000)
        self._pinned: dict[int, Any] = {}
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, tuple[int, int] | None] = {}
        self.most_in_flight = 0
        self.live: list[tuple[str, int]] = []
        self.registered: dict[int, int] = {}
        self.copied_from: list[str] = []
        self.holds: dict[str, threading.Semaphore] = {}
        self.log: list[str] = []
        self.fail_at: int | None = None
        self.fail_call: tuple[str, int] = ("", 0)
        self.fail_with = CUresult.CUDA_ERROR_INVALID_VALUE

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu") or (self._v13 and name == "cuDeviceGetUuid_v2"):
            raise AttributeError(name)
        function = getattr(type(self), f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append(name)
            if name in self.holds:
                assert self.holds[name].acquire(timeout=20)
            if self._is_to_fail(name):
                return (self.fail_with, *[None] * _VALUES.get(name, 0))
            return function(self, *arguments)

        return call

    def _is_to_fail(self, name: str) -> bool:
        """The call number `fail_at`, or the n-th of a name from now on."""
        if name == self.fail_call[0]:
            self.fail_call = (name, self.fail_call[1] - 1)
            return self.fail_call[1] == -1
        return len(self.log) - 1 == self.fail_at

    def _ok(self, *values: Any) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS, *values)

    def _needs_context(self) -> tuple[Any, ...] | None:
        return (
            None if getattr(self._current, "context", None) else (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        )

    def _born(self, kind: str, number: int) -> None:
        self.live.append((kind, number))

    def _died(self, kind: str, number: Any) -> tuple[Any, ...]:
        if (kind, int(number)) not in self.live:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        self.live.remove((kind, int(number)))
        return self._ok()

    # -- devices and contexts

    def _cuInit(self, flags: int) -> tuple[Any, ...]:
        return self._ok() if self._gpu.uuids else (CUresult.CUDA_ERROR_NO_DEVICE,)

    def _cuDeviceGetCount(self) -> tuple[Any, ...]:
        return self._ok(len(self._gpu.uuids))

    def _cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        if ordinal >= len(self._gpu.uuids):
            return (CUresult.CUDA_ERROR_INVALID_DEVICE, None)
        return self._ok(Number(ordinal))

    def _cuDeviceGetUuid(self, device: Number) -> tuple[Any, ...]:
        return self._ok(CUuuid(self._gpu.uuids[int(device)]))

    _cuDeviceGetUuid_v2 = _cuDeviceGetUuid

    def _cuDevicePrimaryCtxSetFlags(self, device: Number, flags: int) -> tuple[Any, ...]:
        return self._ok()

    def _cuDevicePrimaryCtxRetain(self, device: Number) -> tuple[Any, ...]:
        self._born("context", int(device))
        return self._ok(Number(1))

    def _cuDevicePrimaryCtxRelease(self, device: Number) -> tuple[Any, ...]:
        return self._died("context", device)

    def _cuCtxSetCurrent(self, context: Number) -> tuple[Any, ...]:
        self._current.context = int(context)
        return self._ok()

    def _cuCtxSynchronize(self) -> tuple[Any, ...]:
        return (self._needs_context() or self._ok())[:1]

    # -- memory

    def _cuMemGetInfo(self) -> tuple[Any, ...]:
        return self._ok(self._gpu.free_bytes, 1 << 40) if not self._needs_context() else (201, None, None)

    def _cuMemAlloc(self, size_bytes: int) -> tuple[Any, ...]:
        if missing := self._needs_context():
            return missing
        if size_bytes > self._gpu.free_bytes:
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        address = self._gpu.allocate(size_bytes)
        self._born("memory", address)
        return self._ok(Number(address))

    def _cuMemFree(self, address: Any) -> tuple[Any, ...]:
        self._gpu.memory.pop(int(address), None)
        return self._died("memory", address)

    def _cuIpcGetMemHandle(self, address: Any) -> tuple[Any, ...]:
        handle = CUipcMemHandle()
        handle.content.raw = int(address).to_bytes(IPC_HANDLE_BYTES, "big")
        self._gpu.exported[handle.content.raw] = int(address)
        return self._ok(handle)

    def _cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> tuple[Any, ...]:
        if missing := self._needs_context():
            return missing
        if handle.content.raw not in self._gpu.exported or flags != 1:
            return (CUresult.CUDA_ERROR_INVALID_HANDLE, None)
        address = self._gpu.exported[handle.content.raw]
        self._born("ipc", address)
        return self._ok(Number(address))

    def _cuIpcCloseMemHandle(self, address: Any) -> tuple[Any, ...]:
        return self._died("ipc", address)

    def _cuMemHostAlloc(self, size_bytes: int, flags: int) -> tuple[Any, ...]:
        if missing := self._needs_context():
            return missing
        buffer = (ctypes.c_char * size_bytes)()
        self._pinned[ctypes.addressof(buffer)] = buffer
        self._born("pinned", ctypes.addressof(buffer))
        return self._ok(ctypes.addressof(buffer))

    def _cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        self._pinned.pop(address, None)
        return self._died("pinned", address)

    def _cuMemHostRegister(self, address: int, size_bytes: int, flags: int) -> tuple[Any, ...]:
        if missing := self._needs_context():
            return missing[:1]
        assert flags == 0 and size_bytes > 0 and address % mmap.PAGESIZE == 0
        for start, length in self.registered.items():
            assert address + size_bytes <= start or address >= start + length, "registered twice"
        self.registered[address] = size_bytes
        self._born("registered", address)
        return self._ok()

    def _cuMemHostUnregister(self, address: int) -> tuple[Any, ...]:
        self.registered.pop(address, None)
        return self._died("registered", address)

    # -- streams and events

    def _cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        assert flags == 1, "a blocking stream would wait for the legacy default stream"
        number = next(self._numbers)
        self.pending[number] = []
        self._born("stream", number)
        return self._ok(Number(number))

    def _cuStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        return self._died("stream", stream)

    def _cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        number = next(self._numbers)
        self.events[number] = None
        self._born("event", number)
        return self._ok(Number(number))

    def _cuEventDestroy(self, event: Any) -> tuple[Any, ...]:
        return self._died("event", event)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size_bytes: int, stream: Any) -> tuple[Any, ...]:
        return self._copy_async(int(target), source, size_bytes, source, int(target), stream)

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size_bytes: int, stream: Any) -> tuple[Any, ...]:
        return self._copy_async(target, int(source), size_bytes, target, int(source), stream)

    def _copy_async(
        self, target: int, source: int, size_bytes: int, host: int, device: int, stream: Any
    ) -> tuple[Any, ...]:
        if missing := self._needs_context():
            return missing[:1]
        pinned = [(start, len(buffer)) for start, buffer in self._pinned.items()]
        where = [
            name
            for name, ranges in (("pinned", pinned), ("registered", self.registered.items()))
            if any(start <= host and host + size_bytes <= start + length for start, length in ranges)
        ]
        assert where, "a pageable copy, or one across two registered pieces"
        assert any(
            start <= device and device + size_bytes <= start + len(memory)
            for start, memory in self._gpu.memory.items()
        ), "a copy outside of device memory"
        self.copied_from += where
        queue = self.pending[int(stream)]
        queue.append(lambda: ctypes.memmove(target, source, size_bytes) and None)
        self.most_in_flight = max(self.most_in_flight, len(queue))
        return self._ok()

    def _cuEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        self.events[int(event)] = (int(stream), len(self.pending[int(stream)]))
        return self._ok()

    def _cuEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        if (recorded := self.events[int(event)]) is not None:
            self._execute(*recorded)
        return self._ok()

    def _cuStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        self._execute(int(stream), len(self.pending[int(stream)]))
        return self._ok()

    def _execute(self, stream: int, count: int) -> None:
        """Do the oldest `count` copies of a stream; events that were recorded later count from there."""
        for copy in self.pending[stream][:count]:
            copy()
        del self.pending[stream][:count]
        for event, recorded in self.events.items():
            if recorded is not None and recorded[0] == stream:
                self.events[event] = (stream, max(0, recorded[1] - count))


# -- what a loader is told ---------------------------------------------------------------------------

PIECE_BYTES = 200 * KIB
POOL_BYTES = MIB + 5
SEED = 6


def attach(arena: CudaArena, **changes: object) -> wire.Attach:
    fields = {
        "gpu_uuid": arena.gpu_uuid,
        "pool_bytes": POOL_BYTES,
        "pinned_piece_bytes": PIECE_BYTES,
        "chunk_bytes": CHUNK_BYTES,
        "parent_pid": 1,
    }
    return wire.Attach(**fields | changes)  # type: ignore[arg-type]


def opening(arena: CudaArena, **changes: object) -> wire.OpenArena:
    fields = {
        "transport": "cuda_ipc",
        "ipc_handle": arena.open_fields().ipc_handle,
        "arena_bytes": MIB,
        "proof_offset": MIB,
        "proof_bytes": PROOF_BYTES,
        "proof_seed": SEED,
    }
    return wire.OpenArena(**fields | changes)  # type: ignore[arg-type]


def no_notice(message: str) -> None:
    raise AssertionError(message)
