"""The parent's end of a loader, a process or a thread: send orders, receive reports. Knows no policy."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from understudyd.loader import wire

_REPORTS_AT_ONCE = 64


class LoaderEnd(ABC):
    """`fileno` is readable when the loader reports, `pidfd` once it has ended.

    `is_thread` tells the two kinds apart: a thread runs under this process's `pid` and cannot be killed.
    """

    is_thread: bool
    pid: int
    pidfd: int

    def __init__(self) -> None:
        self._sock, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)

    def fileno(self) -> int:
        """The parent's end of the socket pair."""
        return self._sock.fileno()

    def send(self, order: wire.Order, fds: Sequence[int] = ()) -> None:
        """Never blocks. Raises `OSError` when the loader does not listen."""
        socket.send_fds(self._sock, [wire.encode(order)], list(fds))

    def receive(self) -> tuple[list[wire.Reports], str]:
        """What has arrived, at most a few dozen reports, and why nothing more will: "" while more may come.

        A packet that is no report is the end of it; what came before counts.
        """
        reports: list[wire.Reports] = []
        while len(reports) < _REPORTS_AT_ONCE:
            try:
                packet, _, flags, _ = self._sock.recvmsg(wire.MAX_PACKET_BYTES)
            except BlockingIOError:
                return reports, ""
            except ConnectionResetError:
                continue  # it ended with orders unread; said once, and its last reports are still here
            if not packet:
                return reports, "closed its connection"
            if flags & socket.MSG_TRUNC:
                return reports, f"sent a report of more than {wire.MAX_PACKET_BYTES} bytes"
            try:
                reports.append(wire.decode_report(packet))
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                return reports, f"sent a malformed report: {error}"
        return reports, ""

    @abstractmethod
    def kill(self) -> None:
        """Have it end, whatever it does. Harmless when it has."""

    @abstractmethod
    def reap(self) -> int:
        """The exit status of a loader whose `pidfd` is readable. Closes everything."""
