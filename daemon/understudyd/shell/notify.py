"""The service manager: what it is told, and the descriptors that it keeps for the next life.

The protocols are sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3), in a few lines each.
"""

import array
import os
import select
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Self

_FIRST_FD = 3
_BARRIER_MS = 5000
_PATIENCE_S = 0.05  # the event loop may be who waits here


def notify(
    *assignments: str, address: str | None = None, fds: Sequence[int] = (), patience_s: float = _PATIENCE_S
) -> bool:
    """Send `READY=1`, `STATUS=...`, ... to $NOTIFY_SOCKET; False where there is no service manager.

    One that does not read what it was sent before is waited for, `patience_s` at most.
    """
    target = address if address is not None else os.environ.get("NOTIFY_SOCKET", "")
    if not target:
        return False
    if target.startswith("@"):
        target = "\0" + target[1:]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(patience_s)
        try:
            sock.sendmsg(["\n".join(assignments).encode()], rights, 0, target)
        except OSError:
            return False  # the manager went away, or reads nothing: no reason to stop serving
    return True


class ServiceManager:
    """Whoever started this process, if it is a service manager.

    `watchdog_s` is how long it waits for `WATCHDOG=1` before it kills us, None where it does not. It hands
    over the descriptors that it kept by name: each belongs to whoever takes it.
    """

    def __init__(
        self,
        address: str = "",
        kept: Mapping[str, int] | None = None,
        watchdog_s: float | None = None,
    ) -> None:
        self.watchdog_s = watchdog_s
        self._address = address
        self._kept = dict(kept or {})

    @classmethod
    def found(cls, environ: MutableMapping[str, str]) -> Self:
        """As the environment says. What it says about descriptors is taken out: children have none."""
        return cls(environ.get("NOTIFY_SOCKET", ""), _kept_descriptors(environ), _watchdog_s(environ))

    def notify(self, *assignments: str, patience_s: float = _PATIENCE_S) -> bool:
        """See `notify`."""
        return notify(*assignments, address=self._address, patience_s=patience_s)

    def take(self, name: str) -> int | None:
        """The descriptor that it had kept under this name."""
        return self._kept.pop(name, None)

    def keep(self, name: str, fd: int) -> bool:
        """Have it hold a copy of the descriptor, which the next life of this service gets back."""
        return notify("FDSTORE=1", f"FDNAME={name}", address=self._address, fds=(fd,))

    def forget(self, *names: str) -> None:
        """Have it close what it holds under these names; returns when it has, or after a few seconds."""
        for name in names:
            self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")
        ours, its = os.pipe2(os.O_CLOEXEC)
        try:
            sent = notify("BARRIER=1", address=self._address, fds=(its,))  # closed when all before is done
            os.close(its)
            if sent:
                poll = select.poll()
                poll.register(ours, select.POLLHUP)
                poll.poll(_BARRIER_MS)
        finally:
            os.close(ours)


def _kept_descriptors(environ: MutableMapping[str, str]) -> dict[str, int]:
    pid, count, names = (environ.pop(f"LISTEN_{what}", "") for what in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    kept: dict[str, int] = {}
    for fd, name in zip(range(_FIRST_FD, _FIRST_FD + int(count)), names.split(":"), strict=False):
        os.set_inheritable(fd, False)
        if name in kept:
            os.close(kept[name])
        kept[name] = fd
    return kept


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6 or None
