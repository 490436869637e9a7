"""The arena: the one allocation that holds all weights. The parent owns it, loaders fill it, torch reads it.

This module imports no torch: the arena of the CPU device stands before torch is imported.
"""

import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from understudyd.loader import linux
from understudyd.loader.proof import PROOF_AREA_BYTES

if TYPE_CHECKING:
    import torch

_PREFAULT_PIECE_BYTES = 64 * 1024 * 1024
_ZEROS_BYTES = 1024 * 1024


class ArenaError(Exception):
    """The arena cannot be had; the message says what to change."""


@dataclass(frozen=True, slots=True)
class OpenFields:
    """How a loader reaches the arena: the fields of the same names in the loader protocol's `OpenArena`."""

    transport: str
    arena_bytes: int
    ipc_handle: bytes = b""
    address: int = 0


class Arena(Protocol):
    """One allocation of `size_bytes` and the proof area behind them, opened once by every loader."""

    size_bytes: int

    @property
    def ipc_refusal(self) -> str | None:
        """Why no other process can open it, None when loader processes can."""

    def open_fields(self) -> OpenFields:
        """What a loader must be told."""

    def fds(self) -> tuple[int, ...]:
        """What a loader must be handed, beside that."""

    def tensor(self) -> "torch.Tensor":
        """All of the arena as a 1-D uint8 tensor; no copy. Imports torch."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A few bytes as they are now, the proof area's too. Does not wait for what computes.

        Raises `ArenaError`, as `write` does.
        """

    def write(self, offset: int, content: bytes) -> None:
        """A few bytes; they are there when this returns. Does not wait for what computes."""

    def synchronise(self) -> None:
        """Return when the device has finished everything that was given to it."""

    def close(self) -> None:
        """Let go of the arena. Its memory lives on while a tensor over it does."""


class CpuArena:
    """The CPU device's arena: a memfd, present from the first page to the last and sealed in its size.

    Raises `ArenaError` when it is larger than the memory that is available.
    """

    transport = "memfd"
    ipc_refusal: str | None = None

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        check_available("an arena", size_bytes, memory_available_bytes())
        self._fd = os.memfd_create("understudy-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            whole_bytes = size_bytes + PROOF_AREA_BYTES
            os.ftruncate(self._fd, whole_bytes)
            # A loader that went mad cannot shrink it: reading a page that is gone would kill the parent.
            fcntl.fcntl(
                self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self._mapping: mmap.mmap | None = mmap.mmap(self._fd, whole_bytes, mmap.MAP_SHARED)
            _prefault(self._fd, self._mapping)
        except OSError as error:
            os.close(self._fd)
            raise ArenaError(f"cannot have {size_bytes / 2**30:.2f} GiB of shared memory: {error}") from error

    def open_fields(self) -> OpenFields:
        """See `Arena`."""
        return OpenFields(transport=self.transport, arena_bytes=self.size_bytes)

    def fds(self) -> tuple[int, ...]:
        """See `Arena`."""
        return (self._fd,)

    def tensor(self) -> "torch.Tensor":
        """See `Arena`."""
        if self._mapping is None:
            raise ArenaError("the arena is closed")
        import torch

        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=self.size_bytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See `Arena`."""
        return os.pread(self._fd, size_bytes, offset)

    def write(self, offset: int, content: bytes) -> None:
        """See `Arena`."""
        os.pwrite(self._fd, content, offset)

    def synchronise(self) -> None:
        """The CPU has finished when a call returns."""

    def close(self) -> None:
        """See `Arena`. A tensor holds the mapping by a reference: it is unmapped with the last one."""
        if self._mapping is not None:
            self._mapping = None
            os.close(self._fd)


def check_available(what: str, size_bytes: int, available_bytes: int) -> None:
    """Raises `ArenaError` when `what` cannot have so much of the memory."""
    if not 0 < size_bytes <= available_bytes:
        raise ArenaError(
            f"{what} of {size_bytes / 2**30:.2f} GiB is not possible: give it more than none and less "
            f"than the {available_bytes / 2**30:.2f} GiB of memory that are available"
        )


def memory_available_bytes(root: Path = Path("/")) -> int:
    """What can be had without swapping: as the kernel reckons, and within the limits of this control group.

    `root` is where /proc and /sys are. Raises `ArenaError` when the kernel does not say.
    """
    meminfo = root / "proc/meminfo"
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available_bytes = int(line.split()[1]) * 1024
            return min([available_bytes, *(_headroom_bytes(*place) for place in _control_groups(root))])
    raise ArenaError(f"{meminfo} does not say what memory is available; give the arena a size")


@dataclass(frozen=True, slots=True)
class _ControlFiles:
    """The files of one version of control groups, and the lines of `memory.stat` that can be taken back."""

    limit: str
    usage: str
    caches: tuple[str, ...]


# https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html
_V2 = _ControlFiles("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = _ControlFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)


def _control_groups(root: Path) -> Iterator[tuple[Path, _ControlFiles]]:
    """The groups of this process that count memory, and all their ancestors: every limit holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without them
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, _V1 if controllers else _V2


def _headroom_bytes(folder: Path, files: _ControlFiles) -> int:
    """What one group may still use. File caches count as used there but give way."""
    try:
        limit = (folder / files.limit).read_text().strip()
        if limit == "max":
            return sys.maxsize
        used_bytes = int((folder / files.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the top has no limit, and a container does not see all that is above it
        return sys.maxsize
    return max(0, int(limit) - used_bytes + sum(int(stat.get(name, 0)) for name in files.caches))


def _prefault(fd: int, mapping: mmap.mmap) -> None:
    """Have every page now: the first load into a page must not pay for it, and lack of memory shows here.

    By writing, which takes half of what faults take (0.6 against 1.2 s of a core per GB) and, above all,
    leaves the address space alone: whoever maps memory meanwhile waits for a populating `madvise`, and the
    import of torch maps memory a thousand times (4 GB beside it: both done after 5.5 s, by faults after 7 to
    17 s). What is left for `madvise` is the table of pages that are there. Huge pages are not asked for: most
    kernels leave them off for shared memory (`shmem_enabled` is `never`), where the advice changes nothing.
    """
    for start in range(0, len(mapping), _PREFAULT_PIECE_BYTES):
        size_bytes = min(_PREFAULT_PIECE_BYTES, len(mapping) - start)
        _write_zeros(fd, start, size_bytes)
    try:
        for start in range(0, len(mapping), _PREFAULT_PIECE_BYTES):
            size_bytes = min(_PREFAULT_PIECE_BYTES, len(mapping) - start)
            linux.populate(mapping, start, size_bytes, linux.MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.14: the first who come take the faults
            raise


def _write_zeros(fd: int, start: int, size_bytes: int) -> None:
    """In one call where the kernel does it in one: each return would wait for the interpreter."""
    zeros = memoryview(bytes(min(_ZEROS_BYTES, size_bytes)))
    while size_bytes:
        whole, rest = divmod(size_bytes, len(zeros))
        written_bytes = os.pwritev(fd, [zeros] * whole or [zeros[:rest]], start)
        start, size_bytes = start + written_bytes, size_bytes - written_bytes
