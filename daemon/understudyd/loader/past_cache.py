"""Reads that leave the page cache alone (O_DIRECT), of what is not in it.

For bytes that something else keeps: no page is allocated for them and no processor copies them. What is
cached is copied from there, a helping at a time by what most of it is. The kernel is asked with `cachestat`;
a read with RWF_NOWAIT, which tells too, has it read ahead whatever is missing. Where the kernel does not say,
or the file system refuses, all is read plainly.
"""

import os
from collections.abc import Callable
from contextlib import suppress

from understudyd.loader import linux

_BLOCK_BYTES = 4096  # what O_DIRECT wants of offsets and lengths is this or less

Read = Callable[[memoryview, int], int]
"""Fill the beginning of the memory with what is at this offset; how many bytes, 0 where the file ends."""


def plain(fd: int) -> Read:
    """Reads through the page cache."""
    return lambda view, offset: os.preadv(fd, [view], offset)


class PastCache:
    """An open file, which stays its owner's, for several threads at once."""

    def __init__(
        self,
        fd: int,
        *,
        open_file: Callable[[str, int], int] = os.open,
        read_direct: Callable[[int, list[memoryview], int], int] = os.preadv,
        cached_bytes: Callable[[int, int, int], int] = linux.cached_bytes,
    ) -> None:
        self._fd = fd
        self._read_plain = plain(fd)
        self._read_direct = read_direct
        self._cached_bytes = cached_bytes
        self._is_refused = False
        self._direct_fd: int | None = None
        with suppress(OSError):  # no file system for that, or no /proc
            # The same file, whatever its name is now.
            self._direct_fd = open_file(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def read(self, view: memoryview, offset: int) -> int:
        """See `Read`. Raises `OSError`."""
        whole_bytes = len(view) - len(view) % _BLOCK_BYTES
        if self._direct_fd is not None and whole_bytes and offset % _BLOCK_BYTES == 0:
            try:
                if self._lacks(offset, whole_bytes):
                    return self._read_direct(self._direct_fd, [view[:whole_bytes]], offset)
            except OSError:  # were it more than a refusal, the plain read would say so
                self._is_refused = True
        return self._read_plain(view, offset)

    def _lacks(self, offset: int, size_bytes: int) -> bool:
        return not self._is_refused and self._cached_bytes(self._fd, offset, size_bytes) < size_bytes // 2

    def close(self) -> None:
        """Only when nobody reads any more."""
        if self._direct_fd is not None:
            os.close(self._direct_fd)
