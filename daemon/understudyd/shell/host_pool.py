"""The host pool: shared memory that holds blobs one copy away from the arena.

The parent owns it, loaders fill it. This module imports no torch.
"""

import fcntl
import logging
import os
import threading

from understudyd.shell.memory import ArenaError, check_available, memory_available_bytes

log = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PIECE_BYTES = 64 * 1024 * 1024


class HostPool:
    """A memfd of `size_bytes`, sealed in its size. Each loader maps it, and pins it where there is a GPU.

    Raises `ArenaError` when it is larger than the memory that is available.

    `found_fd` is one that another daemon made: it is taken over with what lies in it, unless this raises.
    """

    def __init__(self, size_bytes: int, found_fd: int | None = None) -> None:
        self.size_bytes = size_bytes
        self._closing = threading.Event()
        self._allocating: threading.Thread | None = None
        self._fd = _sealed(found_fd) if found_fd is not None else _new(size_bytes)

    def allocate(self) -> None:
        """Have its pages in the background, first to last, so that loads need not make them.

        Not by faults: who maps memory, as importing torch does all the time, would wait for each of them.
        """
        self._allocating = threading.Thread(target=self._allocate, name="allocate", daemon=True)
        self._allocating.start()

    def fds(self) -> tuple[int, ...]:
        """What a loader must be handed."""
        return (self._fd,)

    def close(self) -> None:
        """Let go of it. Its memory lives until the last loader has let go of it."""
        self._closing.set()
        if self._allocating is not None:
            self._allocating.join()
        os.close(self._fd)

    def _allocate(self) -> None:
        try:
            for start in range(0, self.size_bytes, _PIECE_BYTES):
                if self._closing.is_set():
                    return
                os.posix_fallocate(self._fd, start, min(_PIECE_BYTES, self.size_bytes - start))
        except OSError as error:
            log.warning("the host pool does not get all of its memory, make host.pool smaller: %s", error)


def _new(size_bytes: int) -> int:
    check_available("a host pool", size_bytes, memory_available_bytes())
    fd = os.memfd_create("understudy-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise ArenaError(f"cannot have {size_bytes / 2**30:.2f} GiB of shared memory: {error}") from error
    return fd


def _sealed(fd: int) -> int:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ArenaError(str(error)) from error
    if seals & _SEALS != _SEALS:
        raise ArenaError("anybody could change its size")
    return fd
