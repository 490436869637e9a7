"""A real service manager with the shipped units, in a corner of the machine that ends with the test.

A user's manager of root runs in a control group and a mount namespace of its own: without the first it would
move every process of the machine, without the second it would find no /run to itself.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import admin

SYSTEMD = Path("/lib/systemd/systemd")
START_S = 30.0
_INSIDE = Path(__file__).with_name("systemd_inside.sh")
_ROOT = Path(__file__).parent.parent


class NotHere(Exception):
    """This machine does not let a service manager run; the message says why."""


@dataclass
class UserManager:
    """A manager that is up. Paths in its view of the disk are reached through `root`."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def root(self) -> Path:
        return Path(f"/proc/{self.process.pid}/root")

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """A command in the manager's view of the machine."""
        enter = ["nsenter", "--target", str(self.process.pid), "--mount"]
        path = "/opt/understudy/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environ = {"PATH": path, "XDG_RUNTIME_DIR": "/run", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [*enter, *command], capture_output=True, text=True, env=environ, timeout=240.0, check=False
        )
        assert not check or found.returncode == 0, f"{command}: {found.stderr}{found.stdout}\n{self.words()}"
        return found

    def systemctl(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self.run("systemctl", "--user", *words, check=check)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit."""
        text = self.systemctl("show", unit, *(f"--property={name}" for name in names)).stdout
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def words(self) -> str:
        """The end of the manager's and the daemon's logs."""
        texts = [self.log.read_text(errors="replace")]
        with contextlib.suppress(OSError):
            texts.append((self.root / "var/log/understudyd.log").read_text(errors="replace"))
        return "\n".join(text[-3000:] for text in texts)

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
        """What `condition` says as soon as it is true."""
        until_s = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < until_s, f"{what}: not within {timeout_s} s\n{self.words()}"
        return found

    def ask(self, command: admin.AdminRequest, runtime_dir: str = "run/understudy") -> Any:
        return admin.call(self.root / runtime_dir / "admin.sock", command, timeout_s=60.0)

    def write(self, path: str, text: str) -> None:
        """A file in the manager's view of the disk."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def why_not() -> str:
    """What keeps a manager from running here; empty when nothing does."""
    if os.geteuid() != 0:
        return "a service manager's corner takes root to make"
    missing = [
        tool for tool in ("unshare", "nsenter", "systemctl", "systemd-sysusers") if not shutil.which(tool)
    ]
    if missing or not SYSTEMD.exists():
        return f"not installed: {', '.join(missing) or SYSTEMD}"
    if _groups() is None:
        return "there is no control group hierarchy (cgroup2) to make a group in"
    return ""


def _groups() -> Path | None:
    """Where control groups of version 2 are made."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return Path(place)
    return None


@contextlib.contextmanager
def user_manager(folder: Path) -> Iterator[UserManager]:
    """A manager, its corner empty but for what `docs/operations.md` installs. Raises `NotHere`."""
    if reason := why_not():
        raise NotHere(reason)
    groups = _groups()
    assert groups is not None
    group = groups / f"understudy-test-{os.getpid()}"
    scratch, log = folder / "scratch", folder / "manager.log"
    scratch.mkdir(parents=True)
    with contextlib.ExitStack() as leaving:
        try:
            group.mkdir()
        except OSError as error:
            raise NotHere(f"no control group can be made here: {error}") from error
        leaving.callback(_remove, group)
        process = _spawn(group, scratch, log)
        leaving.callback(_end, process, group)
        manager = UserManager(process, log)
        _wait_until_up(manager)
        # A system's manager hears everybody; a user's does not expect services of other users.
        manager.run("chmod", "0777", "/run/systemd/notify")
        yield manager
        manager.systemctl("stop", "understudyd*", check=False)


def _spawn(group: Path, scratch: Path, log: Path) -> "subprocess.Popen[bytes]":
    enter = 'echo $$ > "$0/cgroup.procs" && exec unshare --mount --cgroup bash "$@"'
    places = [str(scratch), str(_ROOT), sys.prefix, sys.base_prefix]
    with log.open("wb") as sink:
        return subprocess.Popen(
            ["bash", "-c", enter, str(group), str(_INSIDE), *places],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_up(manager: UserManager) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and manager.process.poll() is None:
        if (manager.root / "run/systemd/private").exists():
            state = manager.systemctl("is-system-running", check=False).stdout.strip()
            if state in ("running", "degraded"):
                return
    raise NotHere(f"the manager did not come up: {manager.log.read_text()[-500:]}")


def _end(process: "subprocess.Popen[bytes]", group: Path) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGRTMIN + 14)  # "exit at once", systemd(1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
    with contextlib.suppress(OSError):
        (group / "cgroup.kill").write_text("1")
    process.wait(10.0)


def _remove(group: Path) -> None:
    """All groups below, then it; killed processes take a moment to leave."""
    until_s = time.monotonic() + 10.0
    while group.exists() and time.monotonic() < until_s:
        for folder in sorted(group.rglob("*/"), key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
