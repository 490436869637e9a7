"""The arena on a GPU: bytes pass through a ring of pinned buffers and the copy engine.

A reader fills a buffer of the ring, then the copy to the final offset is queued on the one stream. At most
`copies_in_flight` copies are queued, so that the parent's own small copies are never stuck behind many. The
ring has a buffer more per reader: a reader always finds a free one. No kernel, no memset, no pageable copy:
work of a second CUDA context would take turns with the parent's kernels, copies do not.
"""

import ctypes
import threading
from collections import deque
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from understudyd.loader.cuda import Cuda, CudaError, load_driver
from understudyd.loader.transport import Fill, TransportError
from understudyd.loader.wire import Attach

# The driver's documented constants, which both major versions of the bindings spell alike.
_CTX_SCHED_BLOCKING_SYNC = 4
_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC_DISABLE_TIMING = 3


class Slot:
    """A pinned buffer and the event that tells when its copy is done."""

    def __init__(self, address: int, size_bytes: int, event: Any) -> None:
        self.address = address
        self.event = event
        self.view = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def open_cuda_target(attach: Attach, driver: Any = None) -> "CudaTarget":
    """Open the arena's handle on the GPU it names. Raises `TransportError`."""
    try:
        return CudaTarget(attach, Cuda(driver or load_driver()))
    except CudaError as error:
        raise TransportError(str(error)) from error


class CudaTarget:
    """See the module."""

    def __init__(self, attach: Attach, cuda: Cuda) -> None:
        self._cuda = cuda
        self._copies_in_flight = attach.copies_in_flight
        self._lock = threading.Lock()
        self._in_flight: deque[Slot] = deque()
        self._free: SimpleQueue[Slot] = SimpleQueue()
        with ExitStack() as resources:
            self._open(attach, resources)
            self._resources = resources.pop_all()

    def _open(self, attach: Attach, resources: ExitStack) -> None:
        call = self._cuda.call
        device, _ = self._cuda.device(attach.gpu_uuid)
        # Waiting threads sleep: there are two of them and perhaps two cores.
        call("cuDevicePrimaryCtxSetFlags", device, _CTX_SCHED_BLOCKING_SYNC)
        self._context = call("cuDevicePrimaryCtxRetain", device)
        resources.callback(call, "cuDevicePrimaryCtxRelease", device)
        call("cuCtxSetCurrent", self._context)
        handle = self._cuda.handle_from(attach.ipc_handle)
        arena = call("cuIpcOpenMemHandle", handle, _IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        resources.callback(call, "cuIpcCloseMemHandle", arena)
        self._base = int(arena)
        self._stream = call("cuStreamCreate", _STREAM_NON_BLOCKING)
        resources.callback(call, "cuStreamDestroy", self._stream)
        for _ in range(attach.copies_in_flight + attach.reader_threads):
            self._free.put(self._new_slot(attach.chunk_bytes, resources))

    def _new_slot(self, chunk_bytes: int, resources: ExitStack) -> Slot:
        call = self._cuda.call
        address = int(call("cuMemHostAlloc", chunk_bytes, 0))
        resources.callback(call, "cuMemFreeHost", address)
        event = call("cuEventCreate", _EVENT_BLOCKING_SYNC_DISABLE_TIMING)
        resources.callback(call, "cuEventDestroy", event)
        return Slot(address, chunk_bytes, event)

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """See `Target`."""
        slot = self._free.get()
        try:
            fill(slot.view[:size_bytes])
        except BaseException:
            self._free.put(slot)
            raise
        with self._lock:
            try:
                self._copy(slot, offset, size_bytes)
            except CudaError as error:
                raise TransportError(str(error)) from error

    def _copy(self, slot: Slot, offset: int, size_bytes: int) -> None:
        self._cuda.call("cuCtxSetCurrent", self._context)  # whichever thread this is
        while len(self._in_flight) >= self._copies_in_flight:
            self._await_oldest()
        self._cuda.call("cuMemcpyHtoDAsync", self._base + offset, slot.address, size_bytes, self._stream)
        self._cuda.call("cuEventRecord", slot.event, self._stream)
        self._in_flight.append(slot)

    def _await_oldest(self) -> None:
        oldest = self._in_flight[0]
        self._cuda.call("cuEventSynchronize", oldest.event)
        self._free.put(self._in_flight.popleft())

    def synchronise(self) -> None:
        """See `Target`."""
        with self._lock:
            try:
                self._cuda.call("cuCtxSetCurrent", self._context)
                while self._in_flight:
                    self._await_oldest()
                self._cuda.call("cuStreamSynchronize", self._stream)
            except CudaError as error:
                raise TransportError(str(error)) from error

    def close(self) -> None:
        """Release everything in reverse, whatever fails on the way. Raises `TransportError`."""
        try:
            self.synchronise()
        finally:
            try:
                self._resources.close()
            except CudaError as error:
                raise TransportError(str(error)) from error
