"""Keys on a client's socket, and what becomes of its handshakes.

ZeroMQ tries again and again without a word. Its monitor tells why a handshake failed: what no second attempt
can mend is told to the caller at once, the rest is kept for when patience ends.
"""

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from understudy.keys import Keys, public_key

_AUTH, _PROTOCOL, _CUT = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)


def use_keys(socket: "zmq.Socket[bytes]", keys: Keys) -> None:
    """Encrypt what this socket connects to from now on."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public_key(keys.secret).encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())


class HandshakeWatch:
    """Calls `refused(why)` for what will stay so, `troubled(why)` for what may pass."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: "zmq.Socket[bytes]",
        keys: Keys | None,
        *,
        refused: Callable[[str], None],
        troubled: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._keys = keys
        self._refused, self._troubled = refused, troubled
        self._monitor = socket.get_monitor_socket(_AUTH | _PROTOCOL | _CUT)
        self._turn: asyncio.Handle | None = None
        self._fd = int(self._monitor.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._read)
        self._rearm()

    def close(self) -> None:
        """Before the watched socket is closed."""
        if self._turn is not None:
            self._turn.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)

    def _read(self) -> None:
        self._turn = None
        try:
            while True:
                self._tell(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"])
        except zmq.Again:
            pass
        self._rearm()

    def _rearm(self) -> None:
        """The descriptor signals an edge only: the socket itself is asked."""
        if self._turn is None and int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._turn = self._loop.call_soon(self._read)

    def _tell(self, event: int) -> None:
        if event == _AUTH and self._keys is not None:
            self._refused(
                f"it does not know the key {public_key(self._keys.secret)}: have its operator put the line "
                "of your .pub file into [curve] client_keys"
            )
        elif event == _PROTOCOL and self._keys is None:
            self._refused(
                "it asks for keys: make yours with `understudy keygen NAME`, give the .pub file to its "
                "operator, and name your .key and its .pub file (keys=, or --key and --server-key)"
            )
        elif event == _PROTOCOL:
            self._refused("it uses no keys, and this client would: leave them out if you trust the network")
        elif self._keys is not None:
            self._troubled("it breaks the handshake off: is the --server-key really that daemon's .pub file?")
        else:
            self._troubled("it breaks the handshake off: is this an Understudy daemon?")
