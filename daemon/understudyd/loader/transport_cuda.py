"""The arena on a GPU: bytes pass through pinned memory and the copy engine.

From a file to the arena alone they pass through a ring of pinned buffers: a reader fills one, then the copy
to the final offset is queued on the one stream. From the host pool they go straight where that is pinned,
through the ring where it is not. At most `copies_in_flight` copies are queued, so that the parent's own small
copies are never stuck behind many. The ring has a buffer more per reader: a reader always finds a free one.
No kernel, no memset, no pageable copy: work of a second CUDA context would take turns with the parent's
kernels, copies do not.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from understudyd.loader import linux
from understudyd.loader.cuda import Cuda, CudaError, load_driver
from understudyd.loader.mapping import Mapping
from understudyd.loader.pinning import Pinning
from understudyd.loader.proof import PROOF_BYTES
from understudyd.loader.transport import Fill, Notify, SharingRefused, TransportError
from understudyd.loader.wire import Attach, OpenArena

# The driver's documented constants, which both major versions of the bindings spell alike.
_CTX_SCHED_BLOCKING_SYNC = 4
_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC_DISABLE_TIMING = 3


class Slot:
    """A pinned buffer, and the event that tells when the copy that took this slot is done."""

    def __init__(self, address: int, size_bytes: int, event: Any) -> None:
        self.address = address
        self.event = event
        self.view = memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def open_cuda_target(
    attach: Attach, pool: Mapping | None, notify: Notify, driver: Any = None
) -> "CudaTarget":
    """Make a context on the GPU that `attach` names; owns `pool`. Raises `TransportError`."""
    with _driver_errors():
        return CudaTarget(attach, pool, notify, driver)


@contextmanager
def _driver_errors() -> Iterator[None]:
    """The seam where the driver's errors become the transport's."""
    try:
        yield
    except CudaError as error:
        raise TransportError(str(error)) from error


class CudaTarget:
    """See the module."""

    def __init__(self, attach: Attach, pool: Mapping | None, notify: Notify, driver: Any) -> None:
        self.pool = memoryview(b"") if pool is None else pool.view
        self._is_in_parent = attach.parent_pid == 0
        self._copies_in_flight = attach.copies_in_flight
        self._lock = threading.Lock()
        self._in_flight: deque[Slot] = deque()
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._base = 0
        self._pinning: Pinning | None = None
        self._resources = ExitStack()
        try:
            if pool is not None:
                self._resources.callback(pool.close)
            self._cuda = Cuda(driver or load_driver())
            self._open(attach, pool, notify)
        except BaseException:
            with suppress(CudaError):  # what failed first says more
                self._resources.close()
            raise

    def _open(self, attach: Attach, pool: Mapping | None, notify: Notify) -> None:
        call, resources = self._cuda.call, self._resources
        device, _ = self._cuda.device(attach.gpu_uuid)
        if not self._is_in_parent:  # the parent's context is torch's
            # Waiting threads sleep: there are two of them and perhaps two cores.
            call("cuDevicePrimaryCtxSetFlags", device, _CTX_SCHED_BLOCKING_SYNC)
        self._context = call("cuDevicePrimaryCtxRetain", device)
        resources.callback(call, "cuDevicePrimaryCtxRelease", device)
        call("cuCtxSetCurrent", self._context)
        self._stream = call("cuStreamCreate", _STREAM_NON_BLOCKING)
        resources.callback(call, "cuStreamDestroy", self._stream)
        for _ in range(attach.copies_in_flight + attach.reader_threads):
            self._free.put(self._new_slot(max(attach.chunk_bytes, PROOF_BYTES)))
        if pool is not None:
            self._pinning = Pinning(self._cuda, self._context, pool, attach.pinned_piece_bytes, notify)
            resources.callback(self._pinning.close)

    def _new_slot(self, size_bytes: int) -> Slot:
        call, resources = self._cuda.call, self._resources
        address = int(call("cuMemHostAlloc", size_bytes, 0))
        resources.callback(call, "cuMemFreeHost", address)
        event = call("cuEventCreate", _EVENT_BLOCKING_SYNC_DISABLE_TIMING)
        resources.callback(call, "cuEventDestroy", event)
        return Slot(address, size_bytes, event)

    def open_arena(self, order: OpenArena, fds: Sequence[int]) -> None:
        """See `Target`."""
        match order.transport:
            case "cuda_ipc" if not fds:
                self._base = self._open_handle(order.ipc_handle)
            case "cuda_local" if self._is_in_parent and not fds:
                self._base = order.address
            case transport:
                raise TransportError(f"no transport {transport!r} to this GPU with {len(fds)} descriptors")

    def _open_handle(self, content: bytes) -> int:
        with _driver_errors():
            self._cuda.call("cuCtxSetCurrent", self._context)
            handle = self._cuda.handle_from(content)
        try:
            arena = self._cuda.call("cuIpcOpenMemHandle", handle, _IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        except CudaError as error:
            raise SharingRefused(str(error)) from error
        self._resources.callback(self._cuda.call, "cuIpcCloseMemHandle", arena)
        return int(arena)

    def write(self, offset: int, size_bytes: int, fill: Fill) -> None:
        """See `Target`."""
        slot = self._free.get()
        try:
            fill(slot.view[:size_bytes])
        except BaseException:
            self._free.put(slot)
            raise
        self._send(slot, slot.address, offset, size_bytes)

    def copy(self, arena_offset: int, pool_offset: int, size_bytes: int) -> None:
        """See `Target`."""
        assert self._pinning is not None, "a load was allowed that comes from nowhere"
        for offset, piece_bytes, is_pinned in self._pinning.pieces(pool_offset, size_bytes):
            slot = self._free.get()
            source = self._pinning.address(offset)
            if not is_pinned:
                linux.copy(slot.address, source, piece_bytes)
                source = slot.address
            self._send(slot, source, arena_offset + offset - pool_offset, piece_bytes)

    def _send(self, slot: Slot, source: int, offset: int, size_bytes: int) -> None:
        """Queue a copy to `offset` of the arena; the slot is free again when it is done."""
        with self._lock, _driver_errors():
            self._cuda.call("cuCtxSetCurrent", self._context)  # whichever thread this is
            while len(self._in_flight) >= self._copies_in_flight:
                self._await_oldest()
            self._cuda.call("cuMemcpyHtoDAsync", self._base + offset, source, size_bytes, self._stream)
            self._in_flight.append(slot)
            self._cuda.call("cuEventRecord", slot.event, self._stream)

    def _await_oldest(self) -> None:
        oldest = self._in_flight[0]
        self._cuda.call("cuEventSynchronize", oldest.event)
        self._free.put(self._in_flight.popleft())

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See `Target`."""
        slot = self._free.get()
        with self._lock, _driver_errors():
            self._cuda.call("cuCtxSetCurrent", self._context)
            self._cuda.call("cuMemcpyDtoHAsync", slot.address, self._base + offset, size_bytes, self._stream)
            self._cuda.call("cuStreamSynchronize", self._stream)
        content = bytes(slot.view[:size_bytes])
        self._free.put(slot)
        return content

    def synchronise(self) -> None:
        """See `Target`."""
        with self._lock, _driver_errors():
            self._cuda.call("cuCtxSetCurrent", self._context)
            self._cuda.call("cuStreamSynchronize", self._stream)
            while self._in_flight:
                self._free.put(self._in_flight.popleft())

    def close(self) -> None:
        """See `Target`. Releases everything in reverse, whatever fails on the way."""
        with _driver_errors():
            try:
                self.synchronise()
            finally:
                self._resources.close()
