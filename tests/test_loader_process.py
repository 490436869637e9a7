"""Real loaders, processes and threads, spoken to packet by packet: handshake, orders, signals, deaths."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loader_kit import (
    CHUNK_BYTES,
    DEADLINE_S,
    KIB,
    MIB,
    PROOF_SEED,
    Blob,
    Loader,
    arena_bytes,
    bare_loader,
    cpu_arena,
    cpu_host_pool,
    is_alive,
    make_blob,
    wait_readable,
)
from understudyd.loader import wire
from understudyd.loader.faults import ENVIRONMENT_VARIABLE, POINTS
from understudyd.loader.proof import PROOF_BYTES, holds

SLOW = {"rate_limit_bytes_per_s": 64 * KIB}
KINDS = pytest.mark.parametrize("as_thread", [False, True], ids=["process", "thread"])


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


@KINDS
def test_bytes_travel_and_neighbours_stay(blob: Blob, as_thread: bool) -> None:
    with cpu_arena() as arena, bare_loader(arena, as_thread=as_thread) as loader:
        assert loader.expect(wire.Attached).pid == loader.process.pid
        loader.expect(wire.Ready)
        assert holds(arena.read(arena.size_bytes, PROOF_BYTES), PROOF_SEED + 1)
        loader.process.send(blob.load(load_id=7, arena_offset=MIB))
        loaded = loader.expect(wire.Loaded)
        assert (loaded.load_id, loaded.verified) == (7, True)
        assert loaded.started_at_s < loaded.ended_at_s
        assert arena_bytes(arena, MIB, len(blob.data)) == blob.data
        assert not any(arena_bytes(arena, 0, MIB))
        end = MIB + len(blob.data)
        assert not any(arena_bytes(arena, end, arena.size_bytes - end))


@KINDS
def test_bytes_stay_in_the_host_pool_and_come_from_there(blob: Blob, as_thread: bool) -> None:
    """A load to the pool, one that passes through it, and one that finds its file gone."""
    with (
        cpu_arena() as arena,
        cpu_host_pool() as pool,
        bare_loader(arena, pool, as_thread=as_thread, chunk_bytes=7 * KIB) as loader,
    ):
        size_bytes, at = len(blob.data), 4096
        for load_id, changes in enumerate(
            [
                {"arena_offset": None, "pool_offset": at},
                {"arena_offset": 0, "pool_offset": MIB},
                {"arena_offset": MIB, "pool_offset": at, "from_pool": True, "xxh3": ()},
            ]
        ):
            loader.process.send(blob.load(**{"load_id": load_id} | changes))
            loader.read_until(lambda load_id=load_id: len(loader.of(wire.Loaded)) > load_id)
            if load_id == 1:
                blob.path.unlink()
        assert [report.verified for report in loader.of(wire.Loaded)] == [True, True, False]
        assert loader.of(wire.Loaded)[2].version is None
        for memory, places in ((arena, (0, MIB)), (pool, (at, MIB))):
            content = os.pread(memory.fds()[0], memory.size_bytes, 0)
            rest = content
            for place in places:
                assert content[place : place + size_bytes] == blob.data
                rest = rest.replace(blob.data, bytes(size_bytes))
            assert not any(rest)


@KINDS
def test_it_comes_up_in_two_steps(as_thread: bool) -> None:
    with cpu_arena() as arena, bare_loader(arena, as_thread=as_thread) as other:
        other.expect(wire.Ready)
        loader = Loader(arena, as_thread=as_thread)
        loader.expect(wire.Attached)
        loader.read_until(lambda: len(loader.of(wire.Heartbeat)) == 5)
        assert not loader.of(wire.Ready)
        loader.open(proof_offset=arena.size_bytes)
        loader.expect(wire.Ready)
        loader.process.send(wire.Stop())
        assert loader.wait_exited() == 0


@KINDS
def test_paused_loads_rest_and_can_be_cancelled(blob: Blob, as_thread: bool) -> None:
    """A pause may come before the arena does; it holds for loads that come later."""
    with cpu_arena() as arena:
        loader = Loader(arena, as_thread=as_thread, chunk_bytes=CHUNK_BYTES)
        loader.process.send(wire.Pause(is_paused=True))
        loader.open()
        for load_id in (1, 2):
            loader.process.send(blob.load(load_id=load_id))
        loader.read_until(lambda: len([b for b in loader.of(wire.Heartbeat) if b.load_id == 1]) > 5)
        loader.process.send(wire.Cancel(load_id=1))
        assert loader.expect(wire.LoadStopped).load_id == 1
        loader.read_until(lambda: len([b for b in loader.of(wire.Heartbeat) if b.load_id == 2]) > 5)
        assert not loader.of(wire.Loaded)
        assert not any(beat.bytes_done for beat in loader.of(wire.Heartbeat))
        loader.process.send(wire.Pause(is_paused=False))
        assert loader.expect(wire.Loaded).load_id == 2
        loader.process.send(wire.Stop())
        assert loader.wait_exited() == 0


def test_loads_are_carried_out_in_order_and_faults_end_only_themselves(blob: Blob, tmp_path: Path) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.process.send(blob.load(load_id=1))
        loader.process.send(blob.load(load_id=2, path=str(tmp_path / "none")))
        loader.process.send(blob.load(load_id=3, arena_offset=arena.size_bytes))
        loader.process.send(blob.load(load_id=4, arena_offset=MIB))
        loader.read_until(lambda: len(loader.of(wire.Loaded)) == 2)
        ends = [
            report
            for report in loader.reports
            if not isinstance(report, wire.Heartbeat | wire.Attached | wire.Ready)
        ]
        assert [report.load_id for report in ends] == [1, 2, 3, 4]  # type: ignore[union-attr]
        missing, outside = loader.of(wire.LoadFault)
        assert not missing.corrupt and missing.message == "No such file or directory"
        assert not outside.corrupt and "arena" in outside.message


def test_cancelled_loads_stop_in_hand_and_in_line(blob: Blob) -> None:
    with cpu_arena() as arena, bare_loader(arena, **SLOW) as loader:
        for load_id in (1, 2):
            loader.process.send(blob.load(load_id=load_id))
        loader.read_until(lambda: any(beat.bytes_done for beat in loader.of(wire.Heartbeat)))
        for load_id in (2, 1, 99):
            loader.process.send(wire.Cancel(load_id=load_id))
        loader.read_until(lambda: len(loader.of(wire.LoadStopped)) == 2)
        assert [report.load_id for report in loader.of(wire.LoadStopped)] == [1, 2]


@KINDS
@pytest.mark.parametrize("when", ["starting", "attached", "idle", "loading", "paused"])
@pytest.mark.parametrize("how", ["order", "closed", "shut"])
def test_it_ends_when_told_or_when_nobody_is_there(blob: Blob, when: str, how: str, as_thread: bool) -> None:
    with cpu_arena() as arena:
        loader = Loader(arena, as_thread=as_thread, **SLOW)
        if when != "starting":
            loader.expect(wire.Attached)
        if when in ("idle", "loading", "paused"):
            loader.open()
            loader.expect(wire.Ready)
        if when in ("loading", "paused"):
            loader.process.send(blob.load())
            loader.read_until(lambda: any(beat.bytes_done for beat in loader.of(wire.Heartbeat)))
        if when == "paused":
            loader.process.send(wire.Pause(is_paused=True))
        match how:
            case "order":
                loader.process.send(wire.Stop())
            case "shut":
                loader.process._sock.shutdown(socket.SHUT_RDWR)
            case _:
                loader.process._sock.close()
        assert loader.wait_exited() == 0
        assert not {"heart", "worker", "populate"} & {thread.name for thread in threading.enumerate()}


def test_signals_for_the_whole_group_are_the_parents_affair(blob: Blob) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.expect(wire.Ready)
        os.kill(loader.process.pid, signal.SIGINT)
        os.kill(loader.process.pid, signal.SIGTERM)
        loader.process.send(blob.load())
        loader.expect(wire.Loaded)


def test_it_has_a_name_and_few_descriptors(blob: Blob) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.process.send(blob.load())
        loader.expect(wire.Loaded)
        process = Path(f"/proc/{loader.process.pid}")
        assert (process / "comm").read_text() == "ustudy-loader\n"
        opened = sorted(os.readlink(entry).split(":")[0] for entry in (process / "fd").iterdir())
        assert opened.count("socket") == 1 and opened.count("/memfd") == 1


@KINDS
@pytest.mark.parametrize(
    ("attach", "opens"),
    [
        ({"wire_version": 99}, {}),
        ({"parent_pid": 1}, {}),
        ({"pool_bytes": MIB}, {}),
        ({"gpu_uuid": "GPU-0"}, {}),
        ({}, {"transport": "pigeon"}),
        ({}, {"arena_bytes": 1 << 40, "proof_offset": 1 << 40}),
        ({}, {"proof_offset": 0}),
        ({}, {"proof_bytes": 1 << 30}),
    ],
)
def test_wrong_beginnings_are_fatal_and_explained(
    as_thread: bool, attach: dict[str, object], opens: dict[str, object]
) -> None:
    with cpu_arena() as arena, bare_loader(arena, as_thread=as_thread, opens=opens, **attach) as loader:
        fatal = loader.expect(wire.Fatal)
        assert fatal.message and not fatal.is_refused
        assert loader.wait_exited() == 1


@KINDS
def test_a_missing_proof_is_a_refusal(as_thread: bool) -> None:
    """As in a container that maps other memory than was exported."""
    with cpu_arena() as arena, bare_loader(arena, as_thread=as_thread, opens={"proof_seed": 5}) as loader:
        fatal = loader.expect(wire.Fatal)
        assert fatal.is_refused and "proof" in fatal.message
        assert loader.wait_exited() == 1


@KINDS
@pytest.mark.parametrize("order", ["load first", "twice attached", "twice opened"])
def test_orders_at_the_wrong_time_are_fatal(as_thread: bool, order: str, blob: Blob) -> None:
    with cpu_arena() as arena:
        loader = Loader(arena, as_thread=as_thread)
        match order:
            case "load first":
                loader.process.send(blob.load())
            case "twice attached":
                loader.process.send(wire.Attach(parent_pid=1), arena.fds())
            case _:
                loader.open()
                loader.expect(wire.Ready)
                loader.open()
        assert "wrong time" in loader.expect(wire.Fatal).message
        assert loader.wait_exited() == 1


@pytest.mark.parametrize(
    "packet", [b"\x00", b"\x81\xa4type\xa4load", b"\x91" * 60_000, b"\x81\xa4type\xa3\xff\xfe\xfd"]
)
@KINDS
def test_a_malformed_order_is_fatal(packet: bytes, as_thread: bool) -> None:
    with cpu_arena() as arena, bare_loader(arena, as_thread=as_thread) as loader:
        loader.expect(wire.Ready)
        loader.process._sock.send(packet)
        assert "not an order" in loader.expect(wire.Fatal).message
        assert loader.wait_exited() == 1


def test_without_a_gpu_it_says_what_is_missing() -> None:
    with cpu_arena() as arena, bare_loader(arena, gpu_uuid="GPU-0") as loader:
        assert "cu" in loader.expect(wire.Fatal).message
        assert not loader.of(wire.Attached)
        assert loader.wait_exited() == 1


def test_the_heart_beats_while_a_read_hangs(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "stall:read:2")
    with cpu_arena() as arena, bare_loader(arena, reader_threads=1, chunk_bytes=CHUNK_BYTES) as loader:
        loader.process.send(blob.load(load_id=5, xxh3=()))
        loader.read_until(lambda: len([b for b in loader.of(wire.Heartbeat) if b.load_id == 5]) == 10)
        last = loader.of(wire.Heartbeat)[-1]
        assert last.bytes_done == CHUNK_BYTES
        loader.process.send(wire.Stop())
        assert loader.wait_exited() == 0


WAYS = {
    "arena": {"arena_offset": 0},
    "through the pool": {"arena_offset": 0, "pool_offset": 0},
    "pool": {"arena_offset": None, "pool_offset": 0},
    "from the pool": {"arena_offset": 0, "pool_offset": 0, "from_pool": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("point", POINTS)
def test_every_crash_point_is_passed(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, point: str, way: str
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, point)
    with cpu_arena() as arena, cpu_host_pool() as pool, bare_loader(arena, pool) as loader:
        monkeypatch.delenv(ENVIRONMENT_VARIABLE)
        try:
            loader.process.send(blob.load(**WAYS[way]))
        except OSError:
            assert point in ("spawn", "open", "idle")
        if point == "read" and way == "from the pool":
            loader.expect(wire.Loaded)
            return
        loader.read_until(lambda: False)
        assert loader.of(wire.Loaded) == []
        assert loader.wait_exited() == -signal.SIGKILL


def test_only_the_loader_that_makes_the_file_dies(
    blob: Blob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"kill:read:2@{tmp_path / 'claim'}")
    with cpu_arena() as arena:
        loads = []
        for _ in range(3):
            with bare_loader(arena, chunk_bytes=CHUNK_BYTES) as loader:
                loader.process.send(blob.load())
                loader.read_until(lambda loader=loader: loader.of(wire.Loaded))
                loads.append(len(loader.of(wire.Loaded)))
        assert loads == [0, 1, 1]


def test_a_slow_loader_is_slow_from_then_on(blob: Blob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "slow:copy:3")
    with cpu_arena() as arena, bare_loader(arena, reader_threads=1, chunk_bytes=CHUNK_BYTES) as loader:
        loader.process.send(blob.load())
        loaded = loader.expect(wire.Loaded)
        assert 0.6 <= loaded.ended_at_s - loaded.started_at_s < 5  # three of five chunks


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from loader_kit import *
arena = CpuArena(4 * MIB)
loader = Loader(arena, rate_limit_bytes_per_s=64 * KIB)
loader.open()
loader.expect(wire.Ready)
if {loading}:
    loader.process.send(make_blob(Path({folder!r}, "blob")).load())
    loader.read_until(lambda: any(beat.bytes_done for beat in loader.of(wire.Heartbeat)))
if {frozen}:
    import signal
    os.kill(loader.process.pid, signal.SIGSTOP)
print(loader.process.pid, flush=True)
loader.read_until(lambda: False, 600)
"""


@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_loader_outlives_its_parent(tmp_path: Path, loading: bool, frozen: bool) -> None:
    """A frozen loader cannot see that its socket was closed: there the kernel's parent-death signal acts."""
    code = PARENT.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), loading=loading, frozen=frozen
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        try:
            assert is_alive(pid)
            parent.kill()
            assert wait_readable(pidfd, DEADLINE_S), "the loader is an orphan"
        finally:
            os.close(pidfd)


def test_the_loader_imports_little() -> None:
    code = (
        "import sys, understudyd.loader.child\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    printed = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    allowed = {"msgspec", "xxhash", "understudyd", "_distutils_hack", "__main__", "typing_extensions"}
    allowed.add("sitecustomize")  # the machine's own: Debian's Python has one
    assert set(eval(printed)) <= allowed
