"""What differs between computing on the CPU and on a GPU, and nothing else.

On a GPU a pipeline returns while its kernels still run: the baton is handed on at once, and the weights
stay leased until an event recorded after the last use has completed.
"""

from typing import Any, Protocol

import torch


class Device(Protocol):
    """The seam. `mark_last_use` is called on the computing thread, the waits on the same thread later."""

    device: torch.device

    def enter_thread(self) -> None:
        """Set up a thread that will compute."""

    def stand_back(self) -> None:
        """Let whatever else computes go before the calling thread's work, from now on."""

    def mark_last_use(self) -> Any:
        """Remember this moment of the device's work."""

    def wait(self, mark: Any) -> None:
        """Block, without the interpreter lock, until the device has come to the mark."""

    def to_host(self, images: Any) -> Any:
        """Copy a finished result to host memory without queueing behind the next request's kernels."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """The device, or the host, had no room for an activation."""

    def free_cache(self) -> None:
        """Give cached memory back."""


class CpuDevice:
    """Everything has happened when a call returns."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def enter_thread(self) -> None:
        """Nothing to set up."""

    def stand_back(self) -> None:
        """Who works in slices need not: a lower priority made folds seven times longer, and no less work."""

    def mark_last_use(self) -> None:
        """Now."""

    def wait(self, mark: None) -> None:
        """It is done."""

    def to_host(self, images: Any) -> Any:
        """It is there."""
        return images

    def is_out_of_memory(self, error: Exception) -> bool:
        """Torch raises a plain RuntimeError when the C allocator gives up."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        )

    def free_cache(self) -> None:
        """There is none."""


class CudaDevice:
    """Events and streams. All computing threads share one; it goes before that of who stands back.

    The default stream has the least priority there is, so nothing could stand back behind it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._computing = torch.cuda.Stream(device, priority=-1)
        self._copies = torch.cuda.Stream(device)

    def enter_thread(self) -> None:
        """The current device and the current stream are a thread's own."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self._computing)

    def stand_back(self) -> None:
        """A stream of its own, of the least priority."""
        torch.cuda.set_stream(torch.cuda.Stream(self.device, priority=0))

    def mark_last_use(self) -> Any:
        """An event; `blocking` so that waiting burns no core."""
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        """Synchronise on the event."""
        mark.synchronize()

    def to_host(self, images: Any) -> Any:
        """The mark has been waited for, so the side stream needs no further order."""
        if not isinstance(images, torch.Tensor):
            return images
        with torch.cuda.stream(self._copies):
            return images.cpu()

    def is_out_of_memory(self, error: Exception) -> bool:
        """Torch has a type of its own for this."""
        return isinstance(error, torch.OutOfMemoryError | MemoryError)

    def free_cache(self) -> None:
        """Hand torch's cached blocks back to the driver."""
        torch.cuda.empty_cache()


def open_device(name: str) -> Device:
    """The device of a torch name: "cpu", "cuda" or "cuda:0"."""
    device = torch.device(name)
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
