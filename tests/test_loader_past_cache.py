"""Reads past the page cache: the same bytes whatever is cached, wherever they lie, whoever refuses."""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from loader_kit import HEADER_BYTES, KIB, MIB, make_blob
from reading_kit import MemoryTarget, reader
from understudyd.loader import linux
from understudyd.loader.past_cache import PastCache
from understudyd.loader.reading import ReadError, Reading

SIZE_BYTES = MIB + 100  # the last bytes are no whole block


class Disk:
    """Notes what is read past the cache, and may refuse it."""

    def __init__(self, refuses: int = 0) -> None:
        self.parts: list[tuple[int, int]] = []
        self.refuses = refuses

    def read(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.parts.append((offset, len(views[0])))
        if self.refuses:
            raise OSError(self.refuses, os.strerror(self.refuses))
        return os.preadv(fd, views, offset)


@pytest.fixture
def data() -> bytes:
    return os.urandom(SIZE_BYTES)


@pytest.fixture
def fd(tmp_path: Path, data: bytes) -> Iterator[int]:
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(fd)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> memoryview:
    """Whole pages."""
    return memoryview(mmap.mmap(-1, 2 * MIB))


def drop(fd: int) -> None:
    """Have the page cache forget a file, or skip where that does not work."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if linux.cached_bytes(fd, 0, SIZE_BYTES):
            pytest.skip("this file system keeps its files in memory")
    except OSError as error:
        pytest.skip(f"the kernel does not tell what is cached: {error}")


def read_all(file: PastCache, view: memoryview, offset: int = 0) -> bytes:
    done = 0
    while done < len(view) and (count := file.read(view[done:], offset + done)):
        done += count
    return bytes(view[:done])


@pytest.mark.parametrize("offset", [0, 4096, 512, 4095, 600_000])
@pytest.mark.parametrize("size_bytes", [1, 4096, 5000, 300_000, SIZE_BYTES])
@pytest.mark.parametrize("memory_at", [0, 512, 7])
def test_the_same_bytes_from_anywhere_to_anywhere(
    fd: int, data: bytes, memory: memoryview, offset: int, size_bytes: int, memory_at: int
) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with closing(PastCache(fd)) as file:
        assert (
            read_all(file, memory[memory_at : memory_at + size_bytes], offset) == data[offset:][:size_bytes]
        )
        assert read_all(file, memory[:100], SIZE_BYTES) == b""


def test_what_is_missing_is_read_past_the_cache(fd: int, data: bytes, memory: memoryview) -> None:
    drop(fd)
    disk = Disk()
    with closing(PastCache(fd, read_direct=disk.read)) as file:
        assert read_all(file, memory[:SIZE_BYTES]) == data
    assert disk.parts == [(0, MIB)]
    assert linux.cached_bytes(fd, 0, MIB // 2) == 0, "asking and reading leaves the cache as it was"


def test_what_is_cached_is_read_from_the_cache(fd: int, data: bytes, memory: memoryview) -> None:
    drop(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, MIB // 2, MIB // 2)
    disk = Disk()
    with closing(PastCache(fd, read_direct=disk.read)) as file:
        for offset in range(0, MIB, MIB // 4):
            assert read_all(file, memory[: MIB // 4], offset) == data[offset:][: MIB // 4]
    assert disk.parts == [(0, MIB // 4), (MIB // 4, MIB // 4)]


def test_a_refused_read_is_not_tried_again(fd: int, data: bytes, memory: memoryview) -> None:
    disk = Disk(refuses=errno.EINVAL)
    with closing(PastCache(fd, read_direct=disk.read, cached_bytes=lambda *part: 0)) as file:
        assert read_all(file, memory[: MIB // 2]) == data[: MIB // 2]
        assert read_all(file, memory[: MIB // 2], MIB // 2) == data[MIB // 2 : MIB]
    assert disk.parts == [(0, MIB // 2)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_where_the_kernel_does_not_tell_all_is_read_plainly(
    fd: int, data: bytes, memory: memoryview, number: int
) -> None:
    def refuse(fd: int, offset: int, size_bytes: int) -> int:
        raise OSError(number, os.strerror(number))

    disk = Disk()
    with closing(PastCache(fd, read_direct=disk.read, cached_bytes=refuse)) as file:
        assert read_all(file, memory[:SIZE_BYTES]) == data
    assert disk.parts == []


def test_where_it_cannot_be_opened_like_that_all_is_read_plainly(
    fd: int, data: bytes, memory: memoryview
) -> None:
    def refuse(path: str, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    disk = Disk()
    file = PastCache(fd, open_file=refuse, read_direct=disk.read)
    assert read_all(file, memory[:SIZE_BYTES]) == data
    assert disk.parts == []
    file.close()


@pytest.mark.parametrize("rate", [0.0, 64.0 * MIB])
@pytest.mark.parametrize("checked", [True, False])
def test_a_load_to_the_pool_that_is_not_cached(tmp_path: Path, checked: bool, rate: float) -> None:
    blob = make_blob(tmp_path / "blob", MIB + 777)
    fd = os.open(blob.path, os.O_RDONLY)
    os.fsync(fd)
    drop(fd)
    target = MemoryTarget()
    load = blob.load(pool_offset=0, **({} if checked else {"xxh3": ()}))
    Reading(load, reader(target, rate=rate)).run()
    assert target.pool[: len(blob.data)] == target.memory[: len(blob.data)] == blob.data
    os.close(fd)


def test_a_file_that_shrinks_on_the_way_to_the_pool_is_corrupt(tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "blob")
    target = MemoryTarget()
    target.before_copy = lambda offset: os.truncate(blob.path, HEADER_BYTES + 64 * KIB + 100)
    with pytest.raises(ReadError, match="ends at byte") as caught:
        Reading(blob.load(pool_offset=0), reader(target, threads=1)).run()
    assert caught.value.corrupt
