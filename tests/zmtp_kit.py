"""ZMTP by hand (RFC 23): what no ZeroMQ library would send."""

import socket
import struct

_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32
MORE, LONG = 1, 2


class BarePeer:
    """A DEALER's connection to an ipc endpoint, past its handshake. Use it with `with`."""

    def __init__(self, endpoint: str, identity: bytes = b"bare") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(15)
        self.socket.connect(endpoint.removeprefix("ipc://"))
        self.socket.sendall(_GREETING)
        ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
        self.socket.sendall(bytes([4, len(ready)]) + ready)
        greeting = b""
        while len(greeting) < len(_GREETING):
            greeting += self.socket.recv(len(_GREETING) - len(greeting))

    def __enter__(self) -> "BarePeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send_frame(self, data: bytes, *, is_last: bool) -> None:
        self.socket.sendall(bytes([LONG if is_last else LONG | MORE]) + struct.pack(">Q", len(data)) + data)

    def is_shut(self) -> bool:
        """Whether the other side has closed; blocks until it has, or says something, or time is up."""
        try:
            while self.socket.recv(65536):
                pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
