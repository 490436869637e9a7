"""One daemon per runtime directory and socket, by flock: the kernel releases it however the daemon dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class AlreadyRunning(Exception):
    """Another daemon holds the lock; the message names it."""


class DaemonLock:
    """Held from construction until `close`. Raises `AlreadyRunning`.

    `what` is served under it, `instead` is what to do when the other daemon shall stay.
    """

    def __init__(self, path: Path, what: str, instead: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunning(
                f"a daemon with pid {holder}{_unit_of(holder)} serves {what} already; stop it first, or "
                f"{instead}"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let the next daemon in."""
        os.close(self._fd)


@contextlib.contextmanager
def locked(runtime_dir: Path, endpoints: Iterable[str]) -> Iterator[None]:
    """Nobody else serves in this directory or at these `ipc://` endpoints. Raises `AlreadyRunning`."""
    with contextlib.ExitStack() as locks:
        path = runtime_dir / "understudyd.lock"
        locks.callback(DaemonLock(path, str(runtime_dir), "set another [server] runtime_dir").close)
        for endpoint in endpoints:
            if endpoint.startswith("ipc:///"):
                path = Path(f"{endpoint.removeprefix('ipc://')}.lock")
                locks.callback(DaemonLock(path, endpoint, "set another endpoint").close)
        yield


def _unit_of(pid: str) -> str:
    """The service that the process belongs to, in brackets; nothing where that is unknown."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    names = [line.rpartition("/")[2] for line in groups.splitlines()]
    return next((f" ({name})" for name in names if name.endswith(".service")), "")
