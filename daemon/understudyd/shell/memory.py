"""The arena: the one allocation that holds all weights. The parent owns it, loaders fill it, torch reads it.

This module imports no torch: the arena of the CPU device stands before torch is imported.
"""

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from understudyd.loader import linux

if TYPE_CHECKING:
    import torch

_GRAIN_BYTES = 2 * 1024 * 1024
_PREFAULT_PIECE_BYTES = 64 * 1024 * 1024
_PREFAULT_THREADS = 4


class ArenaError(Exception):
    """The arena cannot be had; the message says what to change."""


@dataclass(frozen=True, slots=True)
class AttachFields:
    """How a loader reaches the arena: the fields of the same names in the loader protocol's `Attach`."""

    transport: str
    arena_bytes: int
    ipc_handle: bytes = b""
    gpu_uuid: str = ""


class Arena(Protocol):
    """One allocation of `size_bytes`, opened once by every loader."""

    size_bytes: int
    transport: str

    def attach_fields(self) -> AttachFields:
        """What a loader must be told."""

    def fds(self) -> tuple[int, ...]:
        """What a loader must be handed, beside that."""

    def tensor(self) -> "torch.Tensor":
        """All of the arena as a 1-D uint8 tensor; no copy. Imports torch."""

    def synchronise(self) -> None:
        """Return when the device has finished everything that was given to it."""

    def close(self) -> None:
        """Let go of the arena. Its memory lives on while a tensor over it does."""


class CpuArena:
    """The CPU device's arena: a memfd, present from the first page to the last and sealed in its size.

    Raises `ArenaError` when it is larger than the memory that is available.
    """

    transport = "memfd"

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        available_bytes = memory_available_bytes()
        if not 0 < size_bytes <= available_bytes:
            raise ArenaError(
                f"an arena of {size_bytes} bytes is not possible: give it more than none and less than the "
                f"{available_bytes} bytes of memory that are available"
            )
        self._fd = os.memfd_create("understudy-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, size_bytes)
            # A loader that went mad cannot shrink it: reading a page that is gone would kill the parent.
            fcntl.fcntl(
                self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self._mapping: mmap.mmap | None = mmap.mmap(self._fd, size_bytes, mmap.MAP_SHARED)
            _prefault(self._fd, self._mapping)
        except OSError as error:
            os.close(self._fd)
            raise ArenaError(f"cannot have {size_bytes} bytes of shared memory: {error}") from error

    def attach_fields(self) -> AttachFields:
        """See `Arena`."""
        return AttachFields(transport=self.transport, arena_bytes=self.size_bytes)

    def fds(self) -> tuple[int, ...]:
        """See `Arena`."""
        return (self._fd,)

    def tensor(self) -> "torch.Tensor":
        """See `Arena`."""
        if self._mapping is None:
            raise ArenaError("the arena is closed")
        import torch

        return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def synchronise(self) -> None:
        """The CPU has finished when a call returns."""

    def close(self) -> None:
        """See `Arena`. A tensor holds the mapping by a reference: it is unmapped with the last one."""
        if self._mapping is not None:
            self._mapping = None
            os.close(self._fd)


def auto_size_bytes(share: float, *, meminfo: Path = Path("/proc/meminfo")) -> int:
    """`share` of the memory available now, in whole 2 MiB: the CPU device's `auto`."""
    return int(memory_available_bytes(meminfo) * share) // _GRAIN_BYTES * _GRAIN_BYTES


def memory_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel reckons can be had without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ArenaError(f"{meminfo} does not say what memory is available; give the arena a size")


def _prefault(fd: int, mapping: mmap.mmap) -> None:
    """Have every page now: the first load into a page must not pay for it, and lack of memory shows here.

    Two threads take 0.4 s per GB of memory, one 0.65. Huge pages are not asked for: most kernels leave them
    off for shared memory (`shmem_enabled` is `never`), and there the advice changes nothing (measured).
    """
    pieces = iter(range(0, len(mapping), _PREFAULT_PIECE_BYTES))
    lock = threading.Lock()
    errors: list[OSError] = []
    count = min(_PREFAULT_THREADS, os.cpu_count() or 1, -(-len(mapping) // _PREFAULT_PIECE_BYTES))
    threads = [
        threading.Thread(target=_prefault_pieces, args=(mapping, pieces, lock, errors)) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors and errors[0].errno == errno.EINVAL:  # before Linux 5.14
        os.posix_fallocate(fd, 0, len(mapping))
    elif errors:
        raise errors[0]


def _prefault_pieces(
    mapping: mmap.mmap, pieces: Iterator[int], lock: threading.Lock, errors: list[OSError]
) -> None:
    while not errors:
        with lock:
            start = next(pieces, None)
        if start is None:
            return
        try:
            size_bytes = min(_PREFAULT_PIECE_BYTES, len(mapping) - start)
            linux.populate(mapping, start, size_bytes, linux.MADV_POPULATE_WRITE)
        except OSError as error:
            errors.append(error)
