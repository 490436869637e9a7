"""System calls that the standard library lacks or that it makes while it holds the interpreter lock."""

import ctypes
import mmap
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23

_CACHESTAT = 451  # the same on every architecture with Python wheels

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memmove.restype = ctypes.c_void_p
_libc.syscall.restype = ctypes.c_long


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that spawned it ends.

    The caller must compare `os.getppid()` with its parent's pid afterwards: the parent may be gone already.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0))


def set_process_name(name: str) -> None:
    """What `ps` and `top` show; at most 15 bytes."""
    _check(_libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0))


def populate(mapping: mmap.mmap, start: int, size_bytes: int, advice: int) -> None:
    """Build the page table of a part of the mapping. Raises `OSError` (EINVAL before Linux 5.14).

    `mmap.madvise` holds the interpreter lock for the whole call; a heartbeat could not be sent meanwhile.
    """
    anchor = ctypes.c_char.from_buffer(mapping)
    _check(_libc.madvise(ctypes.addressof(anchor) + start, size_bytes, advice))


def cached_bytes(fd: int, offset: int, size_bytes: int) -> int:
    """How much of a part of a file the page cache holds; asking changes nothing.

    Raises `OSError`: ENOSYS before Linux 6.5, EPERM for who neither owns the file nor may write to it.
    """
    part = (ctypes.c_uint64 * 2)(offset, size_bytes)
    counts = (ctypes.c_uint64 * 5)()
    number = ctypes.c_long(_CACHESTAT)
    _check(_libc.syscall(number, ctypes.c_long(fd), part, counts, ctypes.c_long(0)))
    return int(counts[0]) * mmap.PAGESIZE


def copy(to_address: int, from_address: int, size_bytes: int) -> None:
    """Copy memory without the interpreter lock, which assigning to a memoryview would hold."""
    _libc.memmove(to_address, from_address, size_bytes)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
