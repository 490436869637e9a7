"""The shell's small parts: lock, notify, timeline, tally, families, timings."""

import os
import socket
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudyd.config import Config, DeviceConfig, Size, StoreConfig
from understudyd.shell.adapters import timings_since
from understudyd.shell.families import representatives
from understudyd.shell.lock import AlreadyRunning, DaemonLock
from understudyd.shell.notify import notify
from understudyd.shell.parts import Parts
from understudyd.shell.tally import RECENT, Tally, percentile
from understudyd.store.records import BlobRecord, ComponentRecord, ModelRecord


def test_the_lock_names_its_holder_and_is_free_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = DaemonLock(path, "here", "go elsewhere")
    with pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}.* serves here already; .* or go elsewhere"):
        DaemonLock(path, "here", "go elsewhere")
    first.close()
    DaemonLock(path, "here", "go elsewhere").close()


def test_notify_reaches_the_service_manager(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        assert notify("READY=1", "STATUS=serving", address=str(tmp_path / "notify"))
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
    assert not notify("READY=1", address="")
    assert not notify("READY=1", address=str(tmp_path / "nobody"))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.01, 0.5, 0.99, 1.0]))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-6
    assert sum(v < found for v in values) < share * len(values) + 1e-6


def test_the_tally_counts_switches_only_when_they_were_visible() -> None:
    tally = Tally()
    assert tally.visible_switch_ms() == {"p50": None, "p99": None, "count": 0}
    tally.finished(["a", "x"], 1.0, None)
    for i in range(RECENT + 5):
        tally.finished(["b"], 2.0, 0.001 * (i % 3))
    assert tally.visible_switch_ms() == {
        "p50": pytest.approx(1.0),
        "p99": pytest.approx(2.0),
        "count": RECENT,
    }
    assert (
        tally.done == RECENT + 6
        and tally.by_name["a"] == tally.by_name["x"] == 1
        and tally.last_used_at_s["b"] == 2.0
    )


def _model(name: str, pipeline: str, signature: str) -> ModelRecord:
    blob = BlobRecord(sha256=name, data_start_bytes=0, size_bytes=1, chunk_bytes=1, xxh3=())
    component = ComponentRecord(name="unet", signature=signature, blob=blob)
    return ModelRecord(name=name, pipeline_class=pipeline, components=(component,), parts=())


def test_one_representative_for_each_architecture() -> None:
    models = [_model("a", "P", "1"), _model("b", "P", "1"), _model("c", "P", "2"), _model("d", "Q", "1")]
    assert [m.name for m in representatives(models)] == ["a", "c", "d"]


@given(st.floats(0, 1e7), st.lists(st.floats(0, 1e5), min_size=5, max_size=5), st.booleans())
def test_timings_add_up_to_the_last_bit(received_at_s: float, apart_s: list[float], is_first: bool) -> None:
    _, _, free, first_op, ended, encoded = accumulate(apart_s, initial=received_at_s)
    moments = SimpleNamespace(
        free_at_s=free,
        first_op_at_s=first_op,
        run_ended_at_s=ended,
        encoded_at_s=encoded,
        bind_s=0.0,
        previous_ended_at_s=None if is_first else free,
    )
    timings = timings_since(received_at_s, moments)
    parts = (timings.queued_s, timings.switch_s, timings.run_s, timings.encode_s)
    assert sum(parts) == timings.total_s == pytest.approx(encoded - received_at_s, abs=1e-6)
    assert min(parts) >= 0 and timings.gap_s is not None
    assert timings.switch_s <= timings.gap_s <= timings.queued_s + timings.switch_s or is_first


def test_timings_add_up() -> None:
    moments = SimpleNamespace(
        deck_at_s=2.0,
        free_at_s=3.0,
        first_op_at_s=3.25,
        run_ended_at_s=5.0,
        encoded_at_s=5.5,
        bind_s=0.1,
        gap_s=0.25,
        previous_ended_at_s=2.5,
    )
    timings = timings_since(1.0, moments)
    assert (timings.queued_s, timings.switch_s, timings.run_s, timings.encode_s) == (2.0, 0.25, 1.75, 0.5)
    assert timings.total_s == 4.5
    assert timings.gap_s == 0.75, "a load was waited for after the stage was free at 2.5"
    moments.previous_ended_at_s = 0.5
    assert timings_since(1.0, moments).gap_s == 2.25, "idle before the request came does not count"


def test_the_arena_is_announced_before_its_pages_are_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_before: list[str] = []

    def make(size_bytes: int) -> int:
        said_before.extend(record.getMessage() for record in caplog.records)
        return size_bytes

    monkeypatch.setattr("understudyd.shell.parts.CpuArena", make)
    config = Config(store=StoreConfig(path=tmp_path), device=DeviceConfig(kind="cpu", arena=Size(3 * 2**29)))
    with caplog.at_level("INFO"):
        Parts(config).arena()
    assert said_before == ["making an arena of 1.50 GiB"]
