"""The host pool's memory: sealed, present before it is used, gone when it is closed."""

import errno
import fcntl
import mmap
import os
import resource
import time

import pytest

from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import ArenaError

MIB = 2**20
DEADLINE_S = 20.0


def present_bytes(fd: int) -> int:
    """What the memfd really takes."""
    return os.fstat(fd).st_blocks * 512


def test_its_pages_come_by_themselves() -> None:
    """Whoever fills it finds them there: hardly a page is made in passing."""
    pool = HostPool(96 * MIB)
    assert present_bytes(pool.fds()[0]) == 0
    pool.allocate()
    (fd,) = pool.fds()
    ends_at_s = time.monotonic() + DEADLINE_S
    while present_bytes(fd) < pool.size_bytes:
        assert time.monotonic() < ends_at_s, f"{present_bytes(fd)} bytes are there"
    with mmap.mmap(fd, 8192) as mapping:
        assert mapping[:] == bytes(8192)
    assert present_bytes(fd) == pool.size_bytes
    pool.close()


def test_closing_does_not_wait_for_the_last_page() -> None:
    before_s = resource.getrusage(resource.RUSAGE_SELF)
    pool = HostPool(512 * MIB)
    pool.allocate()
    (fd,) = pool.fds()
    kept = os.dup(fd)
    pool.close()
    there_bytes = present_bytes(kept)
    os.close(kept)
    assert there_bytes < 512 * MIB, "one piece may have been under way"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_stime - before_s.ru_stime < 2.0


def test_nobody_can_change_its_size() -> None:
    pool = HostPool(2 * MIB)
    for size_bytes in (MIB, 4 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fds()[0], size_bytes)
    pool.close()


@pytest.mark.parametrize("size_bytes", [0, -1, 2**62])
def test_a_size_that_cannot_be(size_bytes: int) -> None:
    with pytest.raises(ArenaError, match=r"a host pool of .* GiB is not possible"):
        HostPool(size_bytes)


def test_without_seals_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("no seals")

    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(ArenaError, match="no seals"):
        HostPool(2 * MIB)
    assert set(os.listdir("/proc/self/fd")) == before


def test_memory_that_does_not_come_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    pool = HostPool(2 * MIB)
    pool.allocate()
    pool.close()
    assert "make host.pool smaller" in caplog.text
