"""A real daemon in a real process, for tests: started, waited for, asked, stopped, reaped."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy import admin

START_S = 60.0
STOP_S = 30.0


class DaemonDied(Exception):
    """The daemon ended while it was waited for; the text is its log."""


def configuration(
    store: Path, runtime_dir: Path, /, *, arena: str = "32MiB", **sections: dict[str, Any]
) -> str:
    """A TOML document; `sections` are merged over the defaults of the tests."""
    document: dict[str, dict[str, Any]] = {
        "store": {"path": str(store)},
        "server": {"runtime_dir": str(runtime_dir), "drain_s": 20.0},
        "device": {"kind": "cpu", "arena": arena},
        "log": {"level": "info", "format": "text"},
    }
    for name, table in sections.items():
        document[name] = document.get(name, {}) | table
    lines = []
    for name, table in document.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'


@dataclass
class DaemonProcess:
    """A daemon under test. `log` is what it said on stderr so far."""

    process: subprocess.Popen[bytes]
    runtime_dir: Path
    log: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.runtime_dir / 'understudy.sock'}"

    @property
    def admin_socket(self) -> Path:
        return self.runtime_dir / "admin.sock"

    def ask(self, command: admin.AdminRequest, timeout_s: float = 30.0) -> Any:
        """One admin command's result."""
        return admin.call(self.admin_socket, command, timeout_s=timeout_s)

    def wait_for_log(self, text: str, timeout_s: float = START_S) -> str:
        """Read the log until a line has `text`; that line."""
        for line in self.log:
            if text in line:
                return line
        deadline_s = time.monotonic() + timeout_s
        stderr = self.process.stderr
        assert stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stderr, selectors.EVENT_READ)
            while (left_s := deadline_s - time.monotonic()) > 0:
                if not selector.select(left_s):
                    break
                raw = stderr.readline()
                if not raw:
                    raise DaemonDied("".join(self.log[-40:]))
                self.log.append(raw.decode(errors="replace"))
                if text in self.log[-1]:
                    return self.log[-1]
        raise TimeoutError(f"{text!r} not in the log within {timeout_s} s:\n{''.join(self.log[-40:])}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """The exit status; the rest of the log is read."""
        assert self.process.stderr is not None
        status = None
        try:
            _, rest = self.process.communicate(timeout=timeout_s)
            status = self.process.returncode
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, rest = self.process.communicate()
            raise TimeoutError("the daemon did not stop:\n" + rest.decode(errors="replace")[-4000:]) from None
        self.log += rest.decode(errors="replace").splitlines(keepends=True)
        return status

    def stop(self) -> int:
        """SIGTERM and wait."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()


@contextmanager
def running_daemon(
    store: Path,
    runtime_dir: Path,
    /,
    *,
    wait: bool = True,
    environ: dict[str, str] | None = None,
    within: Sequence[str] = (),
    **sections: Any,
) -> Iterator[DaemonProcess]:
    """A daemon that is ready, and gone afterwards however the test ends.

    `within` are words of a command that becomes the daemon's once it has prepared something for it.
    """
    runtime_dir.mkdir(parents=True, exist_ok=True)
    config = runtime_dir / "understudyd.toml"
    config.write_text(configuration(store, runtime_dir, **sections))
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "understudyd.main", "serve", "--config", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,  # so that `select` and `readline` agree
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (environ or {}),
    )
    daemon = DaemonProcess(process, runtime_dir)
    try:
        if wait:
            daemon.wait_for_log("ready after")
        yield daemon
    finally:
        if process.poll() is None:
            daemon.stop()
        elif process.stderr is not None and not process.stderr.closed:
            daemon.wait()
