"""Real loader processes, spoken to packet by packet: handshake, orders, signals, the parent's death."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loader_kit import (
    CHUNK_BYTES,
    DEADLINE_S,
    KIB,
    MIB,
    Blob,
    arena_bytes,
    bare_loader,
    cpu_arena,
    is_alive,
    make_blob,
    wait_readable,
)
from understudyd.loader import wire
from understudyd.loader.faults import ENVIRONMENT_VARIABLE
from understudyd.shell.memory import AttachFields

SLOW = {"rate_limit_bytes_per_s": 64 * KIB}


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    return make_blob(tmp_path / "blob")


def test_bytes_travel_and_neighbours_stay(blob: Blob) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        ready = loader.expect(wire.Ready)
        assert ready.pid == loader.process.pid
        loader.process.send(blob.load(load_id=7, arena_offset=MIB))
        loaded = loader.expect(wire.Loaded)
        assert (loaded.load_id, loaded.verified) == (7, True)
        assert loaded.started_at_s < loaded.ended_at_s
        assert arena_bytes(arena, MIB, len(blob.data)) == blob.data
        assert not any(arena_bytes(arena, 0, MIB))
        end = MIB + len(blob.data)
        assert not any(arena_bytes(arena, end, arena.size_bytes - end))


def test_loads_are_carried_out_in_order_and_faults_end_only_themselves(blob: Blob, tmp_path: Path) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.process.send(blob.load(load_id=1))
        loader.process.send(blob.load(load_id=2, path=str(tmp_path / "none")))
        loader.process.send(blob.load(load_id=3, arena_offset=arena.size_bytes))
        loader.process.send(blob.load(load_id=4, arena_offset=MIB))
        loader.read_until(lambda: len(loader.of(wire.Loaded)) == 2)
        ends = [report for report in loader.reports if not isinstance(report, wire.Heartbeat | wire.Ready)]
        assert [report.load_id for report in ends] == [1, 2, 3, 4]  # type: ignore[union-attr]
        missing, outside = loader.of(wire.LoadFault)
        assert not missing.corrupt and "none" in missing.message
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


@pytest.mark.parametrize("when", ["idle", "loading"])
@pytest.mark.parametrize("how", ["order", "closed"])
def test_it_ends_when_told_or_when_nobody_is_there(blob: Blob, when: str, how: str) -> None:
    with cpu_arena() as arena, bare_loader(arena, **SLOW) as loader:
        loader.expect(wire.Ready)
        if when == "loading":
            loader.process.send(blob.load())
            loader.read_until(lambda: any(beat.bytes_done for beat in loader.of(wire.Heartbeat)))
        if how == "order":
            loader.process.send(wire.Stop())
        else:
            loader.process._sock.close()
        assert loader.wait_exited() == 0


def test_signals_for_the_whole_group_are_the_parents_affair(blob: Blob) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.expect(wire.Ready)
        os.kill(loader.process.pid, signal.SIGINT)
        os.kill(loader.process.pid, signal.SIGTERM)
        loader.process.send(blob.load())
        loader.expect(wire.Loaded)


def test_it_has_a_name_and_few_descriptors() -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.expect(wire.Ready)
        process = Path(f"/proc/{loader.process.pid}")
        assert (process / "comm").read_text() == "ustudy-loader\n"
        opened = sorted(os.readlink(entry).split(":")[0] for entry in (process / "fd").iterdir())
        assert opened.count("socket") == 1 and opened.count("/memfd") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"wire_version": 99},
        {"parent_pid": 1},
        {"transport": "pigeon"},
        {"arena_bytes": 1 << 40},
    ],
)
def test_a_wrong_attach_is_fatal_and_explained(changes: dict[str, object]) -> None:
    with cpu_arena() as arena, bare_loader(arena, **changes) as loader:
        assert loader.expect(wire.Fatal).message
        assert loader.wait_exited() == 1


@pytest.mark.parametrize(
    "packet", [b"\x00", b"\x81\xa4type\xa4load", b"\x91" * 60_000, b"\x81\xa4type\xa3\xff\xfe\xfd"]
)
def test_a_malformed_order_is_fatal(packet: bytes) -> None:
    with cpu_arena() as arena, bare_loader(arena) as loader:
        loader.expect(wire.Ready)
        loader.process._sock.send(packet)
        assert "not an order" in loader.expect(wire.Fatal).message
        assert loader.wait_exited() == 1


def test_without_cuda_bindings_it_says_what_to_install() -> None:
    class CudaInName:
        def attach_fields(self) -> AttachFields:
            return AttachFields("cuda", MIB, bytes(64), "GPU-0")

        def fds(self) -> tuple[int, ...]:
            return ()

    with bare_loader(CudaInName()) as loader:  # type: ignore[arg-type]
        assert "cu" in loader.expect(wire.Fatal).message
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


@pytest.mark.parametrize(
    "point", ["spawn", "open", "header", "read", "copy", "synchronise", "report", "idle"]
)
def test_every_crash_point_is_passed(blob: Blob, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, point)
    with cpu_arena() as arena, bare_loader(arena) as loader:
        monkeypatch.delenv(ENVIRONMENT_VARIABLE)
        try:
            loader.process.send(blob.load())
        except OSError:
            assert point in ("spawn", "open", "idle")
        loader.read_until(lambda: False)
        assert loader.of(wire.Loaded) == []
        assert loader.wait_exited() == -signal.SIGKILL


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from loader_kit import *
arena = CpuArena(4 * MIB)
loader = Loader(arena, rate_limit_bytes_per_s=64 * KIB)
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
    assert set(eval(printed)) <= allowed
