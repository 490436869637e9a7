"""The host pool, pinned piece by piece in the background so that the copy engine reads it directly.

Pinning takes long (the kernel looks up every page) and may be refused (limits on locked memory). Copies
whose source is not pinned yet take another way, so nobody waits for it.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from understudyd.loader.cuda import Cuda, CudaError
from understudyd.loader.mapping import Mapping
from understudyd.loader.transport import Notify


class Pinning:
    """Registers `pool` with `context` in order of address; `notify` hears when that goes no further."""

    def __init__(self, cuda: Cuda, context: Any, pool: Mapping, piece_bytes: int, notify: Notify) -> None:
        self._cuda = cuda
        self._context = context
        self._pool = pool
        self._piece_bytes = piece_bytes
        self._notify = notify
        self._pinned_bytes = 0
        self._pins = ExitStack()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pin", daemon=True)
        self._thread.start()

    def address(self, offset: int) -> int:
        """Where a byte of the pool is in this process."""
        return self._pool.address + offset

    def pieces(self, offset: int, size_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """A range of the pool cut where two pieces meet: offset, size in bytes, whether it is pinned.

        One copy may not read from two registered pieces.
        """
        end = offset + size_bytes
        while offset < end:
            piece_end = min(end, (offset // self._piece_bytes + 1) * self._piece_bytes)
            yield offset, piece_end - offset, piece_end <= self._pinned_bytes
            offset = piece_end

    def close(self) -> None:
        """Unpin everything, whatever fails on the way. Raises `CudaError`."""
        self._closing.set()
        self._thread.join()
        self._pins.close()

    def _run(self) -> None:
        try:
            self._cuda.call("cuCtxSetCurrent", self._context)
            for start in range(0, self._pool.size_bytes, self._piece_bytes):
                if self._closing.is_set():
                    return
                self._pin(start, min(self._piece_bytes, self._pool.size_bytes - start))
        except CudaError as error:
            pool_bytes, pinned_bytes = self._pool.size_bytes, self._pinned_bytes
            self._notify(
                f"{pinned_bytes} of {pool_bytes} bytes of the host pool are pinned, no more: {error}"
            )

    def _pin(self, start: int, size_bytes: int) -> None:
        address = self._pool.address + start
        self._cuda.call("cuMemHostRegister", address, size_bytes, 0)
        self._pins.callback(self._cuda.call, "cuMemHostUnregister", address)
        self._pinned_bytes = start + size_bytes
