"""Who may use a Unix socket: its file's mode and group, and what the kernel says of a peer (unix(7)).

The file's mode keeps others from connecting. What the peer is asked for again here holds as well for
whoever got in while the mode was another one.
"""

import errno
import grp
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Python's socket module does not name it
_GROUPS_BYTES = 1024  # all that Python's getsockopt returns: 256 groups


class SocketAccessError(Exception):
    """A socket cannot be given to whom the configuration names; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end when it connected; `groups` has its primary one, too."""

    pid: int
    uid: int
    groups: frozenset[int]


@dataclass(frozen=True, slots=True)
class SocketAccess:
    """`mode` of the socket's file and the name of its `group`; None leaves the daemon's own."""

    mode: int = 0o660
    group: str | None = None

    def apply(self, path: Path) -> None:
        """Give the file its group, then its mode. Raises `SocketAccessError`."""
        try:
            if self.group is not None:
                os.chown(path, -1, grp.getgrnam(self.group).gr_gid)
            path.chmod(self.mode)
        except KeyError as error:
            raise SocketAccessError(
                f"there is no group {self.group!r} for {path}; make it (groupadd --system {self.group})"
            ) from error
        except PermissionError as error:
            raise SocketAccessError(
                f"{path} cannot be given to the group {self.group!r}: make the daemon's user a member of it"
            ) from error

    def may_look(self, peer: Peer, path: Path) -> bool:
        """Root, the daemon's own user, members of the file's group; all where the mode lets all in."""
        return bool(
            may_change(peer)
            or self.mode & stat.S_IWOTH
            or (path.stat().st_gid in peer.groups and self.mode & 0o20)
        )


def may_change(peer: Peer) -> bool:
    """Root and the user that the daemon runs as."""
    return peer.uid in (0, os.geteuid())


def peer_of(sock: socket.socket) -> Peer:
    """Who connected (SO_PEERCRED, SO_PEERGROUPS). Members of very many groups have their primary one only."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", packed)
    try:
        more = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno not in (errno.ERANGE, errno.ENOPROTOOPT):
            raise
        more = b""
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"{len(more) // 4}I", more)}))


def private_socket(path: Path) -> socket.socket:
    """A stream socket bound to `path` for its owner alone; it does not listen yet.

    A socket's file gets the mode of the socket (unix(7)), so nobody else can be early.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    return sock
