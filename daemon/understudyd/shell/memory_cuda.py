"""The arena on a GPU: one `cuMemAlloc` in torch's primary context, exported to the loaders once.

Not from torch's allocator: its `expandable_segments` and `cudaMallocAsync` back ends give memory that cannot
be exported. Where the driver refuses the export, loaders that are threads of this process use the address.
"""

import ctypes
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from understudyd.loader.cuda import Cuda, CudaError, load_driver
from understudyd.loader.proof import PROOF_AREA_BYTES, PROOF_BYTES
from understudyd.shell.memory import ArenaError, OpenFields

if TYPE_CHECKING:
    import torch

_GRAIN_BYTES = 2 * 1024 * 1024
_BOUNCE_BYTES = PROOF_BYTES
_STREAM_NON_BLOCKING = 1
_log = logging.getLogger(__name__)


@contextmanager
def _driver_errors() -> Iterator[None]:
    """The seam where the driver's errors become the arena's."""
    try:
        yield
    except CudaError as error:
        raise ArenaError(str(error)) from error


def _release(cuda: Cuda, call: str, *arguments: Any) -> None:
    """One step of letting go: it may run while the interpreter ends, and the next step must follow."""
    try:
        cuda.call(call, *arguments)
    except CudaError as error:
        _log.warning("the arena was not freed cleanly: %s", error)


