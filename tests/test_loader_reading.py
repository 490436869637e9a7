"""One load, in this process: the right bytes in the right place, and every way a file can be wrong."""

import os
import threading
import time
from pathlib import Path

import pytest

from loader_kit import CHUNK_BYTES, HEADER_BYTES, KIB, MIB, Blob, make_blob
from reading_kit import MemoryTarget, reader
from understudyd.loader.faults import CrashPoints
from understudyd.loader.reading import ReadCancelled, ReadError, Reading
from understudyd.loader.wire import FileVersion, Loaded


@pytest.fixture
def target() -> MemoryTarget:
    return MemoryTarget()


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


def version(path: Path) -> FileVersion:
    status = path.stat()
    return FileVersion(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [7 * KIB, CHUNK_BYTES, MIB])
@pytest.mark.parametrize("size_bytes", [1, CHUNK_BYTES, 5 * CHUNK_BYTES, 300_001])
@pytest.mark.parametrize("checked", [True, False])
def test_bytes_arrive_and_neighbours_stay(
    tmp_path: Path, target: MemoryTarget, threads: int, chunk_bytes: int, size_bytes: int, checked: bool
) -> None:
    blob = make_blob(tmp_path / "blob", size_bytes)
    load = blob.load(arena_offset=512, **({} if checked else {"xxh3": ()}))
    loaded = Reading(load, reader(target, threads=threads, chunk_bytes=chunk_bytes)).run()
    assert target.memory[512 : 512 + size_bytes] == blob.data
    assert set(target.memory[:512]) == {0xEE}
    assert set(target.memory[512 + size_bytes :]) == {0xEE}
    assert loaded.verified is checked
    assert loaded.version == version(blob.path)
    assert target.is_synchronised


