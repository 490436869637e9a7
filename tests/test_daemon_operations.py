"""Draining, resuming and watching a real daemon."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family
from understudy import admin, keys
from understudy.ctl import main as ctl
from understudy.errors import CapacityError

OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}
LONG = OPTIONS | {"steps": 400, "progress": True}


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
    with running_daemon(family.store, tmp_path_factory.mktemp("run"), arena="24MiB", **more) as daemon:
        yield daemon


def run(daemon: DaemonProcess, *arguments: str) -> Result:
    return CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), *arguments])


def test_drained_the_daemon_finishes_what_it_has_and_says_what_to_do(daemon: DaemonProcess) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        long = client.submit("sd-a", "x", **LONG)
        waiting = client.submit("sd-b", "x", **OPTIONS)
        next(iter(long))  # accepted
        next(iter(waiting))
        document = json.loads(run(daemon, "drain", "-o", "json").stdout)
        assert document["state"] == "draining" and document["open_requests"] == 2
        with pytest.raises(CapacityError, match="another one or later") as refused:
            client.generate("sd-a", "x", **OPTIONS)
        assert refused.value.code == "draining" and refused.value.retryable
        assert daemon.ask(admin.Status())["state"] == "draining"

        still_open = run(daemon, "drain", "--wait", "--timeout", "0.05")
        assert still_open.exit_code == 1 and "still open" in still_open.stderr
        idle = run(daemon, "drain", "--wait", "-o", "json")
        assert idle.exit_code == 0 and json.loads(idle.stdout)["open_requests"] == 0
        assert len(long.result().images) == len(waiting.result().images) == 1

        assert json.loads(run(daemon, "resume", "-o", "json").stdout)["state"] == "ready"
        assert client.generate("sd-a", "x", **OPTIONS).images


def test_a_resume_calls_off_a_drain_that_somebody_waits_for(daemon: DaemonProcess) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        long = client.submit("sd-a", "x", **LONG)
        next(iter(long))
        errors: list[admin.AdminError] = []

        def wait() -> None:
            try:
                daemon.ask(admin.Drain(wait_s=60.0))
            except admin.AdminError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        while daemon.ask(admin.Status())["state"] != "draining":
            pass
        daemon.ask(admin.Resume())
        waiter.join(30)
        assert [(e.code, "resumed" in str(e)) for e in errors] == [("not_idle", True)]
        long.cancel()
        with pytest.raises(understudy.Cancelled):
            long.result()


def test_the_log_says_more_when_it_is_asked_to(daemon: DaemonProcess) -> None:
    markers = itertools.count()

    def said(text: str) -> bool:
        """Whether there was such a line since this was asked last; a change is always written down."""
        seen, marker = len(daemon.log), f"marker-{next(markers)}"
        with pytest.raises(admin.AdminError):
            daemon.ask(admin.Unpin(name=marker))
        daemon.wait_for_log(f"): Unpin(name='{marker}')")
        return any(text in line for line in daemon.log[seen:])

    said("what was before")
    document = daemon.ask(admin.LogLevel(level="error"))
    assert document == {"logger": "all", "level": "error", "before": "info"}
    daemon.ask(admin.Drain())
    daemon.ask(admin.Resume())
    assert not said("requests are taken again"), "an info line"
    assert run(daemon, "log-level", "info").exit_code == 0
    daemon.ask(admin.Drain())
    daemon.ask(admin.Resume())
    assert said("requests are taken again")
    with pytest.raises(admin.AdminError, match="always written down"):
        daemon.ask(admin.LogLevel(level="error", logger="understudyd.audit"))
    with pytest.raises(admin.AdminError, match=r"did you mean 'understudyd\.shell\.admin'"):
        daemon.ask(admin.LogLevel(level="info", logger="understudyd.shell.admim"))


def test_top_once(daemon: DaemonProcess) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        client.generate("sd-a", "x", **OPTIONS)
        client.generate("sd-a", "x", **OPTIONS)
        with pytest.raises(understudy.UnknownModel):
            client.generate("nobody", "x", **OPTIONS)
        long = client.submit("sd-b", "x", **LONG)
        next(iter(long))
        shown = run(daemon, "top", "--once")
        document = json.loads(run(daemon, "top", "-o", "json").stdout)
        long.cancel()
    assert shown.exit_code == 0, shown.output
    for part in ("ready", "stage", "queue", "arena by model", "loaders", "models on receipt", "last errors"):
        assert part in shown.stdout
    assert "sd-b" in shown.stdout and "unknown_model: model 'nobody'" in shown.stdout
    tiers = document["status"]["tiers_on_receipt"]
    assert tiers["bound"] >= 1 and sum(tiers.values()) >= 3
    assert sum(e["size_bytes"] for e in document["arena"]["extents"]) == 24 * 2**20


# -- a daemon that others reach -----------------------------------------------------------------------------


def made(folder: Path, name: str) -> Path:
    keys.write_pair(name, folder)
    return folder / f"{name}.key"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a daemon and two clients, of which the daemon knows one."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("server", "alice", "bob"):
        made(folder, name)
    (folder / "clients").write_text((folder / "alice.pub").read_text())
    return folder


@pytest.fixture(scope="module")
def guarded(
    family: Family, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DaemonProcess, str]]:
    """A daemon on TCP with keys and a host pool, and where it listens."""
    more: dict[str, Any] = {
        "stage": {"warm_up": False},
        "policy": {"prefetch": False},
        "host": {"pool": "24MiB"},
        "server": {"endpoints": ["tcp://127.0.0.1:*"]},
        "curve": {"secret_key": str(folder / "server.key"), "client_keys": str(folder / "clients")},
    }
    with running_daemon(family.store, tmp_path_factory.mktemp("run"), arena="24MiB", **more) as daemon:
        ready = daemon.wait_for_log("ready after")
        endpoint = re.search(r"tcp://[\d.:]+", ready)
        assert endpoint is not None, ready
        yield daemon, endpoint[0]


def test_images_over_tcp_for_those_with_a_key(guarded: tuple[DaemonProcess, str], folder: Path) -> None:
    daemon, endpoint = guarded
    alice, bob = (understudy.Keys.read(folder / f"{n}.key", folder / "server.pub") for n in ("alice", "bob"))
    with understudy.Client(endpoint, keys=alice) as client, understudy.Client(daemon.endpoint) as local:
        far, near = (c.generate("sd-a", "x", **OPTIONS) for c in (client, local))
        assert far.images == near.images
    with understudy.Client(endpoint, keys=bob) as client:
        with pytest.raises(understudy.NotAllowed):
            client.generate("sd-a", "x", **OPTIONS)
        daemon.wait_for_log("is not among [curve] client_keys")
        (folder / "clients").write_text("garbage\n")
        refused = run(daemon, "reload")
        assert refused.exit_code == 1 and "stays as it is" in refused.stderr and "line 1" in refused.stderr
        with pytest.raises(understudy.NotAllowed):
            client.ping()
        (folder / "clients").write_text((folder / "bob.pub").read_text())
        assert run(daemon, "reload").exit_code == 0
        assert client.generate("sd-a", "x", **OPTIONS).images == far.images


def test_a_reload_tells_what_is_in_force(guarded: tuple[DaemonProcess, str]) -> None:
    daemon, _ = guarded
    config = daemon.runtime_dir / "understudyd.toml"
    text = config.read_text()
    config.write_text(text.replace("[server]", "[server]\nmax_open_steps = 5\nmax_steps = 4"))
    document = json.loads(run(daemon, "reload", "-o", "json").stdout)
    assert set(document["applied"]) == {"server.max_open_steps", "server.max_steps"}
    with understudy.Client(daemon.endpoint) as client:
        with pytest.raises(understudy.CallerError, match="8 steps are more than the limit of 5"):
            client.generate("sd-a", "x", **OPTIONS | {"steps": 4, "images": 2})
        config.write_text(text + "\n[serfer]\n")
        refused = run(daemon, "reload")
        assert refused.exit_code == 1 and "did you mean 'server'" in refused.stderr
        config.write_text(text)
        daemon.ask(admin.Reload())
        assert client.generate("sd-a", "x", **OPTIONS | {"steps": 4, "images": 2}).images


def test_copies_in_host_memory_are_dropped(guarded: tuple[DaemonProcess, str]) -> None:
    daemon, _ = guarded
    with understudy.Client(daemon.endpoint) as client:
        before = client.generate("sd-b", "x", **OPTIONS)
        copies = daemon.ask(admin.Status())["host_pool"]["copies"]
        assert copies > 0
        dropped = json.loads(run(daemon, "drop-cache", "-o", "json").stdout)
        assert dropped["copies"] == copies and dropped["freed_bytes"] > 0
        assert daemon.ask(admin.Status())["host_pool"]["copies"] == 0
        assert client.generate("sd-b", "x", **OPTIONS).images == before.images


def test_top_on_a_terminal_until_ctrl_c(daemon: DaemonProcess) -> None:
    ours, its = os.openpty()
    command = [
        sys.executable,
        "-m",
        "understudy.ctl",
        "--socket",
        str(daemon.admin_socket),
        "top",
        "-n",
        "0.1",
    ]
    environ = dict(os.environ) | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environ) as viewer:
        os.close(its)
        try:
            seen = b""
            while seen.count(b"arena by model") < 2:  # it goes on
                seen += os.read(ours, 65536)
            assert b"models resident" in seen and b"loaders" in seen
            viewer.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while os.read(ours, 65536):
                    pass
            assert viewer.wait(15) == 0
        finally:
            viewer.kill()
            os.close(ours)
