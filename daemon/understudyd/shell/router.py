"""The ROUTER socket on an event loop: frames in, frames out, nothing about their meaning.

`ZMQ_FD` signals edges: it may stay quiet while messages wait. So the socket's own EVENTS are read after every
drain and after every send. Draining is bounded, so that a flood from one client does not stall the loop; and
after a drain that stopped at its bound the next one waits three times as long as that computed: a flood gets
a quarter of the interpreter's time, the stage needs the rest. ZeroMQ takes clients by turns, so that who says
little is heard in the next drain.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path

import zmq

from understudyd.shell.curve import ServerKeys
from understudyd.shell.endpoints import EndpointError, check_endpoint
from understudyd.shell.flood_guard import FloodGuard
from understudyd.shell.socket_access import SocketAccess, SocketAccessError
from understudyd.shell.zap import DOMAIN, Gatekeeper

MESSAGES_PER_TURN = 64
REST_FACTOR, MAX_REST_S = 3, 0.05
_HANDSHAKE_MS = 5_000
_KEEPALIVE_S = 60
_BACKLOG = 128
# Numbers, not pyzmq's flags: to combine those takes microseconds, several times a message.
_NOBLOCK, _MORE_LATER, _POLLIN = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)


class Sent(Enum):
    """What became of a message that was given to the socket."""

    YES = "yes"
    FULL = "full"
    GONE = "gone"


class Router:
    """Owns context and socket. Belongs to the loop's thread.

    `on_message(identity, frames, user)` gets every message, a header and its payload, cut one frame after
    `max_payload_frames`: the one too many shows that there were too many. `user` is what is known of who
    connected, from the kernel or from the list of keys: "uid 1000", "key alice", or an address.
    `on_writable()` is called after each drain, when a client that was full may have room again. All messages
    of a drain but the first come within one `together()`: one that comes alone is not held up.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoints: Sequence[str],
        on_message: Callable[[bytes, list[bytes], str], None],
        on_writable: Callable[[], None],
        *,
        together: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        max_payload_frames: int,
        max_frame_bytes: int,
        send_high_water_mark: int,
        receive_high_water_mark: int,
        access: SocketAccess | None = None,
        keys: ServerKeys | None = None,
        directory_mode: int = 0o700,
        max_connections: int = 1000,
        flood_bytes: int = 256 * 1024 * 1024,
        explained_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_writable = on_writable
        self._together = together
        self._frames_kept = 1 + max_payload_frames + 1
        self._turn: asyncio.Handle | None = None
        self._rest_s = 0.0
        self._draining = False
        self._socket_files: dict[Path, int] = {}
        for endpoint in endpoints:
            check_endpoint(endpoint, has_keys=keys is not None)
        self._context = zmq.Context()
        self._gatekeeper = None if keys is None else Gatekeeper(loop, self._context, keys.clients)
        self._socket = self._context.socket(zmq.ROUTER)
        # A client that comes back under its routing id takes it over; one that is away is an error here.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        self._socket.setsockopt(zmq.SNDHWM, send_high_water_mark)
        self._socket.setsockopt(zmq.RCVHWM, receive_high_water_mark)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Who connects and says nothing holds a descriptor no longer than this.
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_S)
        self._guard = FloodGuard(
            loop,
            self._socket,
            budget_bytes=flood_bytes,
            max_connections=max_connections,
            explained_bytes=explained_bytes,
        )
        try:
            self.endpoints = self._bind_all(endpoints, keys, access or SocketAccess(), directory_mode)
        except EndpointError:
            self._release(0)
            raise
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._on_readable)
        self._rearm()

    def send(self, identity: bytes, frames: Sequence[bytes]) -> Sent:
        """Hand a message to the socket, whole or not at all. Never blocks."""
        socket = self._socket
        try:
            # Only the first frame can be refused: the peer's pipe is chosen and has room, or not.
            socket.send(identity, _MORE_LATER)
            for frame in frames[:-1]:
                socket.send(frame, _MORE_LATER)
            socket.send(frames[-1], _NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.GONE
        finally:
            self._rearm()
        return Sent.YES

    def admit(self, clients: Mapping[str, str]) -> None:
        """Another list of keys, names by public key: from now on these may connect, and no others."""
        if self._gatekeeper is not None:
            self._gatekeeper.clients = clients

    def change_max_connections(self, most: int) -> None:
        """From now on; those that are open stay."""
        self._guard.max_connections = most

    def close(self, linger_s: float = 0.0) -> None:
        """Stop listening; what is in the socket may still leave for `linger_s` (blocks that long at most)."""
        if self._turn is not None:
            self._turn.cancel()
        self._loop.remove_reader(self._fd)
        self._release(int(linger_s * 1000))

    def _on_readable(self) -> None:
        if self._turn is None:
            self._drain()
        else:
            self._has_message()  # takes the edge: the descriptor would not fall silent

    def _drain(self) -> None:
        self._turn = None
        self._draining = True
        started_s, self._rest_s = time.thread_time(), 0.0
        try:
            if self._take_one() and self._has_message():
                with self._together():
                    is_more = all(self._take_one() for _ in range(MESSAGES_PER_TURN - 1))
                if is_more:
                    self._rest_s = min(MAX_REST_S, REST_FACTOR * (time.thread_time() - started_s))
        finally:  # a bug above must not leave the edge unread
            self._draining = False
            self._rearm()
        self._on_writable()

    def _take_one(self) -> bool:
        """Whether there was one."""
        if is_there := self._has_message():
            self._on_message(*self._receive())
        return is_there

    def _receive(self) -> tuple[bytes, list[bytes], str]:
        socket = self._socket
        identity = socket.recv(_NOBLOCK)
        frames: list[bytes] = []
        user = ""
        while socket.get(zmq.RCVMORE):
            if not frames:  # a message arrives whole; each frame of it knows where from
                header = socket.recv(_NOBLOCK, copy=False)
                user = _user_of(header)
                frames.append(header.bytes)
            else:
                frame = socket.recv(_NOBLOCK)
                if len(frames) < self._frames_kept:
                    frames.append(frame)
        return identity, frames, user

    def _rearm(self) -> None:
        if self._turn is not None or self._draining:
            return
        if self._has_message():
            self._turn = self._loop.call_later(self._rest_s, self._drain)

    def _has_message(self) -> bool:
        """Asks the socket itself, which counts as having heard the descriptor."""
        return bool(int(self._socket.get(zmq.EVENTS)) & _POLLIN)

    def _bind_all(
        self, endpoints: Sequence[str], keys: ServerKeys | None, access: SocketAccess, directory_mode: int
    ) -> list[str]:
        """The endpoints as they were bound. A bind takes the options that are set when it is made."""
        bound = {end: self._bind(end, access, directory_mode) for end in endpoints if end.startswith("ipc:")}
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
            # Without these ZeroMQ lets everybody in when nobody answers for the list of keys.
            self._socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        bound |= {end: self._bind(end, access, directory_mode) for end in endpoints if end not in bound}
        return [bound[end] for end in endpoints]

    def _bind(self, endpoint: str, access: SocketAccess, directory_mode: int) -> str:
        path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        try:
            if path is not None:
                path.parent.mkdir(mode=directory_mode, parents=True, exist_ok=True)
            self._socket.setsockopt(zmq.IPV6, "[" in endpoint)
            self._socket.bind(endpoint)
            if path is not None:
                access.apply(path)
                self._socket_files[path] = path.stat().st_ino
        except (OSError, zmq.ZMQError) as error:
            reason = error.strerror or str(error)
            raise EndpointError(f"cannot listen on {endpoint}: {reason}; choose another endpoint") from error
        except SocketAccessError as error:
            raise EndpointError(str(error)) from error
        return bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def _release(self, linger_ms: int) -> None:
        self._guard.close()
        self._socket.close(linger=linger_ms)
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self._context.term()
        for path, inode in self._socket_files.items():  # ZeroMQ leaves them
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == inode:  # else it is another daemon's by now
                    path.unlink()


def _user_of(frame: zmq.Frame) -> str:
    """By what ZeroMQ says of the connection that a frame came over."""
    address = str(frame.get("Peer-Address"))
    host, _, credentials = address.partition(":")
    if host == "localhost" and credentials.count(":") == 2:  # SO_PEERCRED: uid, gid, pid
        return f"uid {credentials.partition(':')[0]}"
    try:
        return f"key {frame.get('User-Id')}"
    except zmq.ZMQError:  # no key was asked for
        return address
