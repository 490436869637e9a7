"""A daemon of one's own: configured, started, waited for, asked, stopped and reaped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import admin
from understudy.paths import ADMIN_SOCKET, CLIENT_SOCKET

_LOADER_BURST_S = 0.02  # an idle loader's first 20 ms are not paced (see understudyd.loader.pacing)
_LONGEST_SOCKET_PATH = 100  # sun_path holds 107 bytes; ZeroMQ adds a few


class DaemonFailed(Exception):
    """The daemon did not start, or died; the message ends with the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """What the demo and the benchmark vary. `rate_limit_bytes_per_s` is each loader's, 0 is none."""

    store: Path
    runtime_dir: Path
    arena_bytes: int
    loaders: int = 2
    rate_limit_bytes_per_s: int = 0
    lookahead: int = 4
    order: str = "resident_first"
    prefetch: bool = True

    def toml(self) -> str:
        """The daemon's configuration file. Paths are absolute, so that it works from anywhere."""
        return "\n".join(
            [
                "[store]",
                f"path = {_quoted(self.store.resolve())}",
                "[server]",
                f"runtime_dir = {_quoted(self.runtime_dir.resolve())}",
                "[device]",
                'kind = "cpu"',
                f'arena = "{self.arena_bytes}B"',
                "[loader]",
                f"count = {self.loaders}",
                f'rate_limit = "{self.rate_limit_bytes_per_s}B/s"',
                "[stage]",
                "threads = 1",
                "[policy]",
                f'order = "{self.order}"',
                f"lookahead = {self.lookahead}",
                f"prefetch = {str(self.prefetch).lower()}",
                "[log]",
                'format = "text"',
                "",
            ]
        )


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def rate_for(size_bytes: float, load_s: float) -> int:
    """The `rate_limit` (bytes per second) at which an idle loader takes `load_s` for so many bytes."""
    return int(size_bytes / (load_s + _LOADER_BURST_S))


def short_runtime_dir(wanted: Path) -> Path:
    """`wanted`, or a folder of one's own under the system's temporary folder when sockets would not fit."""
    if len(str(wanted.resolve() / CLIENT_SOCKET)) <= _LONGEST_SOCKET_PATH:
        return wanted
    return Path(tempfile.mkdtemp(prefix="understudy-"))


class DaemonProcess:
    """A running daemon. Make it with `running_daemon`."""

    def __init__(self, process: "subprocess.Popen[bytes]", settings: DaemonSettings, log: Path) -> None:
        self.settings = settings
        self.log = log
        self._process = process

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"ipc://{self.settings.runtime_dir.resolve() / CLIENT_SOCKET}"

    @property
    def admin_socket(self) -> Path:
        """Where `understudyctl` connects."""
        return self.settings.runtime_dir.resolve() / ADMIN_SOCKET

    def ask(self, command: admin.AdminRequest, timeout_s: float = 60.0) -> Any:
        """One admin command's result. Raises `AdminError`."""
        return admin.call(self.admin_socket, command, timeout_s=timeout_s)

    def check(self) -> None:
        """Raises `DaemonFailed` when the daemon is gone."""
        if (status := self._process.poll()) is not None:
            raise DaemonFailed(f"the daemon ended with status {status}\n{self.last_words()}")

    def last_words(self, lines: int = 25) -> str:
        """The end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {self.log}:", *text[-lines:]])

    def wait_until_ready(self, notices: socket.socket, timeout_s: float) -> None:
        """Wait for `READY=1` on the notification socket. Raises `DaemonFailed`."""
        deadline_s = time.monotonic() + timeout_s
        notices.settimeout(0.25)  # how soon a daemon that died without a word is noticed
        while time.monotonic() < deadline_s:
            self.check()
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notices.recv(4096).split(b"\n"):
                    return
        raise DaemonFailed(f"the daemon was not ready within {timeout_s:.0f} s\n{self.last_words()}")

    def stop(self, grace_s: float = 20.0) -> None:
        """SIGTERM, a while to finish, SIGKILL; reaped in any case."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)


@contextlib.contextmanager
def running_daemon(
    settings: DaemonSettings, folder: Path, *, start_timeout_s: float = 120.0
) -> Iterator[DaemonProcess]:
    """A daemon that is ready, with its configuration and log in `folder`; gone afterwards in any case.

    Call it on a thread that lives as long as the daemon shall: the kernel kills it when that thread ends.
    """
    settings.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / "understudyd.toml", folder / "understudyd.log"
    config.write_text(settings.toml())
    with (
        tempfile.TemporaryDirectory(prefix="understudy-notify-") as notice_folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        address = str(Path(notice_folder) / "notify")
        notices.bind(address)
        daemon = DaemonProcess(_spawn(config, log, address), settings, log)
        try:
            daemon.wait_until_ready(notices, start_timeout_s)
            notices.close()  # nobody reads on, and nobody should find a manager that does not
            yield daemon
        finally:
            daemon.stop()


# The daemon goes when whoever started it is killed: no `finally` runs then. The daemon's own children do
# the same. `understudyd` itself must not: a service outlives the shell that starts it.
_TIED = """
import os, sys
from understudyd.loader.linux import die_with_parent
die_with_parent()
if os.getppid() != int(sys.argv[1]):
    raise SystemExit("whoever started this daemon is gone already")
from understudyd.main import main
main(sys.argv[2:])
"""


def _spawn(config: Path, log: Path, notify_address: str) -> "subprocess.Popen[bytes]":
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _TIED, str(os.getpid()), "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the daemon in good order
            env=os.environ | {"NOTIFY_SOCKET": notify_address, "PYTHONUNBUFFERED": "1"},
        )
