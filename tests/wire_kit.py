"""A real front end on a real loop thread with a scripted sink behind it, and a bare DEALER to talk to it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
import zmq

from understudy.wire import (
    Accepted,
    Failed,
    Finished,
    Generate,
    ImageInfo,
    ModelEntry,
    Progress,
    Reply,
    Timings,
    decode_reply,
    encode,
)
from understudyd.shell.curve import ServerKeys
from understudyd.shell.frontend import Frontend
from understudyd.shell.limits import Limits
from understudyd.shell.socket_access import SocketAccess

# The first libuv loop of a process opens a pipe pair for signals and keeps it: no leak of a test's.
uvloop.new_event_loop().close()

PATIENCE_S = 15.0
MODELS = [
    ModelEntry(name="sd15-red", pipeline="StableDiffusion", size_bytes=2_100_000_000, tier="resident"),
    ModelEntry(name="sdxl-blue", pipeline="StableDiffusionXL", size_bytes=6_900_000_000, tier="disk"),
]
TIMINGS = Timings(queued_s=0.5, switch_s=0.002, run_s=1.5, encode_s=0.1, total_s=2.102)

Script = Callable[["FakeSink", str, Generate], None]


def image_of(request: Generate, index: int = 0) -> bytes:
    """Bytes that only this seed, prompt and place give: what a deterministic model would do."""
    return f"PNG {request.model} {request.seed} {request.prompt} {index}".encode()


def finished(request: Generate, images: list[bytes] | None = None) -> tuple[Finished, list[bytes]]:
    images = images or [image_of(request, i) for i in range(request.images)]
    info = ImageInfo(format=request.format, width=request.width or 64, height=request.height or 64)
    reply = Finished(
        id=request.id,
        model=request.model,
        seed=request.seed,
        images=(info,) * len(images),
        timings=TIMINGS,
        tier="resident",
        switched=True,
    )
    return reply, images


def paints_at_once(sink: "FakeSink", client: str, request: Generate) -> None:
    sink.reply(client, Accepted(id=request.id, position=0, tier="resident"))
    if request.progress:
        for step in range(1, (request.steps or 2) + 1):
            sink.reply(client, Progress(id=request.id, step=step, steps=request.steps or 2))
    sink.finish(client, request)


def accepts(sink: "FakeSink", client: str, request: Generate) -> None:
    sink.reply(client, Accepted(id=request.id, position=3, tier="disk"))


class FakeSink:
    """Stands where the runtime stands. What happened is in lists; `wait_for` waits until it did."""

    def __init__(self, script: Script = paints_at_once) -> None:
        self.script = script
        self.submitted: list[tuple[str, Generate]] = []
        self.payloads: list[tuple[bytes, ...]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.gone: list[str] = []
        self.entries = list(MODELS)
        self._changed = threading.Condition()
        self._send: Callable[..., None] = lambda *_: None

    def attach(self, send: Callable[..., None]) -> None:
        self._send = send

    # RequestSink, on the loop's thread
    def submit(self, client: str, request: Generate, payload: Sequence[bytes] = ()) -> None:
        self.payloads.append(tuple(payload))
        self._note(self.submitted, (client, request))
        self.script(self, client, request)

    def cancel(self, client: str, request_id: str) -> None:
        self._note(self.cancelled, (client, request_id))
        self.reply(client, Failed(id=request_id, code="cancelled", message="cancelled by the client"))

    def client_gone(self, client: str) -> None:
        self._note(self.gone, client)

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def models(self) -> list[ModelEntry]:
        return self.entries

    # the script's tools, on the loop's thread
    def reply(self, client: str, reply: Reply, payload: list[bytes] | tuple[bytes, ...] = ()) -> None:
        self._send(client, reply, payload)

    def finish(self, client: str, request: Generate) -> None:
        self._send(client, *finished(request))

    # for tests, on any thread
    def wait_for(self, is_true: Callable[["FakeSink"], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: is_true(self), PATIENCE_S), vars(self)

    def _note(self, where: list[Any], what: Any) -> None:
        with self._changed:
            where.append(what)
            self._changed.notify_all()


class Served:
    """A front end that runs; `call` runs something on its loop and returns the value."""

    def __init__(self, loop: asyncio.AbstractEventLoop, frontend: Frontend, sink: FakeSink) -> None:
        self.loop = loop
        self.frontend = frontend
        self.sink = sink
        self.endpoints: list[str] = []
        self.errors: list[dict[str, Any]] = []

    @property
    def endpoint(self) -> str:
        return self.endpoints[0]

    def call(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)

    def until(self, is_true: Callable[[], bool], poke: Callable[[], None] = lambda: None) -> None:
        """Poke until it is true on the loop's thread; gives up after a while."""
        give_up_at_s = time.monotonic() + PATIENCE_S
        while not self.call(is_true):
            assert time.monotonic() < give_up_at_s, "it never came true"
            poke()

    def progress(self, client: str, request_id: str, step: int = 1) -> None:
        self.call(lambda: self.sink.reply(client, Progress(id=request_id, step=step, steps=50)))


@contextlib.contextmanager
def serving(
    endpoint: str,
    sink: FakeSink | None = None,
    *,
    limits: Limits | None = None,
    daemon_id: str = "daemon-1",
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    clock: Callable[[], float] = time.monotonic,
    more_endpoints: Sequence[str] = (),
    keys: ServerKeys | None = None,
    access: SocketAccess | None = None,
    flood_bytes: int = 512 * 2**20,
) -> Iterator[Served]:
    """Run a front end on a thread of its own; any error on its loop fails the test."""
    loop = new_loop()
    sink = sink or FakeSink()
    limits = limits or Limits()
    frontend = Frontend(
        loop,
        [endpoint, *more_endpoints],
        sink,
        limits=limits,
        daemon_id=daemon_id,
        clock=clock,
        access=access,
        keys=keys,
        flood_bytes=flood_bytes,
    )
    served = Served(loop, frontend, sink)
    sink.attach(frontend.send)
    loop.set_exception_handler(lambda _, context: served.errors.append(context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        served.endpoints = served.call(frontend.start)
        yield served
    finally:
        served.call(frontend.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_S)
        loop.close()
    assert not served.errors, served.errors


class Dealer:
    """A client that does exactly what it is told."""

    def __init__(self, endpoint: str, identity: bytes = b"bare", receive_high_water_mark: int = 1000) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, identity)
        self.socket.setsockopt(zmq.RCVHWM, receive_high_water_mark)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def __enter__(self) -> "Dealer":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()

    def send(self, message: Any, *payload: bytes) -> None:
        header = message if isinstance(message, bytes) else encode(message)
        self.socket.send_multipart([header, *payload])

    def send_map(self, **fields: Any) -> None:
        """A header that the client library would not write."""
        self.send(msgspec.msgpack.encode(fields))

    def receive_all(self) -> tuple[Reply, list[bytes]]:
        assert self.socket.poll(int(PATIENCE_S * 1000)), "no reply"
        header, *payload = self.socket.recv_multipart()
        return decode_reply(header), payload

    def receive(self) -> Reply:
        return self.receive_all()[0]

    def receive_until(self, kind: type) -> Any:
        while not isinstance(reply := self.receive(), kind):
            pass
        return reply


def request(request_id: str = "r1", **fields: Any) -> Generate:
    return Generate(**({"id": request_id, "model": "sd15-red", "prompt": "a red circle", "seed": 7} | fields))


def ipc(folder: Path, name: str = "u.sock") -> str:
    return f"ipc://{folder / name}"
