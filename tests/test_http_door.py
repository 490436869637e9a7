"""Probes and the door for them without a daemon: who is alive, as little HTTP as needed, where it listens."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from understudyd.shell.endpoints import EndpointError, tcp_address
from understudyd.shell.health import Health
from understudyd.shell.http_door import MAX_HEAD_BYTES, Answer, HttpDoor
from understudyd.shell.metrics import Metrics
from understudyd.shell.observatory import Observatory
from understudyd.shell.runtime import Runtime
from understudyd.shell.socket_access import SocketAccess

# -- health ----------------------------------------------------------------------------------------


def health(state: str, *, is_open: bool = True, busy: bool = False, idle_s: float = 0.0) -> Health:
    machine = SimpleNamespace(running={"r": 1} if busy else {}, on_deck=(), is_open=is_open)
    runtime = cast(Runtime, SimpleNamespace(machine=machine, stage_moved_at_s=100.0 - idle_s))
    return Health(runtime, lambda: state, lambda: 60.0, clock=lambda: 100.0)


def test_who_is_alive_and_who_takes_requests() -> None:
    assert health("ready").illness() == health("ready").unreadiness() == ""
    assert health("ready", idle_s=1e6).illness() == "", "with nothing to do nothing moves"
    stuck = health("ready", busy=True, idle_s=61.0)
    assert "61 s" in stuck.illness() and "61 s" in stuck.unreadiness()
    assert health("ready", busy=True, idle_s=59.0).illness() == ""
    assert health("starting").unreadiness().startswith("starting") and not health("starting").illness()
    assert health("ready", is_open=False).unreadiness().startswith("draining")
    assert health("stopping").unreadiness().startswith("stopping")


# -- the door --------------------------------------------------------------------------------------


class Door:
    """A door on a Unix socket, and peers with manners or without."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[str, str]] = []
        self.door = HttpDoor(self._answer, patience_s=0.3, max_connections=4)

    async def _answer(self, path: str, accept: str) -> Answer:
        self.asked.append((path, accept))
        if path == "/broken":
            raise RuntimeError("defect")
        return Answer.text(HTTPStatus.OK, "x" * (5_000_000 if path == "/large" else 3))

    async def ask(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), 30)
        except ConnectionError:
            return b""
        finally:
            writer.close()


def with_door(path: Path, scenario: Callable[[Door], Awaitable[None]]) -> Door:
    door = Door(path)

    async def play() -> None:
        server = await asyncio.start_unix_server(door.door.connected, str(path), limit=MAX_HEAD_BYTES)
        try:
            await scenario(door)
        finally:
            server.close()
            await door.door.close()

    asyncio.run(play())
    return door


GOOD = b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\nACCEPT: text/plain\r\n\r\n"


def test_one_request_a_connection(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        said = await door.ask(GOOD)
        assert said.startswith(b"HTTP/1.1 200 OK\r\n") and said.endswith(b"\r\n\r\nxxx\n")
        assert b"Content-Length: 4\r\n" in said and b"Connection: close\r\n" in said
        head = await door.ask(GOOD.replace(b"GET", b"HEAD"))
        assert b"Content-Length: 4\r\n" in head and head.endswith(b"\r\n\r\n")
        assert (await door.ask(GOOD * 3)).count(b"HTTP/1.1 200") == 1

    door = with_door(tmp_path / "s", scenario)
    assert door.asked[0] == ("/metrics", "text/plain")


BAD = [
    (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"405"),
    (b"GET /metrics\r\n\r\n", b"400"),
    (b"GET http://evil/ HTTP/1.1\r\n\r\n", b"400"),
    (b"GET /metrics HTTP/9.9\r\n\r\n", b"400"),
    (b"\x16\x03\x01\x02\x00\x01\x00\xff\xff\r\n\r\n", b"400"),
    (b"\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", b"431"),
    (b"A" * 1_000_000, b"431"),
    (b"GET /broken HTTP/1.1\r\n\r\n", b"500"),
    (b"GET /\r\nEvil: \xff\xfe HTTP/1.1\r\n\r\n", b"400"),
]


@pytest.mark.parametrize(("request_", "status"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests_are_answered_and_forgotten(request_: bytes, status: bytes, tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        assert (await door.ask(request_))[:12] == b"HTTP/1.1 " + status
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with_door(tmp_path / "s", scenario)


@given(st.binary(max_size=300))
def test_garbage_does_no_harm(garbage: bytes) -> None:
    import tempfile

    async def scenario(door: Door) -> None:
        said = await door.ask(garbage + b"\r\n\r\n")
        assert not said or said.startswith(b"HTTP/1.1 ")
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with tempfile.TemporaryDirectory() as folder:
        with_door(Path(folder) / "s", scenario)


def test_the_slow_and_the_many_are_shown_out(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        slow = [await asyncio.open_unix_connection(str(door.path)) for _ in range(4)]
        for _, writer in slow:
            writer.write(b"GET /met")
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            while len(door.door._tasks) < 4:
                await asyncio.sleep(0.001)
        assert await door.ask(GOOD) == b"", "there is no room for a fifth"
        for reader, writer in slow:
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    assert with_door(tmp_path / "s", scenario).asked == [("/metrics", "text/plain")]


def test_one_that_never_reads_is_let_go(tmp_path: Path) -> None:
    async def scenario(door: Door) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            sock.connect(str(door.path))
            sock.send(b"GET /large HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(30):
                while not door.asked or door.door._tasks:
                    await asyncio.sleep(0.01)
        assert (await door.ask(GOOD)).endswith(b"xxx\n")

    with_door(tmp_path / "s", scenario)


# -- where it may listen ---------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://[::1]:9464", "tcp://localhost:9464"])
def test_this_machine_alone(endpoint: str) -> None:
    host, port = tcp_address(endpoint)
    assert f"tcp://{host}:{port}" == endpoint


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:9464", "tcp://192.168.1.5:1", "tcp://[::]:1"])
def test_others_must_be_allowed(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="allow_remote = true"):
        tcp_address(endpoint)
    assert tcp_address(endpoint, allow_remote=True)


@pytest.mark.parametrize(
    "endpoint", ["9464", "ipc:///x", "tcp://127.0.0.1", "tcp://:1", "tcp://127.0.0.1:99999"]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(EndpointError, match="write it like"):
        tcp_address(endpoint, allow_remote=True)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken(taken: int, tmp_path: Path) -> None:
    async def start() -> None:
        metrics = Metrics(CollectorRegistry(), list)
        path, endpoints = tmp_path / "s", [f"tcp://127.0.0.1:{taken}"]
        observatory = Observatory(metrics, health("ready"), path, endpoints, SocketAccess())
        try:
            await observatory.start()
        finally:
            await observatory.stop()

    with pytest.raises(EndpointError, match="another port"):
        asyncio.run(start())
    assert not (tmp_path / "s").exists()
