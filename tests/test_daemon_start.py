"""How a real daemon comes up, and that it leaves nothing behind wherever it is stopped on its way."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin
from understudyd.loader.faults import ENVIRONMENT_VARIABLE

PROMPT = "a red circle on blue"
OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}
REFERENCE = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 1, "width": 32, "height": 32}
COLD: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
GRACE_S = 15.0


def children(daemon: DaemonProcess) -> list[psutil.Process]:
    return psutil.Process(daemon.process.pid).children(recursive=True)


@pytest.fixture(scope="module", params=["process", "thread"])
def daemon(
    family: Family, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """It warms up, it has a host pool, its loaders are of either kind."""
    folder = tmp_path_factory.mktemp("run")
    more: dict[str, Any] = {"host": {"pool": "24MiB"}, "loader": {"transport": request.param}}
    with running_daemon(family.store, folder, **more, policy={"prefetch": False}) as daemon:
        yield daemon


def test_start_up_is_on_the_timeline(daemon: DaemonProcess) -> None:
    """Torch is imported beside all else, and the weights are there before it is."""
    spans = {s["name"]: s for s in daemon.ask(admin.Trace(seconds=600))["spans"] if s["lane"] == "start-up"}
    assert set(spans) == {"loaders", "arena", "import", "stage", "weights", "warm-up"}
    for name in ("loaders", "arena", "weights"):
        assert spans["import"]["start_s"] <= spans[name]["start_s"], name
    assert spans["weights"]["end_s"] < spans["stage"]["end_s"], "the family is small"
    order = [spans[name] for name in ("import", "stage", "warm-up")]
    for before, after in pairwise(order):
        assert before["end_s"] <= after["start_s"] + 0.05


def test_status_tells_the_hand_over_the_store_and_the_host_pool(
    daemon: DaemonProcess, family: Family
) -> None:
    status = daemon.ask(admin.Status())
    by_threads = status["hand_over"] == "threads"
    assert status["hand_over_reason"] == ("as configured" if by_threads else "")
    assert {loader["pid"] == status["pid"] for loader in status["loaders"]} == {by_threads}
    assert len(children(daemon)) == (0 if by_threads else 2)
    assert status["version"] == understudy.__version__
    assert status["store"] == str(family.store) and f"store {family.store}" in daemon.wait_for_log(
        "ready after"
    )
    pool = status["host_pool"]
    assert pool["size_bytes"] == 24 * 2**20
    states = ("ready", "in_use", "filling", "quarantined", "free")
    assert sum(pool[f"{state}_bytes"] for state in states) == pool["size_bytes"]
    shown = daemon.ask(admin.Show(arena=True))["host_pool"]
    assert (
        sum(extent["size_bytes"] for extent in shown["extents"]) == shown["size_bytes"] == pool["size_bytes"]
    )


def test_a_model_out_of_the_arena_is_one_copy_away(daemon: DaemonProcess, family: Family) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        expected = family.reference("sd-c", **REFERENCE)
        assert [pixels(i) for i in client.generate("sd-c", PROMPT, **OPTIONS).images] == expected
        daemon.ask(admin.Evict(name="sd-c"))
        parts = daemon.ask(admin.Show(name="sd-c"))["components"]
        assert {part["tier"] for part in parts if part["shared_by"] == ["sd-c"]} == {"host"}
        assert all(part["host_copy"] for part in parts)
        (row,) = [row for row in daemon.ask(admin.Models()) if row["name"] == "sd-c"]
        assert row["tier"] == "host"
        assert [pixels(i) for i in client.generate("sd-c", PROMPT, **OPTIONS).images] == expected
    spans = daemon.ask(admin.Trace(seconds=600))["spans"]
    routes = {span["route"] for span in spans if span["name"] == "sd-c unet" and "route" in span}
    assert routes >= {"disk > host > arena", "host > arena"}


def stops(daemon: DaemonProcess, status: int = 0) -> None:
    """SIGTERM ends it in time, and its loaders with it."""
    before = children(daemon)
    started_at_s = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == status
    assert time.monotonic() - started_at_s < GRACE_S
    assert not [child for child in before if child.is_running()]
    assert not (daemon.runtime_dir / "admin.sock").exists()
    assert "Traceback" not in "".join(daemon.log)


@pytest.mark.parametrize("action", ["stop", "stall"])
def test_stopped_while_loaders_come_up(family: Family, tmp_path: Path, action: str) -> None:
    environ = {ENVIRONMENT_VARIABLE: f"{action}:spawn"}
    with running_daemon(family.store, tmp_path / "run", wait=False, environ=environ) as daemon:
        while len(children(daemon)) < 2:
            assert daemon.process.poll() is None
        stops(daemon)


def test_stopped_while_torch_is_imported(family: Family, tmp_path: Path) -> None:
    loader = {"rate_limit": "256KiB/s"}  # the first load takes longer than all else
    with running_daemon(family.store, tmp_path / "run", wait=False, loader=loader) as daemon:
        daemon.wait_for_log("importing torch")
        stops(daemon)


@pytest.mark.parametrize(
    ("transport", "specification"), [("process", ""), ("thread", ""), ("thread", "stall:read")]
)
def test_stopped_while_loading(family: Family, tmp_path: Path, transport: str, specification: str) -> None:
    """Loads that are slow, and one that hangs in a thread, which nobody can kill."""
    more: dict[str, Any] = {"loader": {"transport": transport, "rate_limit": "256KiB/s"}} | COLD
    environ = {ENVIRONMENT_VARIABLE: specification}
    with running_daemon(family.store, tmp_path / "run", environ=environ, **more) as daemon:
        daemon.ask(admin.Load(name="xl", wait=False))
        while not any(row["state"] == "loading" for row in daemon.ask(admin.Loaders())):
            pass
        stops(daemon)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"device": {"arena": "9000TiB"}}, "an arena of"),
        ({"host": {"pool": "9000TiB"}}, "a host pool of"),
    ],
)
def test_what_cannot_be_had_ends_it_with_a_reason(
    family: Family, tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    """The loaders that stood already are gone with it."""
    with running_daemon(family.store, tmp_path / "run", wait=False, **sections) as daemon:
        assert daemon.wait() == 1
    assert f"Error: {says}" in "".join(daemon.log) and "Traceback" not in "".join(daemon.log)


def test_a_stage_that_cannot_be_made_ends_it(family: Family, tmp_path: Path) -> None:
    """The loaders are at work by then; they are gone when the daemon is, and so are its sockets."""
    broken = tmp_path / "broken"
    broken.mkdir()
    seen = tmp_path / "seen"
    os.mkfifo(seen)  # The import fails when the loaders have been counted, not before.
    (broken / "torch.py").write_text(
        f"open({str(seen)!r}).read()\nraise RuntimeError('a broken installation')\n"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])}
    with running_daemon(family.store, tmp_path / "run", wait=False, environ=environ) as daemon:
        daemon.wait_for_log("importing torch")
        deadline_s = time.monotonic() + 20.0
        while len(loaders := children(daemon)) < 2:
            assert time.monotonic() < deadline_s
        seen.write_text("")
        assert daemon.wait() == 1
    assert "a broken installation" in "".join(daemon.log)
    assert len(loaders) == 2 and not [loader for loader in loaders if loader.is_running()]
    assert not (daemon.runtime_dir / "admin.sock").exists()
