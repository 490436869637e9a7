"""The clients of `benchmarks.wire`, a process each: `python -m benchmarks.wire_client WHAT ENDPOINT ...`.

Says "ready" once it is connected, works at the line that it is sent, and answers with one line of JSON; until
its standard input ends. No torch here.
"""

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any

import zmq

from understudy import AsyncClient, CapacityError, Client
from understudy.errors import Cancelled

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


async def flood(endpoint: str, model: str) -> None:
    """`{"waiting", "per_s"}`: so many requests wait, then so many come a second, each for an old one.

    Answers when the first ones wait; at the next line ends, and says how many came a second and were refused.
    """
    async with AsyncClient(endpoint) as client:
        await _ready(client)
        while order := await _order():
            line, refused = deque[Any](), 0

            async def add() -> None:
                line.append(await client.submit(model, "", width=8, height=8, steps=1))  # noqa: B023

            for _ in range(order["waiting"]):
                await add()
            await client.ping()
            _answer("waiting")
            until = asyncio.ensure_future(_order())
            started_s, count = time.perf_counter(), 0
            while not until.done():
                await asyncio.sleep(_BURST_S)
                due = int((time.perf_counter() - started_s) * order["per_s"])
                while count < due:
                    line[_ON_DECK].cancel()
                    del line[_ON_DECK]
                    await add()
                    count += 1
            elapsed_s = time.perf_counter() - started_s
            for handle in line:
                handle.cancel()
            refused = sum([await _was_refused(handle) for handle in line])
            _answer({"per_s": count / elapsed_s, "refused": refused})


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


async def _was_refused(handle: Any) -> bool:
    try:
        await handle.result()
    except CapacityError:
        return True
    except Cancelled:
        pass
    return False


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
