"""The arena on a GPU: one `cuMemAlloc` in torch's primary context, exported to the loaders once.

Not from torch's allocator: its `expandable_segments` and `cudaMallocAsync` back ends give memory that cannot
be exported.
"""

import logging
import weakref
from typing import TYPE_CHECKING, Any

from understudyd.loader.cuda import Cuda, CudaError, load_driver
from understudyd.shell.memory import ArenaError, AttachFields

if TYPE_CHECKING:
    import torch

_GRAIN_BYTES = 2 * 1024 * 1024
_log = logging.getLogger(__name__)


class DeviceMemory:
    """Memory that torch can wrap. Freed when the arena and the last tensor over it have let go of it."""

    def __init__(self, cuda: Cuda, device: Any, context: Any, size_bytes: int) -> None:
        self.address = int(cuda.call("cuMemAlloc", size_bytes))
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }
        self.free = weakref.finalize(self, _free, cuda, device, context, self.address)


class CudaArena:
    """See `understudyd.shell.memory.Arena`. `gpu` is an ordinal or a UUID ("GPU-...").

    Raises `ArenaError` when the driver refuses anything; nothing is left behind then.
    """

    transport = "cuda"

    def __init__(self, size_bytes: int, gpu: str | int = 0, driver: Any = None) -> None:
        self.size_bytes = size_bytes
        try:
            self._cuda = Cuda(driver or load_driver())
            device, self.gpu_uuid = self._cuda.device(gpu)
            self.ordinal = int(device)
            self._context = self._cuda.call("cuDevicePrimaryCtxRetain", device)
            try:
                self._cuda.call("cuCtxSetCurrent", self._context)
                self._memory: DeviceMemory | None = DeviceMemory(
                    self._cuda, device, self._context, size_bytes
                )
            except CudaError:
                self._cuda.call("cuDevicePrimaryCtxRelease", device)
                raise
            try:
                handle = self._cuda.call("cuIpcGetMemHandle", self._memory.address)
            except CudaError:
                self._memory.free()
                raise
            self._handle = self._cuda.handle_bytes(handle)
        except CudaError as error:
            raise ArenaError(str(error)) from error

    def attach_fields(self) -> AttachFields:
        """See `Arena`."""
        return AttachFields(self.transport, self.size_bytes, self._handle, self.gpu_uuid)

    def fds(self) -> tuple[int, ...]:
        """The handle travels as bytes."""
        return ()

    def tensor(self) -> "torch.Tensor":
        """See `Arena`. The tensor keeps the memory alive."""
        if self._memory is None:
            raise ArenaError("the arena is closed")
        import torch

        tensor = torch.as_tensor(self._memory, device=torch.device("cuda", self.ordinal))
        if tensor.data_ptr() != self._memory.address:
            raise ArenaError("torch copied the arena instead of wrapping it")
        return tensor

    def synchronise(self) -> None:
        """See `Arena`. Waits for every stream of torch's context."""
        try:
            self._cuda.call("cuCtxSetCurrent", self._context)
            self._cuda.call("cuCtxSynchronize")
        except CudaError as error:
            raise ArenaError(str(error)) from error

    def close(self) -> None:
        """See `Arena`. Only after the loaders are gone: memory that another process has open may not go."""
        self._memory = None


def auto_size_bytes(reserve_bytes: int, gpu: str | int = 0, driver: Any = None) -> int:
    """The GPU memory that is free now, less a reserve for activations, in whole 2 MiB: the GPU's `auto`.

    Raises `ArenaError` when nothing would be left.
    """
    try:
        cuda = Cuda(driver or load_driver())
        device, _ = cuda.device(gpu)
        context = cuda.call("cuDevicePrimaryCtxRetain", device)
        try:
            cuda.call("cuCtxSetCurrent", context)
            free_bytes, _ = cuda.call("cuMemGetInfo")
        finally:
            cuda.call("cuDevicePrimaryCtxRelease", device)
    except CudaError as error:
        raise ArenaError(str(error)) from error
    if free_bytes < reserve_bytes + _GRAIN_BYTES:
        raise ArenaError(
            f"{free_bytes} bytes of GPU memory are free, {reserve_bytes} are reserved; reserve less"
        )
    return (int(free_bytes) - reserve_bytes) // _GRAIN_BYTES * _GRAIN_BYTES


def _free(cuda: Cuda, device: Any, context: Any, address: int) -> None:
    """Runs wherever the last reference went, perhaps while the interpreter ends: it may not raise."""
    for call, *arguments in (
        ("cuCtxSetCurrent", context),
        ("cuMemFree", address),
        ("cuDevicePrimaryCtxRelease", device),
    ):
        try:
            cuda.call(call, *arguments)
        except CudaError as error:
            _log.warning("the arena was not freed cleanly: %s", error)
