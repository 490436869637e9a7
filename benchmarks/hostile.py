"""Hostile messages, and somebody who sends them: `python -m benchmarks.hostile ENDPOINT --frames N`.

What is sent depends on the seed alone. Some of it is no protocol at all, some is the protocol bent in one
place, some is well-formed and means harm: images that say they are enormous, ids of others, floods of
questions whose answers nobody reads.
"""

import argparse
import contextlib
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zmq

from understudy.wire import Cancel, Generate, InputInfo, ListModels, Ping, encode

Frames = list[bytes]

_DEALERS, _LIFE_MESSAGES, _RAW_EVERY = 8, 2000, 500
_BOMB = zlib.compress(b"A" * 4_000_000)
_GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" * 32


class Hostile:
    """Endless messages. `messages` and `frames` count what was made."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.messages = self.frames = 0
        self._kinds: list[tuple[int, Callable[[], Frames]]] = [
            (20, self._noise),
            (30, self._bent),
            (15, self._strange_fields),
            (5, self._deep),
            (5, self._lying_lengths),
            (10, self._unwelcome),
            (5, self._bomb),
            (1, self._many_frames),
            (1, self._large),
            (6, self._questions),
        ]

    def message(self) -> Frames:
        """The next one."""
        weights, makers = zip(*self._kinds)
        made: Frames = self._random.choices(makers, weights)[0]()
        self.messages += 1
        self.frames += len(made)
        return made

    def raw(self) -> bytes:
        """Bytes for a bare connection: a greeting bent, cut off, or followed by nonsense."""
        self.messages += 1
        self.frames += 1
        noise = self._random.randbytes(self._random.randrange(200))
        ready = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
        huge = b"\x02" + struct.pack(">Q", 2**62)
        return self._random.choice(
            [noise, _GREETING[: self._random.randrange(64)], _GREETING + noise, _GREETING + ready + huge]
        )

    # -- kinds -----------------------------------------------------------------------------------------------

    def _noise(self) -> Frames:
        return [self._random.randbytes(self._random.randrange(300)) for _ in range(self._few())]

    def _bent(self) -> Frames:
        """A good header with some bytes changed, left out or put in."""
        header = bytearray(encode(self._random.choice([self._wish(), Cancel(id="r1"), Ping(id="p")])))
        for _ in range(self._few()):
            at = self._random.randrange(len(header) + 1)
            match self._random.randrange(3):
                case 0:
                    header[at : at + 1] = self._random.randbytes(1)
                case 1:
                    del header[at : at + self._few()]
                case _:
                    header[at:at] = self._random.randbytes(self._few())
        return [bytes(header), *self._noise()[1:]]

    def _strange_fields(self) -> Frames:
        fields: dict[Any, Any] = {"type": "generate", "v": 1, "id": "x", "model": "nobody", "seed": 1}
        for name in self._random.sample(list(Generate.__struct_fields__), self._few()):
            fields[name] = self._value(3)
        return [msgspec.msgpack.encode(fields)]

    def _deep(self) -> Frames:
        opening = self._random.choice([b"\x91", b"\x81\xa1x", b"\x81\xa7options\x81\xa1x\x91"])
        return [opening * self._random.randrange(1, 10_000)]

    def _lying_lengths(self) -> Frames:
        """Strings, arrays and maps that announce gigabytes."""
        start = self._random.choice([b"\xdb", b"\xdd", b"\xdf", b"\xc6", b"\xc9"])
        return [start + b"\xff\xff\xff\xff" + self._random.randbytes(8)]

    def _unwelcome(self) -> Frames:
        """Well-formed, and out of bounds or about nothing."""
        changes = self._random.choice(
            [
                {"width": 65536, "height": 65536},
                {"steps": 2**40},
                {"images": 10**9},
                {"prompt": "\U0001f3ad" * 9000},
                {"id": "../../etc/passwd"},
                {"model": "../../etc/passwd"},
                {"deadline_s": float("nan")},
                {"options": {f"o{i}": i for i in range(100)}},
                {"scheduler": "__import__"},
                {"task": "os.system"},
                {},
            ]
        )
        return [encode(msgspec.structs.replace(self._wish(), **changes))]

    def _bomb(self) -> Frames:
        """A small file that says, or hides, an image that is large."""
        size = self._random.choice([1, 64, 30_000])
        body = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        text = _BOMB
        chunks = [(b"IHDR", body), (b"zTXt", b"k\0\0" + text), (b"IDAT", text), (b"IEND", b"")]
        png = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        told = self._random.choice([size, 8])
        info = InputInfo(name="image", format="png", width=told, height=told)
        return [encode(msgspec.structs.replace(self._wish(), inputs=(info,))), png]

    def _many_frames(self) -> Frames:
        return [encode(self._wish()), *[b"x"] * self._random.randrange(1, 40)]

    def _large(self) -> Frames:
        """Longer than a header may be."""
        return [self._random.randbytes(16) * self._random.randrange(4096, 8192)]

    def _questions(self) -> Frames:
        name = f"q{self._random.randrange(10**9)}"
        asked: Ping | ListModels | Cancel = self._random.choice([Ping, ListModels, Cancel])(id=name)
        return [encode(asked)]

    # -- pieces ----------------------------------------------------------------------------------------------

    def _few(self) -> int:
        return self._random.randrange(1, 5)

    def _wish(self) -> Generate:
        name = f"h{self._random.randrange(10**6)}"
        return Generate(id=name, model="nobody", prompt="x" * self._random.randrange(50), seed=1)

    def _value(self, depth: int) -> Any:
        """Something that msgpack can say."""
        plain: list[Any] = [
            None,
            True,
            -(2**63),
            2**64 - 1,
            float("inf"),
            float("nan"),
            "",
            "\0" * 40,
            "\u202e" * 10,
            b"\xff" * 20,
        ]
        kind = self._random.randrange(4 if depth else 2)
        if kind < 2:
            return self._random.choice(plain)
        if kind == 2:
            return [self._value(depth - 1) for _ in range(self._few())]
        return {self._random.choice(["a", "b", "name"]): self._value(depth - 1) for _ in range(self._few())}


class Attacker:
    """Several connections to an ipc endpoint, renewed now and then; most never read an answer."""

    def __init__(self, endpoint: str, seed: int) -> None:
        self._path = endpoint.removeprefix("ipc://")
        self._endpoint = endpoint
        self._hostile = Hostile(seed)
        self._random = random.Random(seed)
        self._context = zmq.Context()
        self._dealers = [self._dealer() for _ in range(_DEALERS)]

    def send(self, frames: int) -> tuple[int, int]:
        """At least so many frames; how many it were, in how many messages."""
        for count in self._counted(frames):
            if count % _RAW_EVERY == 0:
                self._send_raw()
            if count % _LIFE_MESSAGES == 0:
                at = self._random.randrange(_DEALERS)
                self._dealers[at].close(linger=0)
                self._dealers[at] = self._dealer()
            at = self._random.randrange(_DEALERS)
            self._send_to(self._dealers[at])
            if at == 0:
                self._read(self._dealers[at])
        return self._hostile.frames, self._hostile.messages

    def close(self) -> None:
        """What is in the sockets may still leave."""
        for dealer in self._dealers:
            dealer.close(linger=2000)
        self._context.term()

    def _counted(self, frames: int) -> Iterator[int]:
        count = 0
        while self._hostile.frames < frames:
            yield (count := count + 1)

    def _dealer(self) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, self._random.randbytes(16).hex().encode())
        dealer.connect(self._endpoint)
        return dealer

    def _send_to(self, dealer: "zmq.Socket[bytes]") -> None:
        message = self._hostile.message()
        while True:
            try:
                dealer.send_multipart(message, zmq.NOBLOCK)
                return
            except zmq.Again:
                dealer.poll(100, zmq.POLLOUT)

    def _read(self, dealer: "zmq.Socket[bytes]") -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(10):
                dealer.recv_multipart(zmq.NOBLOCK)

    def _send_raw(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as bare:
            bare.settimeout(1.0)
            bare.connect(self._path)
            bare.sendall(self._hostile.raw())


def main() -> None:
    """Attack an ipc endpoint; prints the numbers of frames, messages and seconds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    attacker = Attacker(arguments.endpoint, arguments.seed)
    started_s = time.monotonic()
    sent = attacker.send(arguments.frames)
    attacker.close()
    print(*sent, round(time.monotonic() - started_s, 3), flush=True)


if __name__ == "__main__":
    main()
