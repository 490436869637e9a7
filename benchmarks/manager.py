"""A service manager of a few lines: starts a daemon, hears its notices, keeps its descriptors, starts anew.

It speaks what systemd speaks (sd_notify(3), sd_listen_fds(3)), for machines on which no systemd runs.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from understudy.paths import ADMIN_SOCKET, CLIENT_SOCKET

_MOST_FDS = 8

# What systemd does between fork and exec: descriptors from 3 on, and the pid that they are meant for. The
# daemon goes when whoever started it is killed.
_SERVE = """
import os, sys
from understudyd.loader.linux import die_with_parent
die_with_parent()
if os.getppid() != int(sys.argv[1]):
    raise SystemExit("whoever started this daemon is gone already")
if fds := [int(fd) for fd in sys.argv[2].split(",") if fd]:
    high = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
    for i, fd in enumerate(high):
        os.dup2(fd, 3 + i)
        os.close(fd)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
from understudyd.main import main
main(sys.argv[3:])
"""


class DaemonEnded(Exception):
    """The daemon ended while it was waited for; the message ends with the end of its log."""


@dataclass
class Life:
    """One life of the daemon: its process, and what it has told. `started_at_s` is monotonic."""

    process: "subprocess.Popen[bytes]"
    started_at_s: float
    notices: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Its last status line."""
        lines = [notice for notice in self.notices if notice.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""


class Manager:
    """Keeps descriptors between the lives of a daemon over `config`. `folder` is for its log and a socket."""

    def __init__(self, config: Path, runtime_dir: Path, folder: Path, environ: dict[str, str]) -> None:
        self.kept: dict[str, int] = {}
        self.log = folder / "understudyd.log"
        self.life: Life | None = None
        self._config = config
        self._runtime_dir = runtime_dir
        self._environ = environ
        self._changed = threading.Condition()
        self.address = str(folder / "notify")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.address)
        self._stop_r, self._stop_w = os.pipe()
        self._listener = threading.Thread(target=self._listen, name="manager", daemon=True)
        self._listener.start()

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"ipc://{self._runtime_dir / CLIENT_SOCKET}"

    @property
    def admin_socket(self) -> Path:
        """Where `understudyctl` connects."""
        return self._runtime_dir / ADMIN_SOCKET

    def start(self, *, keep: bool = True) -> Life:
        """A new life, with what was kept; without it when it is not to `keep`.

        Call it on a thread that lives as long as the daemon shall.
        """
        if not keep:
            self._forget(*self.kept)
        fds, names = list(self.kept.values()), ":".join(self.kept)
        environ = os.environ | {"PYTHONUNBUFFERED": "1", "NOTIFY_SOCKET": self.address} | self._environ
        if names:
            environ["LISTEN_FDNAMES"] = names
        listed = ",".join(map(str, fds))
        command = [sys.executable, "-P", "-c", _SERVE, str(os.getpid()), listed]
        with self.log.open("ab") as sink:
            process = subprocess.Popen(
                [*command, "serve", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=fds,
                env=environ,
            )
        self.life = Life(process, time.monotonic())
        return self.life

    def wait_for(self, notice: str, timeout_s: float = 120.0) -> Life:
        """The present life, once it has given this notice. Raises `DaemonEnded`."""
        life, until_s = self.life, time.monotonic() + timeout_s
        assert life is not None
        with self._changed:
            while not any(said.startswith(notice) for said in life.notices):
                if life.process.poll() is not None or time.monotonic() > until_s:
                    raise DaemonEnded(f"no {notice} from the daemon\n{self.last_words()}")
                self._changed.wait(0.1)
        return life

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Return when the condition holds; it is looked at after every notice. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise TimeoutError(f"not within {timeout_s} s")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send this life a signal and wait for its end; the exit status."""
        life = self.life
        assert life is not None
        life.process.send_signal(number)
        return life.process.wait()

    def last_words(self, lines: int = 25) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the daemon; let go of everything."""
        if self.life is not None and self.life.process.poll() is None:
            self.life.process.terminate()
            try:
                self.life.process.wait(30.0)
            except subprocess.TimeoutExpired:
                self.kill()
        os.close(self._stop_w)
        self._listener.join()
        self._forget(*self.kept)
        self._sock.close()
        os.close(self._stop_r)

    # -- what the daemon says -----------------------------------------------------------------------

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._stop_r, selectors.EVENT_READ)
            while all(key.fileobj is self._sock for key, _ in selector.select()):
                packet, fds, _, _ = socket.recv_fds(self._sock, 65536, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
                self._take(packet.decode().splitlines(), fds)

    def _take(self, lines: list[str], fds: list[int]) -> None:
        fields = dict(line.partition("=")[::2] for line in lines)
        with self._changed:
            if "FDSTOREREMOVE" in fields:
                self._forget(fields["FDNAME"])
            elif "FDSTORE" in fields:
                self._forget(fields["FDNAME"])
                self.kept[fields["FDNAME"]] = fds.pop()
            if self.life is not None:
                self.life.notices += lines
            self._changed.notify_all()
        for fd in fds:  # a barrier's, for example
            os.close(fd)

    def _forget(self, *names: str) -> None:
        for name in names:
            if (fd := self.kept.pop(name, None)) is not None:
                os.close(fd)


@contextlib.contextmanager
def managed(
    config: Path, runtime_dir: Path, folder: Path, environ: dict[str, str] | None = None
) -> Iterator[Manager]:
    """A manager whose daemon is gone afterwards; it starts none by itself."""
    runtime_dir.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    manager = Manager(config, runtime_dir, folder, environ or {})
    try:
        yield manager
    finally:
        manager.close()
