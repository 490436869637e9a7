"""One loader process: spawn, send, receive, kill, reap. Knows no policy."""

import os
import socket
import subprocess
from collections.abc import Sequence

import msgspec

from understudyd.loader import wire

_REPORTS_AT_ONCE = 64


class MalformedReport(Exception):
    """The child said something that is not a report."""


class LoaderProcess:
    """A child and the parent's ends of it: `fileno` is readable when it reports, `pidfd` once it has exited.

    Spawn it on a thread that lives as long as the daemon: the child dies with the thread that spawned it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                )
            self.pid = self._popen.pid
            self.pidfd = self._open_pidfd()
        except BaseException:
            self._sock.close()
            raise

    def _open_pidfd(self) -> int:
        try:
            return os.pidfd_open(self.pid)
        except OSError:  # no descriptor to be had
            self._popen.kill()
            self._popen.wait()
            raise

    def fileno(self) -> int:
        """The parent's end of the socket pair."""
        return self._sock.fileno()

    def send(self, order: wire.Order, fds: Sequence[int] = ()) -> None:
        """Never blocks. Raises `OSError` when the child does not listen."""
        socket.send_fds(self._sock, [wire.encode(order)], list(fds))

    def receive(self) -> tuple[list[wire.Reports], bool]:
        """What has arrived, at most a few dozen reports, and whether the child has closed its end.

        Raises `MalformedReport`.
        """
        reports: list[wire.Reports] = []
        while len(reports) < _REPORTS_AT_ONCE:
            try:
                packet, _, flags, _ = self._sock.recvmsg(wire.MAX_PACKET_BYTES)
            except BlockingIOError:
                return reports, False
            except ConnectionResetError:
                continue  # the child died with orders unread; said once, and its last reports are still here
            if not packet:
                return reports, True
            reports.append(_decode(packet, flags))
        return reports, False

    def kill(self) -> None:
        """SIGKILL, wherever it is. Harmless when it has exited."""
        self._popen.kill()

    def reap(self) -> int:
        """The exit status of a child whose `pidfd` is readable (negative: the signal). Closes everything."""
        status = self._popen.wait()
        os.close(self.pidfd)
        self._sock.close()
        return status


def _decode(packet: bytes, flags: int) -> wire.Reports:
    if flags & socket.MSG_TRUNC:
        raise MalformedReport(f"a report of more than {wire.MAX_PACKET_BYTES} bytes")
    try:
        return wire.decode_report(packet)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedReport(str(error)) from error
