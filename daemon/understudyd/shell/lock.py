"""One daemon per runtime directory and socket, by flock: the kernel releases it however the daemon dies.

It does so late. A process that was killed gives its memory back first, about a second for four GiB of arena
and host pool, and then its files with their locks (`exit_mm` before `exit_files` in the kernel's `do_exit`).
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

log = logging.getLogger(__name__)

PATIENCE_S = 20.0
_POLL_S = 0.05
_PF_EXITING = 0x4  # include/linux/sched.h; field 9 of /proc/PID/stat


class AlreadyRunning(Exception):
    """Another daemon holds the lock; the message names it, `pid` is "" when it has not said."""

    def __init__(self, message: str, pid: str) -> None:
        super().__init__(message)
        self.pid = pid


class DaemonLock:
    """Held from construction until `close`. Raises `AlreadyRunning`.

    `what` is served under it, `instead` is what to do when the other daemon shall stay.
    """

    def __init__(self, path: Path, what: str, instead: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise AlreadyRunning(
                f"a daemon with pid {holder or 'unknown'}{_unit_of(holder)} serves {what} already; stop it "
                f"first, or {instead}",
                holder,
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let the next daemon in."""
        os.close(self._fd)


@contextlib.asynccontextmanager
async def locked(
    runtime_dir: Path, endpoints: Iterable[str], patience_s: float = PATIENCE_S
) -> AsyncIterator[None]:
    """Nobody else serves in this directory or at these `ipc://` endpoints.

    Raises `AlreadyRunning`: at once for a daemon that lives, after `patience_s` for one that cannot end.
    """
    with contextlib.ExitStack() as locks:
        path = runtime_dir / "understudyd.lock"
        instead = "set another [server] runtime_dir"
        locks.callback((await _lock(path, str(runtime_dir), instead, patience_s)).close)
        for endpoint in endpoints:
            if endpoint.startswith("ipc:///"):
                path = Path(f"{endpoint.removeprefix('ipc://')}.lock")
                locks.callback((await _lock(path, endpoint, "set another endpoint", patience_s)).close)
        yield


async def _lock(path: Path, what: str, instead: str, patience_s: float) -> DaemonLock:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    waits_for: str | None = None
    while True:
        try:
            return DaemonLock(path, what, instead)
        except AlreadyRunning as error:
            if not _is_ending(error.pid) or loop.time() - began_s >= patience_s:
                raise
            if waits_for != error.pid:
                waits_for = error.pid
                log.info(
                    "the last daemon, pid %s, is dead and still gives its memory back: waiting", waits_for
                )
        await asyncio.sleep(_POLL_S)


def _is_ending(pid: str) -> bool:
    """The process is gone, or on its way out of the kernel. One that is not known yet may be gone, too."""
    process = Path("/proc", pid or "unknown")
    try:
        flags = int((process / "stat").read_text().rpartition(")")[2].split()[6])
        status = (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = next((line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:")), "0")
    is_killed = int(pending, 16) & 1 << signal.SIGKILL - 1
    return bool(flags & _PF_EXITING or is_killed)


def _unit_of(pid: str) -> str:
    """The service that the process belongs to, in brackets; nothing where that is unknown."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
    names = [line.rpartition("/")[2] for line in groups.splitlines()]
    return next((f" ({name})" for name in names if name.endswith(".service")), "")
