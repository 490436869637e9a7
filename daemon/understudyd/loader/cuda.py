"""The CUDA driver API through cuda-bindings (12.x and 13.x), with every return code checked.

cuda-bindings returns a tuple `(status, *values)` from every function. The module is an argument so that tests
can pass a fake one that answers with the documented return codes.
"""

import ctypes
import importlib
from typing import Any

IPC_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE


class CudaError(Exception):
    """A driver call failed: `call` and `code` are the driver's own names."""

    def __init__(self, call: str, code: str, hint: str = "") -> None:
        super().__init__(f"{call} failed with {code}" + (f": {hint}" if hint else ""))
        self.call = call
        self.code = code


_HINTS = {
    ("cuInit", "CUDA_ERROR_NO_DEVICE"): "no GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    ("cuDeviceGet", "CUDA_ERROR_INVALID_DEVICE"): "there is no such GPU; nvidia-smi -L lists them",
    (
        "cuMemAlloc",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ): "the arena does not fit into the GPU's free memory; make it smaller",
    (
        "cuMemHostRegister",
        "CUDA_ERROR_OUT_OF_MEMORY",
    ): "the system lets this process lock no more memory; raise its limit (memlock) or shrink the pool",
}
_IPC_HINT = "CUDA IPC is refused here, as under WSL or in a container of another IPC or user namespace"


def load_driver() -> Any:
    """The module `cuda.bindings.driver`. Raises `CudaError` when it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaError(
            "import cuda.bindings.driver",
            "ImportError",
            "cuda-bindings are missing: install Understudy with its extra cuda",
        ) from error


class Cuda:
    """Checked calls, and the few conversions that cuda-bindings leaves to its user."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def call(self, name: str, *arguments: Any) -> Any:
        """The function's value, a tuple of values if it has several, None if none. Raises `CudaError`."""
        try:
            status, *values = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # the driver library or this function of it is missing
            raise CudaError(name, type(error).__name__, str(error)) from error
        if int(status) != 0:
            hint = _IPC_HINT if name.startswith("cuIpc") else _HINTS.get((name, status.name), "")
            raise CudaError(name, status.name, hint)
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def device(self, gpu: str | int) -> tuple[Any, str]:
        """The device with this ordinal or UUID ("GPU-...", "MIG-...") and its UUID, after `cuInit`."""
        self.call("cuInit", 0)
        if isinstance(gpu, int):
            device = self.call("cuDeviceGet", gpu)
            return device, self._uuid_of(device)
        for ordinal in range(self.call("cuDeviceGetCount")):
            device = self.call("cuDeviceGet", ordinal)
            if self._uuid_of(device).partition("-")[2] == gpu.partition("-")[2]:
                return device, gpu
        raise CudaError("cuDeviceGetUuid", "CUDA_ERROR_INVALID_DEVICE", f"no visible GPU has the UUID {gpu}")

    def handle_bytes(self, handle: Any) -> bytes:
        """An IPC handle as it travels."""
        return ctypes.string_at(int(handle.getPtr()), IPC_HANDLE_BYTES)

    def handle_from(self, content: bytes) -> Any:
        """An IPC handle as it was before it travelled."""
        if len(content) != IPC_HANDLE_BYTES:
            raise CudaError("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_HANDLE", f"{len(content)} bytes")
        handle = self._driver.CUipcMemHandle()
        ctypes.memmove(int(handle.getPtr()), content, IPC_HANDLE_BYTES)
        return handle

    def _uuid_of(self, device: Any) -> str:
        # 12.x: the _v2 function names a MIG slice, the plain one its whole GPU. 13.x: the plain one is _v2.
        newest = "cuDeviceGetUuid_v2" if hasattr(self._driver, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        digits = bytes(self.call(newest, device).bytes).hex()
        return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
