"""A loader that must check what another daemon left in the host pool before anybody uses it."""

import os
from pathlib import Path

import pytest

from loader_kit import KIB, MIB, Blob, arena_bytes, bare_loader, cpu_arena, cpu_host_pool, make_blob
from understudyd.loader import wire

AT = 5 * KIB
WAY = {"pool_offset": AT, "from_pool": True, "must_verify": True}


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    made = make_blob(tmp_path / "blob")
    made.path.unlink()  # nobody may need it
    return made


@pytest.mark.parametrize("as_thread", [False, True])
@pytest.mark.parametrize("chunk_bytes", [7 * KIB, MIB])
def test_a_copy_is_checked_on_its_way(blob: Blob, as_thread: bool, chunk_bytes: int) -> None:
    """What is right arrives, one wrong bit does not go unseen; the file is touched by nobody."""
    with (
        cpu_arena() as arena,
        cpu_host_pool() as pool,
        bare_loader(arena, pool, as_thread=as_thread, chunk_bytes=chunk_bytes) as loader,
    ):
        (fd,) = pool.fds()
        os.pwrite(fd, blob.data, AT)
        loader.process.send(blob.load(1, **WAY))
        loaded = loader.expect(wire.Loaded)
        assert (loaded.version, loaded.verified) == (None, True)
        assert arena_bytes(arena, 0, len(blob.data)) == blob.data
        for count, at in enumerate((0, 64 * KIB, len(blob.data) - 1), 1):
            os.pwrite(fd, bytes([blob.data[at] ^ 4]), AT + at)
            loader.process.send(blob.load(1 + count, **WAY))
            loader.read_until(lambda count=count: len(loader.of(wire.LoadFault)) == count)  # type: ignore[misc]
            fault = loader.of(wire.LoadFault)[-1]
            assert not fault.corrupt, "the file may be as good as ever"
            assert "in the host pool is damaged" in fault.message
            os.pwrite(fd, blob.data[at : at + 1], AT + at)


def test_a_copy_that_nothing_tells_about_is_not_trusted(blob: Blob) -> None:
    with cpu_arena() as arena, cpu_host_pool() as pool, bare_loader(arena, pool) as loader:
        loader.process.send(blob.load(**WAY, xxh3=()))
        assert "nothing tells whether" in loader.expect(wire.LoadFault).message