class DeviceMemory:
    """Memory that torch can wrap, `shown_bytes` of `size_bytes`, and the context that it is in.

    Freed when the arena and the last tensor over it have let go of it. Raises `CudaError`.
    """

    def __init__(self, cuda: Cuda, device: Any, size_bytes: int, shown_bytes: int) -> None:
        with ExitStack() as undo:
            self.context = cuda.call("cuDevicePrimaryCtxRetain", device)
            undo.callback(_release, cuda, "cuDevicePrimaryCtxRelease", device)
            cuda.call("cuCtxSetCurrent", self.context)
            self.address = int(cuda.call("cuMemAlloc", size_bytes))
            undo.callback(_release, cuda, "cuMemFree", self.address)
            undo.callback(_release, cuda, "cuCtxSetCurrent", self.context)  # whichever thread will do it
            self.free = weakref.finalize(self, undo.pop_all().close)
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3
        self.__cuda_array_interface__ = {
            "shape": (shown_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


class CudaArena:
    """See `understudyd.shell.memory.Arena`. `gpu` is an ordinal or a UUID ("GPU-...").

    `ipc_refusal` says why the arena is not exported, None when it is. Raises `ArenaError` when the driver
    refuses anything else; nothing is left behind then.
    """

    def __init__(
        self, size_bytes: int, gpu: str | int = 0, driver: Any = None, *, share: bool = True
    ) -> None:
        self.size_bytes = size_bytes
        self.ipc_refusal = None if share else "it is not to be shared with other processes"
        self._handle = b""
        self._lock = threading.Lock()
        with _driver_errors():
            self._cuda = Cuda(driver or load_driver())
            device, self.gpu_uuid = self._cuda.device(gpu)
            self.ordinal = int(device)
            memory = DeviceMemory(self._cuda, device, size_bytes + PROOF_AREA_BYTES, size_bytes)
            try:
                with ExitStack() as undo:
                    self._open_own_stream(undo)
                    if share:
                        self._export(memory)
                    undo.callback(_release, self._cuda, "cuCtxSetCurrent", memory.context)
                    self._own = undo.pop_all()
            except BaseException:
                memory.free()
                raise
        self.transport = "cuda_ipc" if self.ipc_refusal is None else "cuda_local"
        self._memory: DeviceMemory | None = memory

    def _open_own_stream(self, undo: ExitStack) -> None:
        """A stream that does not wait for torch's, and a pinned buffer: no copy here is a pageable one."""
        self._stream = self._cuda.call("cuStreamCreate", _STREAM_NON_BLOCKING)
        undo.callback(_release, self._cuda, "cuStreamDestroy", self._stream)
        self._bounce = int(self._cuda.call("cuMemHostAlloc", _BOUNCE_BYTES, 0))
        undo.callback(_release, self._cuda, "cuMemFreeHost", self._bounce)

    def _export(self, memory: DeviceMemory) -> None:
        try:
            self._handle = self._cuda.handle_bytes(self._cuda.call("cuIpcGetMemHandle", memory.address))
        except CudaError as error:
            self.ipc_refusal = str(error)

    def open_fields(self) -> OpenFields:
        """See `Arena`. The address is for loaders that are threads of this process."""
        return OpenFields(self.transport, self.size_bytes, self._handle, self._held().address)

    def fds(self) -> tuple[int, ...]:
        """The handle travels as bytes."""
        return ()

    def tensor(self) -> "torch.Tensor":
        """See `Arena`. The tensor keeps the memory alive."""
        memory = self._held()
        import torch

        tensor = torch.as_tensor(memory, device=torch.device("cuda", self.ordinal))
        if tensor.data_ptr() != memory.address:
            raise ArenaError("torch copied the arena instead of wrapping it")
        return tensor

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See `Arena`. Raises `ArenaError`."""
        content = bytearray()
        with self._lock, _driver_errors():
            for address, piece_bytes in self._pieces(offset, size_bytes):
                self._cuda.call("cuMemcpyDtoHAsync", self._bounce, address, piece_bytes, self._stream)
                self._cuda.call("cuStreamSynchronize", self._stream)
                content += ctypes.string_at(self._bounce, piece_bytes)
        return bytes(content)

    def write(self, offset: int, content: bytes) -> None:
        """See `Arena`. Raises `ArenaError`."""
        done = 0
        with self._lock, _driver_errors():
            for address, piece_bytes in self._pieces(offset, len(content)):
                ctypes.memmove(self._bounce, content[done : done + piece_bytes], piece_bytes)
                self._cuda.call("cuMemcpyHtoDAsync", address, self._bounce, piece_bytes, self._stream)
                self._cuda.call("cuStreamSynchronize", self._stream)
                done += piece_bytes

    def synchronise(self) -> None:
        """See `Arena`. Waits for every stream of torch's context."""
        with _driver_errors():
            self._cuda.call("cuCtxSetCurrent", self._held().context)
            self._cuda.call("cuCtxSynchronize")

    def close(self) -> None:
        """See `Arena`. Only after the loaders are gone: memory that another process has open may not go."""
        with self._lock:
            self._own.close()
            self._memory = None

    def _pieces(self, offset: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Addresses and sizes that the bounce buffer can take, with the context current on this thread."""
        memory = self._held()
        if not 0 <= offset <= offset + size_bytes <= self.size_bytes + PROOF_AREA_BYTES:
            raise ArenaError(f"{size_bytes} bytes at {offset} are not in the arena")
        self._cuda.call("cuCtxSetCurrent", memory.context)
        for start in range(offset, offset + size_bytes, _BOUNCE_BYTES):
            yield memory.address + start, min(_BOUNCE_BYTES, offset + size_bytes - start)

    def _held(self) -> DeviceMemory:
        if self._memory is None:
            raise ArenaError("the arena is closed")
        return self._memory


def free_bytes(gpu: str | int = 0, driver: Any = None) -> int:
    """The GPU memory that is free now, beside this process's context. Raises `ArenaError`."""
    with _driver_errors():
        cuda = Cuda(driver or load_driver())
        device, _ = cuda.device(gpu)
        context = cuda.call("cuDevicePrimaryCtxRetain", device)
        try:
            cuda.call("cuCtxSetCurrent", context)
            free, _ = cuda.call("cuMemGetInfo")
        finally:
            _release(cuda, "cuDevicePrimaryCtxRelease", device)
    return int(free)


def auto_size_bytes(reserve_bytes: int, gpu: str | int = 0, driver: Any = None) -> int:
    """What is free once the loaders' contexts stand, less a reserve for activations: the GPU's `auto`.

    In whole 2 MiB. Raises `ArenaError` when nothing would be left.
    """
    now_free_bytes = free_bytes(gpu, driver)
    left_bytes = now_free_bytes - reserve_bytes - PROOF_AREA_BYTES
    if left_bytes < _GRAIN_BYTES:
        raise ArenaError(
            f"{now_free_bytes / 2**30:.2f} GiB of GPU memory are free, {reserve_bytes / 2**30:.2f} GiB are "
            "reserved; reserve less"
        )
    return left_bytes // _GRAIN_BYTES * _GRAIN_BYTES
