"""The host pool's index, and what makes a daemon drop the pool that another one left."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.manager import Manager, managed
from hypothesis import given, settings
from hypothesis import strategies as st

from core_kit import World, model
from understudyd.config import AUTO
from understudyd.core import events as ev
from understudyd.shell.host_pool import HostPool
from understudyd.shell.kept_pool import INDEX, POOL, KeptPool
from understudyd.shell.notify import ServiceManager
from understudyd.shell.pool_index import PoolIndex, PoolRecord, StaleIndex

MIB = 2**20
SLOT_BYTES = 64 * MIB
FOUND = ev.CopiesFound((ev.KeptCopy("a" * 64, 4096, 100),), ("model",))


def record(found: ev.CopiesFound = FOUND, pool_id: int = 7) -> PoolRecord:
    return PoolRecord(pool_id=pool_id, pool_bytes=MIB, found=found)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("index")
    yield made
    os.close(made)


# -- the index ----------------------------------------------------------------------------------------


def test_the_newest_record_counts(fd: int) -> None:
    index = PoolIndex(fd)
    for pool_id in range(5):
        index.write(record(pool_id=pool_id))
        assert PoolIndex(fd).read() == record(pool_id=pool_id)


@settings(deadline=None)
@given(at=st.integers(0, 200), kept=st.integers(0, 1))
def test_killed_while_writing_the_record_before_counts(at: int, kept: int) -> None:
    """Whatever part of the newer slot was written, the older one is whole."""
    fd = os.memfd_create("index")
    try:
        index = PoolIndex(fd)
        for pool_id in range(2 + kept):
            index.write(record(pool_id=pool_id))
        newest = (2 + kept) % 2 * SLOT_BYTES
        os.pwrite(fd, b"\xff", newest + (at if at < 48 else 4096 + at - 48))
        found: PoolRecord | None
        try:
            found = PoolIndex(fd).read()
        except StaleIndex:
            assert 16 <= at < 24, "only another format makes all of it useless"
        else:
            assert found in (record(pool_id=kept), record(pool_id=1 + kept))
    finally:
        os.close(fd)


def test_what_follows_a_record_that_was_read_is_newer(fd: int) -> None:
    PoolIndex(fd).write(record(pool_id=1))
    second = PoolIndex(fd)
    second.read()
    second.write(record(pool_id=2))
    assert PoolIndex(fd).read().pool_id == 2


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_nonsense_is_stale(contents: bytes) -> None:
    fd = os.memfd_create("index")
    try:
        os.pwrite(fd, contents, 0)
        with pytest.raises(StaleIndex):
            PoolIndex(fd).read()
    finally:
        os.close(fd)


def test_what_does_not_fit_says_nothing(fd: int) -> None:
    index = PoolIndex(fd)
    index.write(record())
    with pytest.raises(StaleIndex, match="do not fit"):
        index.write(record(ev.CopiesFound((), ("x" * SLOT_BYTES,))))
    with pytest.raises(StaleIndex):
        PoolIndex(fd).read()


# -- the pool -----------------------------------------------------------------------------------------


class Lives:
    """A pool's lives over one manager."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.pool: HostPool | None = None

    def next(self, wanted_bytes: int = MIB) -> KeptPool:
        """The next life's."""
        self.end()
        fds = {name: os.dup(fd) for name, fd in self.manager.kept.items()}
        self.kept = KeptPool(ServiceManager(self.manager.address, fds))
        size_bytes = MIB if wanted_bytes == AUTO else wanted_bytes
        self.pool = self.kept.host_pool(wanted_bytes, lambda: HostPool(size_bytes) if size_bytes else None)
        return self.kept

    def end(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.kept.close()
            self.pool = None


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    with managed(tmp_path / "none.toml", tmp_path / "run", tmp_path) as manager:
        lives = Lives(manager)
        yield lives
        lives.end()


def with_a_copy() -> World:
    world = World(8, pool_pages=8, models=[model("a", 2)])
    world.tell(ev.LoaderReady(1))
    world.ask("a")
    world.tell(ev.LoadFinished(min(world.ledger.loads)))
    return world


def test_a_pool_and_what_is_known_of_it_go_from_life_to_life(lives: Lives) -> None:
    first = lives.next()
    assert first.found is None
    lives.manager.wait_until(lambda: set(lives.manager.kept) == {POOL, INDEX})
    assert lives.pool is not None
    os.pwrite(lives.pool.fds()[0], b"weights", 4096)
    machine = with_a_copy().machine
    first.note(machine)
    assert PoolIndex(lives.manager.kept[INDEX]).read().found.copies == (), "not before it was handed over"
    first.tell(lambda event: None)
    first.note(machine)
    second = lives.next(AUTO)
    assert second.found is not None and [copy.blob for copy in second.found.copies] == ["a.0"]
    assert os.pread(lives.pool.fds()[0], 7, 4096) == b"weights"
    told: list[ev.Event] = []
    second.tell(told.append)
    assert told == [second.found]


def test_nothing_is_written_before_what_was_found_is_told(lives: Lives) -> None:
    """Killed on its way up, a daemon leaves what it found."""
    first = lives.next()
    lives.manager.wait_until(lambda: len(lives.manager.kept) == 2)
    first.tell(lambda event: None)
    first.note(with_a_copy().machine)
    second = lives.next()
    second.note(World(8, pool_pages=8).machine)
    second.write(World(8, pool_pages=8).machine)
    third = lives.next()
    assert third.found is not None and third.found == second.found


@pytest.mark.parametrize(
    "why",
    ["it is of format 99, this daemon's is 1", "its index is damaged", "it was kept without its index",
     "its index speaks about another pool", "host.pool is 0.00 GiB", "anybody could change its size"],
)  # fmt: skip
def test_a_pool_that_cannot_be_trusted_is_dropped(
    lives: Lives, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    lives.next()
    lives.manager.wait_until(lambda: len(lives.manager.kept) == 2)
    lives.end()
    kept, wanted_bytes = lives.manager.kept, MIB
    if "format" in why:
        os.pwrite(kept[INDEX], b"\x63", SLOT_BYTES + 16)
    elif "damaged" in why:
        os.ftruncate(kept[INDEX], 0)
    elif "without" in why:
        os.close(kept.pop(INDEX))
    elif "host.pool" in why:
        wanted_bytes = 0
    else:
        os.close(kept.pop(POOL))
        kept[POOL] = os.memfd_create("another")
        os.ftruncate(kept[POOL], MIB)
        if "anybody" in why:
            status = os.fstat(kept[POOL])
            PoolIndex(kept[INDEX]).write(record(pool_id=status.st_ino))
            PoolIndex(kept[INDEX]).write(record(pool_id=status.st_ino))
    with caplog.at_level(logging.WARNING):
        found = lives.next(wanted_bytes).found
    assert found is None and f"is dropped: {why}" in caplog.text.replace("it has 0.00 GiB and ", "")
    expected = {POOL, INDEX} if wanted_bytes else set()
    lives.manager.wait_until(lambda: set(lives.manager.kept) == expected)


def test_without_a_service_manager_nothing_is_kept() -> None:
    kept = KeptPool(ServiceManager())
    pool = kept.host_pool(MIB, lambda: HostPool(MIB))
    assert pool is not None and kept.found is None
    kept.tell(lambda event: pytest.fail("nothing was found"))
    kept.note(with_a_copy().machine)
    pool.close()
    kept.close()
