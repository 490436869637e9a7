"""The clients of `benchmarks.wire`, a process each: `python -m benchmarks.wire_client WHAT ENDPOINT ...`.

Says "ready" once it is connected, works at the line that it is sent, and answers with one line of JSON; until
its standard input ends. No torch here.
"""

import asyncio
import itertools
import json
import select
import sys
import time
import uuid
from collections import deque
from typing import Any

import zmq

from understudy import AsyncClient, Client
from understudy.wire import Cancel, Failed, Generate, Ping, Pong, decode_reply, encode

RAW_REQUEST, RAW_REPLY = b"q" * 200, [b"a" * 300]
_PING_EVERY_S = 0.02
_BURST_S = 0.005
_ON_DECK = 4  # the first in line stay: whom the stage has chosen already is no waiting request


async def latency(endpoint: str, model: str) -> None:
    """`{"count", "side_px"}` -> milliseconds of each request, one after the other."""
    async with AsyncClient(endpoint) as client:
        await _ready(client)
        while order := await _order():
            fields = {"width": order["side_px"], "height": order["side_px"], "format": "raw", "steps": 1}
            times_ms = []
            for _ in range(order["count"]):
                started_s = time.perf_counter()
                await client.generate(model, "", **fields)
                times_ms.append(1e3 * (time.perf_counter() - started_s))
            _answer(times_ms)


async def throughput(endpoint: str, model: str) -> None:
    """`{"count", "in_flight"}` -> seconds for all of them."""
    async with AsyncClient(endpoint) as client:
        await _ready(client)
        while order := await _order():
            fields = {"width": 8, "height": 8, "format": "raw", "steps": 1}
            requests = [{"model": model, **fields} for _ in range(order["count"])]
            started_s = time.perf_counter()
            async for _ in client.generate_many(requests, in_flight=order["in_flight"]):
                pass
            _answer(time.perf_counter() - started_s)


def blocking(endpoint: str, model: str) -> None:
    """As `latency`, with the blocking client, whose calls go through a thread of its own."""
    with Client(endpoint) as client:
        client.ping()
        _answer("ready")
        for line in sys.stdin:
            times_ms = []
            for _ in range(json.loads(line)["count"]):
                started_s = time.perf_counter()
                client.generate(model, "", width=8, height=8, format="raw", steps=1)
                times_ms.append(1e3 * (time.perf_counter() - started_s))
            _answer(times_ms)


def raw(endpoint: str) -> None:
    """`{"count"}` -> milliseconds of each plain pyzmq round trip; the other side is `raw_server`."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        _answer("ready")
        for line in sys.stdin:
            times_ms = []
            for _ in range(json.loads(line)["count"]):
                started_s = time.perf_counter()
                socket.send(RAW_REQUEST)
                socket.recv_multipart()
                times_ms.append(1e3 * (time.perf_counter() - started_s))
            _answer(times_ms)


def raw_server(*endpoints: str) -> None:
    """Answers whatever comes, until it is killed."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        for endpoint in endpoints:
            socket.bind(endpoint)
        _answer("ready")
        while True:
            identity, *_ = socket.recv_multipart()
            socket.send_multipart([identity, *RAW_REPLY])


def flood(endpoint: str, model: str) -> None:
    """`{"waiting", "per_s"}`: so many requests wait, then so many come a second, each for an old one.

    Answers when the first ones wait; at the next line ends, and says how many came a second and were refused.
    Plain pyzmq: with the client library, two cores would be busy with the client.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        _said(socket, Pong, asking=Ping(id="ready"))
        _answer("ready")
        for line in sys.stdin:
            _answer(_flood(socket, model, **json.loads(line)))


def _flood(socket: "zmq.Socket[bytes]", model: str, waiting: int, per_s: float) -> dict[str, float]:
    numbers = itertools.count()
    line: deque[str] = deque()
    run = uuid.uuid4().hex

    def add() -> None:
        line.append(f"{run}-{next(numbers)}")
        socket.send(encode(Generate(id=line[-1], model=model, seed=1, width=8, height=8, steps=1)))

    for _ in range(waiting):
        add()
    refused = _said(socket, Pong, asking=Ping(id="waiting"))
    _answer("waiting")
    started_s, count = time.perf_counter(), 0
    while not select.select([sys.stdin], [], [], _BURST_S)[0]:
        due = int((time.perf_counter() - started_s) * per_s)
        for _ in range(due - count):
            socket.send(encode(Cancel(id=line[_ON_DECK])))
            del line[_ON_DECK]
            add()
        count = due
        refused += _said(socket)
    elapsed_s = time.perf_counter() - started_s
    sys.stdin.readline()
    for request_id in line:
        socket.send(encode(Cancel(id=request_id)))
    refused += _said(socket, Pong, asking=Ping(id="over"))
    return {"per_s": count / elapsed_s, "refused": refused}


def _said(socket: "zmq.Socket[bytes]", until: type | None = None, asking: Ping | None = None) -> int:
    """Read what there is, or until a reply of this kind; how many requests were refused for want of room."""
    refused = 0
    if asking is not None:
        socket.send(encode(asking))
    while True:
        try:
            frames = socket.recv_multipart(0 if until is not None else zmq.NOBLOCK)
        except zmq.Again:
            return refused
        reply = decode_reply(frames[0])
        refused += isinstance(reply, Failed) and reply.code == "queue_full"
        if until is not None and isinstance(reply, until):
            return refused


async def ping(endpoint: str) -> None:
    """A line starts it, the next one ends it -> milliseconds of each ping, fifty a second."""
    async with AsyncClient(endpoint) as client:
        await _ready(client)
        while await _order():
            until, times_ms = asyncio.ensure_future(_order()), []
            while not until.done():
                started_s = time.perf_counter()
                await client.ping()
                times_ms.append(1e3 * (time.perf_counter() - started_s))
                await asyncio.sleep(_PING_EVERY_S)
            _answer(times_ms)


async def _ready(client: AsyncClient) -> None:
    await client.ping()
    _answer("ready")


async def _order() -> dict[str, Any] | None:
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return json.loads(line) if line else None


def _answer(document: Any) -> None:
    print(json.dumps(document), flush=True)


_WHAT: dict[str, Any] = {
    work.__name__: work for work in (latency, throughput, blocking, raw, raw_server, flood, ping)
}


def main() -> None:
    """The command."""
    work, *arguments = sys.argv[1:]
    done = _WHAT[work](*arguments)
    if done is not None:
        asyncio.run(done)


if __name__ == "__main__":
    main()
