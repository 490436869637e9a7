"""Who may connect over TCP: ZeroMQ asks before it lets a client in (RFC 27/ZAP).

Only sockets with keys ask, and they are set to be shut where nobody answers. A key that is taken off
the list keeps its open connections.
"""

import asyncio
import logging
from collections.abc import Mapping

import zmq
from zmq.utils import z85

_log = logging.getLogger(__name__)

ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = b"understudy"
_VERSION = b"1.0"
_QUESTIONS_PER_TURN = 64


class Gatekeeper:
    """Answers ZAP questions of one context on the event loop. `clients` are names by public key in Z85."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: "zmq.Context[zmq.Socket[bytes]]",
        clients: Mapping[str, str],
    ) -> None:
        self.clients = clients
        self.admitted = self.refused = 0
        self._loop = loop
        self._turn: asyncio.Handle | None = None
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(ADDRESS)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._drain)
        self._rearm()

    def close(self) -> None:
        """Nobody gets in any more."""
        if self._turn is not None:
            self._turn.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()

    def _drain(self) -> None:
        self._turn = None
        try:
            for _ in range(_QUESTIONS_PER_TURN):
                question = self._socket.recv_multipart(zmq.NOBLOCK)
                self._socket.send_multipart(self.answer(question), zmq.NOBLOCK)
        except zmq.Again:
            pass
        self._rearm()

    def _rearm(self) -> None:
        """The descriptor signals an edge only: the socket itself is asked."""
        if self._turn is None and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._turn = self._loop.call_soon(self._drain)

    def answer(self, question: list[bytes]) -> list[bytes]:
        """The reply's frames. Whatever is not a known key in a well-formed question is refused."""
        route, fields = question[:2], question[2:]
        request_id = fields[1] if len(fields) > 1 else b""
        name, why = self._judge(fields)
        if name is None:
            self.refused += 1
            _log.warning("a client at %s is refused: %s", _shown(fields[3]) if len(fields) > 3 else "?", why)
            return [*route, _VERSION, request_id, b"400", why.encode(), b"", b""]
        self.admitted += 1
        _log.info("client key %s connects from %s", name, _shown(fields[3]))
        return [*route, _VERSION, request_id, b"200", b"OK", name.encode(), b""]

    def _judge(self, fields: list[bytes]) -> tuple[str | None, str]:
        """The key's name, or why there is none."""
        if len(fields) != 7 or fields[0] != _VERSION or fields[2] != DOMAIN:
            return None, "no question of ours"
        if fields[5] != b"CURVE" or len(fields[6]) != 32:
            return None, "it has no key"
        key = z85.encode(fields[6]).decode()
        name = self.clients.get(key)
        return name, "" if name is not None else f"its key {key} is not among [curve] client_keys"


def _shown(address: bytes) -> str:
    """What the peer says of itself, with nothing in it that could end the line."""
    return repr(address.decode("ascii", errors="replace"))[1:-1][:80]