@pytest.mark.parametrize("checked", [True, False])
def test_a_thread_goes_on_where_it_was(tmp_path: Path, target: MemoryTarget, checked: bool) -> None:
    """From the disk that is fast. In the end all have as much to do, give or take one span."""
    blob = make_blob(tmp_path / "blob", 32 * CHUNK_BYTES)
    taken: dict[int, list[int]] = {}
    both = threading.Barrier(2)

    def note(offset: int) -> None:
        taken.setdefault(threading.get_ident(), []).append(offset // CHUNK_BYTES)
        both.wait(10)  # two threads, equally fast

    target.before_write = note
    Reading(blob.load(**({} if checked else {"xxh3": ()})), reader(target, threads=2)).run()
    assert target.memory[: len(blob.data)] == blob.data
    assert sorted(span for spans in taken.values() for span in spans) == list(range(32))
    first, second = sorted(taken.values())
    assert first[:8] == list(range(8)) and second[:6] == list(range(8, 14))
    assert len(first) == len(second) == 16


WAYS = {
    "through the pool": {"arena_offset": 513, "pool_offset": 77},
    "pool": {"arena_offset": None, "pool_offset": 77},
    "from the pool": {"arena_offset": 513, "pool_offset": 77, "from_pool": True, "path": "/nowhere"},
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [7 * KIB + 1, CHUNK_BYTES, MIB])
@pytest.mark.parametrize("size_bytes", [1, CHUNK_BYTES, 300_001])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_the_pool(
    tmp_path: Path, target: MemoryTarget, threads: int, chunk_bytes: int, size_bytes: int, way: str
) -> None:
    blob = make_blob(tmp_path / "blob", size_bytes)
    from_pool = way == "from the pool"
    if from_pool:
        target.pool[77 : 77 + size_bytes] = blob.data
    shared = reader(target, threads=threads, chunk_bytes=chunk_bytes)
    loaded = Reading(blob.load(**WAYS[way]), shared).run()
    assert target.pool_memory == b"\xdd" * 77 + blob.data + b"\xdd" * (2 * MIB - 77 - size_bytes)
    copied = blob.data if way != "pool" else b"\xee" * size_bytes
    assert target.memory == b"\xee" * 513 + copied + b"\xee" * (2 * MIB - 513 - size_bytes)
    assert (loaded.version, loaded.verified) == ((None, False) if from_pool else (version(blob.path), True))
    assert target.is_synchronised


@pytest.mark.parametrize("way", ["arena", *WAYS])
def test_progress_counts_every_byte_once(blob: Blob, target: MemoryTarget, way: str) -> None:
    shared = reader(target, threads=1)
    seen: list[tuple[int | None, int]] = []
    shared.crash_points.at = lambda point: seen.append(shared.progress.look())  # type: ignore[method-assign]
    Reading(blob.load(**WAYS.get(way, {})), shared).run()
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert seen[-1] == (1, len(blob.data))
    assert shared.progress.look() == (None, 0)


def test_a_chunk_goes_on_as_soon_as_it_is_in_the_pool(blob: Blob, target: MemoryTarget) -> None:
    shared = reader(target, threads=1)
    seen: list[int] = []
    target.before_copy = lambda offset: seen.append(shared.progress.look()[1])
    Reading(blob.load(pool_offset=0), shared).run()
    assert seen == [*range(CHUNK_BYTES, len(blob.data), CHUNK_BYTES), len(blob.data)]


@pytest.mark.parametrize("at", [0, 299_999])
def test_bit_flip_on_the_way_to_the_pool_is_corrupt(blob: Blob, target: MemoryTarget, at: int) -> None:
    flip(blob, at)
    with pytest.raises(ReadError, match="damaged") as caught:
        Reading(blob.load(arena_offset=None, pool_offset=0), reader(target)).run()
    assert caught.value.corrupt


def test_empty_load(blob: Blob, target: MemoryTarget) -> None:
    Reading(blob.load(size_bytes=0, xxh3=()), reader(target)).run()
    assert set(target.memory) == {0xEE}


def test_where_no_thread_is_to_be_had_one_does_it(
    blob: Blob, target: MemoryTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    Reading(blob.load(), reader(target, threads=4)).run()
    assert target.memory[: len(blob.data)] == blob.data


@pytest.mark.parametrize("at", [0, CHUNK_BYTES + 7, 299_999])
def test_bit_flip_is_corrupt(blob: Blob, target: MemoryTarget, at: int) -> None:
    flip(blob, at)
    with pytest.raises(ReadError, match="damaged") as caught:
        Reading(blob.load(), reader(target)).run()
    assert caught.value.corrupt
    assert target.is_synchronised


def test_truncated_is_corrupt(blob: Blob, target: MemoryTarget) -> None:
    os.truncate(blob.path, HEADER_BYTES + len(blob.data) - 1)
    with pytest.raises(ReadError, match="truncated") as caught:
        Reading(blob.load(), reader(target)).run()
    assert caught.value.corrupt


@pytest.mark.parametrize("threads", [1, 3])
def test_shrinking_is_corrupt(blob: Blob, target: MemoryTarget, threads: int) -> None:
    target.before_write = lambda offset: os.truncate(blob.path, HEADER_BYTES + 100)
    with pytest.raises(ReadError, match="ends at byte") as caught:
        Reading(blob.load(), reader(target, threads=threads)).run()
    assert caught.value.corrupt
    assert target.is_synchronised


def test_written_to_while_read_is_corrupt(blob: Blob, target: MemoryTarget) -> None:
    def touch(offset: int) -> None:
        os.utime(blob.path, ns=(1, 1))

    target.before_write = touch
    with pytest.raises(ReadError, match="written to") as caught:
        Reading(blob.load(xxh3=()), reader(target)).run()
    assert caught.value.corrupt


def test_expected_version_is_not_checked_again(blob: Blob, target: MemoryTarget) -> None:
    wrong = tuple(value ^ 1 for value in blob.xxh3)
    loaded = Reading(blob.load(xxh3=wrong, expect=version(blob.path)), reader(target)).run()
    assert loaded.verified
    assert target.memory[: len(blob.data)] == blob.data


def test_another_version_is_checked_again(blob: Blob, target: MemoryTarget) -> None:
    expect = version(blob.path)
    os.utime(blob.path, ns=(1, 1))
    assert Reading(blob.load(expect=expect), reader(target)).run().verified
    flip(blob, 5)
    with pytest.raises(ReadError, match="damaged"):
        Reading(blob.load(expect=expect), reader(target)).run()


def test_replaced_without_checksums_is_corrupt(blob: Blob, target: MemoryTarget) -> None:
    expect = version(blob.path)
    other = make_blob(blob.path.with_name("other"), seed=1)
    other.path.replace(blob.path)
    with pytest.raises(ReadError, match="replaced") as caught:
        Reading(blob.load(xxh3=(), expect=expect), reader(target)).run()
    assert caught.value.corrupt


def test_replaced_under_the_reader_reads_what_it_opened(blob: Blob, target: MemoryTarget) -> None:
    other = make_blob(blob.path.with_name("other"), seed=1)

    def swap(offset: int) -> None:
        if other.path.exists():
            other.path.replace(blob.path)

    target.before_write = swap
    Reading(blob.load(), reader(target, threads=1)).run()
    assert target.memory[: len(blob.data)] == blob.data


def test_fifo_is_refused_at_once(tmp_path: Path, blob: Blob, target: MemoryTarget) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ReadError, match="not a regular file") as caught:
        Reading(blob.load(path=str(tmp_path / "fifo")), reader(target)).run()
    assert not caught.value.corrupt


def test_folder_is_refused(tmp_path: Path, blob: Blob, target: MemoryTarget) -> None:
    with pytest.raises(ReadError, match="not a regular file"):
        Reading(blob.load(path=str(tmp_path)), reader(target)).run()


def test_symlink_is_refused(tmp_path: Path, blob: Blob, target: MemoryTarget) -> None:
    (tmp_path / "link").symlink_to(blob.path)
    with pytest.raises(ReadError, match="symbolic link") as caught:
        Reading(blob.load(path=str(tmp_path / "link")), reader(target)).run()
    assert not caught.value.corrupt


def test_missing_is_an_os_error(tmp_path: Path, blob: Blob, target: MemoryTarget) -> None:
    with pytest.raises(FileNotFoundError):
        Reading(blob.load(path=str(tmp_path / "none")), reader(target)).run()


@pytest.mark.parametrize(
    "changes",
    [
        {"arena_offset": 2 * MIB - 100},
        {"arena_offset": -1},
        {"size_bytes": -5},
        {"file_offset": -1},
        {"xxh3": (1, 2)},
        {"checksum_chunk_bytes": 0},
        {"arena_offset": None},
        {"pool_offset": 2 * MIB - 100},
        {"pool_offset": -1},
        {"from_pool": True},
        {"arena_offset": None, "pool_offset": 0, "from_pool": True},
        {"arena_offset": None, "from_pool": True},
    ],
)
def test_senseless_orders_touch_nothing(blob: Blob, target: MemoryTarget, changes: dict[str, object]) -> None:
    with pytest.raises(ReadError) as caught:
        Reading(blob.load(**changes), reader(target)).run()
    assert not caught.value.corrupt
    assert set(target.memory) == {0xEE}
    assert set(target.pool_memory) == {0xDD}


def test_cancelled_before_it_started(blob: Blob, target: MemoryTarget) -> None:
    reading = Reading(blob.load(), reader(target))
    reading.cancel()
    with pytest.raises(ReadCancelled):
        reading.run()
    assert set(target.memory) == {0xEE}


def test_cancelled_between_chunks(blob: Blob, target: MemoryTarget) -> None:
    reading = Reading(blob.load(), reader(target, threads=1))
    target.before_write = lambda offset: reading.cancel() if offset >= 2 * CHUNK_BYTES else None
    with pytest.raises(ReadCancelled):
        reading.run()
    assert target.memory[: 2 * CHUNK_BYTES] == blob.data[: 2 * CHUNK_BYTES]
    assert set(target.memory[2 * CHUNK_BYTES :]) == {0xEE}
    assert target.is_synchronised


@pytest.mark.parametrize("way", ["through the pool", "from the pool"])
def test_cancelled_between_copies(blob: Blob, target: MemoryTarget, way: str) -> None:
    reading = Reading(blob.load(**WAYS[way] | {"arena_offset": 0}), reader(target, threads=1))
    target.before_copy = lambda offset: reading.cancel() if offset >= 2 * CHUNK_BYTES else None
    with pytest.raises(ReadCancelled):
        reading.run()
    assert set(target.memory[3 * CHUNK_BYTES :]) == {0xEE}
    assert target.is_synchronised and not target.queue


@pytest.mark.parametrize("way", ["arena", *WAYS])
@pytest.mark.parametrize("ends", ["goes on", "cancelled"])
def test_a_pause_is_kept_between_two_pieces(blob: Blob, target: MemoryTarget, way: str, ends: str) -> None:
    shared = reader(target)
    shared.pause.order(True)
    reading = Reading(blob.load(**WAYS.get(way, {})), shared)
    results: list[object] = []

    def run() -> None:
        try:
            results.append(reading.run())
        except ReadCancelled as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive() and shared.progress.look() == (1, 0)
    assert set(target.memory) == {0xEE} and set(target.pool_memory) == {0xDD} and not target.queue
    shared.pause.order(False) if ends == "goes on" else reading.cancel()
    thread.join(10)
    assert isinstance(results[0], Loaded if ends == "goes on" else ReadCancelled)


def test_cancelling_ends_a_paced_wait(blob: Blob, target: MemoryTarget) -> None:
    """At one KiB a second the load would take five minutes."""
    reading = Reading(blob.load(), reader(target, rate=KIB))
    canceller = threading.Timer(0.05, reading.cancel)
    canceller.start()
    started_at_s = time.monotonic()
    with pytest.raises(ReadCancelled):
        reading.run()
    assert time.monotonic() - started_at_s < 2.0
    canceller.join()


@pytest.mark.parametrize("threads", [1, 2])
def test_rate_limit_is_honoured(tmp_path: Path, target: MemoryTarget, threads: int) -> None:
    blob = make_blob(tmp_path / "blob", MIB)
    loaded = Reading(blob.load(), reader(target, threads=threads, rate=4 * MIB)).run()
    took_s = loaded.ended_at_s - loaded.started_at_s
    assert 0.22 < took_s < 1.0  # 0.25 less the burst; a busy machine may take longer
    assert target.memory[:MIB] == blob.data


def test_no_descriptor_is_left(blob: Blob, target: MemoryTarget) -> None:
    before = set(os.listdir("/proc/self/fd"))
    Reading(blob.load(), reader(target)).run()
    flip(blob, 0)
    with pytest.raises(ReadError):
        Reading(blob.load(), reader(target)).run()
    assert set(os.listdir("/proc/self/fd")) == before


def test_crash_points_say_what_they_do_not_understand() -> None:
    for wrong in ("nowhere", "stop:nowhere", "read:1:2", "stop", "kill@path"):
        with pytest.raises(ValueError, match="point"):
            CrashPoints(wrong)


def flip(blob: Blob, at: int) -> None:
    with blob.path.open("r+b") as file:
        file.seek(HEADER_BYTES + at)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + at)
        file.write(bytes([byte ^ 0x10]))
