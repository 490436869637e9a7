"""The host pool: shared memory that holds blobs one copy away from the arena.

The parent owns it, loaders fill it. This module imports no torch.
"""

import fcntl
import os

from understudyd.loader.mapping import Mapping, MappingError
from understudyd.shell.memory import ArenaError, check_available, memory_available_bytes

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class HostPool:
    """A memfd of `size_bytes`, sealed in its size. Each loader maps it, and pins it where there is a GPU.

    Its pages come in the background, first to last, so that loads need not make them. Raises `ArenaError`
    when it is larger than the memory that is available.

    `found_fd` is one that another daemon made: it is taken over with what lies in it, unless this raises.
    """

    def __init__(self, size_bytes: int, found_fd: int | None = None) -> None:
        self.size_bytes = size_bytes
        if found_fd is not None:
            self._fd = found_fd
            self._map()
            return
        check_available("a host pool", size_bytes, memory_available_bytes())
        self._fd = os.memfd_create("understudy-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size_bytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map()
        except (OSError, ArenaError) as error:
            os.close(self._fd)
            raise ArenaError(f"cannot have {size_bytes / 2**30:.2f} GiB of shared memory: {error}") from error

    def _map(self) -> None:
        try:
            if fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ArenaError("anybody could change its size")
            self._mapping = Mapping(self.fds(), self.size_bytes)
        except (OSError, MappingError) as error:
            raise ArenaError(str(error)) from error
        self._mapping.populate()

    def fds(self) -> tuple[int, ...]:
        """What a loader must be handed."""
        return (self._fd,)

    def close(self) -> None:
        """Let go of it. Its memory lives until the last loader has let go of it."""
        self._mapping.close()
        os.close(self._fd)
