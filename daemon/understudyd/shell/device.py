"""Which device the configuration means, and whether this machine has it."""

from pathlib import Path

from understudyd.config import DeviceConfig
from understudyd.shell.memory import ArenaError

_DRIVER = Path("/dev/nvidiactl")


def kind_of(chosen: DeviceConfig) -> str:
    """Either "cpu" or "cuda"."""
    if chosen.kind != "auto":
        return chosen.kind
    return "cuda" if _DRIVER.exists() else "cpu"


def gpu_of(chosen: DeviceConfig) -> str | int:
    """The GPU's ordinal or UUID."""
    return int(chosen.gpu) if chosen.gpu.isdigit() else chosen.gpu


def gpu_uuid(chosen: DeviceConfig) -> str:
    """The UUID of the GPU that is meant, asked of the driver; "" on the CPU.

    Raises `ArenaError` when there is no such GPU, no driver or no cuda-bindings.
    """
    if kind_of(chosen) != "cuda":
        return ""
    from understudyd.loader.cuda import Cuda, CudaError, load_driver  # cuda-bindings take a while

    try:
        return Cuda(load_driver()).device(gpu_of(chosen))[1]
    except CudaError as error:
        raise ArenaError(
            f'device.kind is "{chosen.kind}" and this machine cannot serve on CUDA: {error}'
        ) from error
