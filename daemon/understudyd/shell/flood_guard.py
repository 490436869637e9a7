"""Cuts off connections that ZeroMQ itself does not bound.

ZeroMQ bounds a frame and counts messages, but a message may have any number of frames, and is held in
memory until its last one has come. Who sends one without end fills the memory. Nothing tells whose bytes
these are; so this watches two things: memory that nothing of ours accounts for, and connections that are
found with bytes to be read. When the memory has grown beyond its budget while there were such, the busiest
of them are shut. A well-behaved client that is hit by mistake comes back by itself and sends again. Who
takes a minute for a few megabytes is not found; what is left against that is the service manager's limit on
memory.

The number of connections is bounded as well: each holds a descriptor.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
QUIET_S = 5.0
_PAST_COUNTS = 0.97  # a connection's past at each look: what is busy now and then is remembered for seconds
_EVENTS_PER_TURN = 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class _Connection:
    """`inode` tells the descriptor from a later one of the same number; `busy` is 0 to 1, a decaying mean."""

    fd: int
    inode: int
    busy: float = 0.0
    busy_at_s: float = float("-inf")


class FloodGuard:
    """Watches the connections that `watched` accepts from now on.

    `explained_bytes` says how much of the process's memory is what clients may have here, `budget_bytes` how
    much beyond that may come while connections are busy.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        watched: "zmq.Socket[bytes]",
        *,
        budget_bytes: int,
        max_connections: int,
        explained_bytes: Callable[[], int],
        own_bytes: "Callable[[], int] | None" = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cut_off = 0
        self.max_connections = max_connections
        self._loop = loop
        self._watched = watched
        self._budget_bytes = budget_bytes
        self._explained_bytes = explained_bytes
        self._own_bytes = own_bytes or private_bytes
        self._clock = clock
        self._open: dict[int, _Connection] = {}
        self._floor_bytes = self._unexplained_bytes()
        self._monitor = watched.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        )
        self._timer: asyncio.TimerHandle | None = None
        self._look_again()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def close(self) -> None:
        """Before the watched socket is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._watched.disable_monitor()
        self._monitor.close(linger=0)

    def look(self) -> None:
        """One look; they come by themselves."""
        self._follow()
        now_s = self._clock()
        for connection in self._open.values():
            has_bytes = _waiting_bytes(connection) > 0
            connection.busy = connection.busy * _PAST_COUNTS + (1 - _PAST_COUNTS) * has_bytes
            if has_bytes:
                connection.busy_at_s = now_s
        suspects = [c for c in self._open.values() if now_s - c.busy_at_s < QUIET_S]
        unexplained = self._unexplained_bytes()
        grown = unexplained - self._floor_bytes
        if not suspects or grown < 0:
            self._floor_bytes = unexplained
        elif grown > self._budget_bytes:
            self._cut_busiest(suspects, grown)
            self._floor_bytes = unexplained

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(LOOK_EVERY_S, self._look_again)
        self.look()

    def _unexplained_bytes(self) -> int:
        return self._own_bytes() - self._explained_bytes()

    def _follow(self) -> None:
        """Take in who came and who went."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_EVENTS_PER_TURN):
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
                fd = int(event["value"])
                if event["event"] != zmq.EVENT_ACCEPTED:
                    self._open.pop(fd, None)
                    continue
                with contextlib.suppress(OSError):  # gone already
                    self._open[fd] = _Connection(fd, os.fstat(fd).st_ino)
                    if len(self._open) > self.max_connections:
                        _log.warning("more than %d connections: a new one is shut", self.max_connections)
                        self._shut(self._open.pop(fd))

    def _cut_busiest(self, suspects: Sequence[_Connection], grown_bytes: int) -> None:
        most = max(connection.busy for connection in suspects)
        busiest = [connection for connection in suspects if connection.busy >= most / 2]
        _log.warning(
            "memory has grown by %.0f MiB while connections were busy: the busiest, %d of %d, are cut off",
            grown_bytes / 2**20,
            len(busiest),
            len(self._open),
        )
        for connection in busiest:
            self._shut(connection)

    def _shut(self, connection: _Connection) -> None:
        """On a copy of the descriptor, so that it cannot become another file's meanwhile."""
        try:
            copy = os.dup(connection.fd)
        except OSError:
            return
        try:
            if os.fstat(copy).st_ino != connection.inode:
                return
            with socket.socket(fileno=os.dup(copy)) as sock:
                sock.shutdown(socket.SHUT_RDWR)
                self.cut_off += 1
        except OSError:
            pass  # it was closed, or reset, just now
        finally:
            os.close(copy)


def _waiting_bytes(connection: _Connection) -> int:
    """What the connection's peer has sent and ZeroMQ has not read."""
    try:
        packed = fcntl.ioctl(connection.fd, termios.FIONREAD, b"\0" * 4)
    except OSError:
        return 0
    return int(struct.unpack("i", packed)[0])


def private_bytes() -> int:
    """Resident memory of this process that no other shares: no arena, no host pool, no libraries."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * _PAGE_BYTES
