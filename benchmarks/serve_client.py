"""One client process of `benchmarks.serve`: `python -m benchmarks.serve_client ENDPOINT REQUESTS ANSWERS`.

Keeps a fixed number of requests outstanding on one connection. Says "ready" once the daemon answers a ping,
starts at the line "go" on its standard input, writes one `Answer` a line to ANSWERS. No torch here.
"""

import asyncio
import contextlib
import hashlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from understudy import AsyncClient
from understudy.errors import TransportError, UnderstudyError


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the workload. `adapters` are names and scales."""

    index: int
    model: str
    prompt: str
    seed: int
    steps: int
    size: int
    adapters: tuple[tuple[str, float], ...] = ()


class Asks(msgspec.Struct, frozen=True, kw_only=True):
    """A client's whole work; `outstanding` requests at a time."""

    outstanding: int
    asks: tuple[Ask, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back for a request. `outcome` is "image", "error" (typed, from the daemon) or "none"."""

    index: int
    outcome: str
    model: str
    sent_s: float
    ended_s: float
    sha256: str = ""
    tier: str = ""
    message: str = ""


async def ask_one(client: Any, ask: Ask) -> Answer:
    """Send, wait, note. Raw pixels are asked for, so that their hash is the picture's."""
    sent_s = time.monotonic()
    try:
        result = await client.generate(
            ask.model,
            ask.prompt,
            seed=ask.seed,
            steps=ask.steps,
            width=ask.size,
            height=ask.size,
            format="raw",
            adapters=ask.adapters,
        )
    except UnderstudyError as error:
        outcome = "none" if isinstance(error, TransportError) else "error"
        return Answer(index=ask.index, outcome=outcome, model=ask.model, sent_s=sent_s,
                      ended_s=time.monotonic(), message=f"{error.code}: {error}")  # fmt: skip
    return Answer(
        index=ask.index,
        outcome="image",
        model=result.model,
        sent_s=sent_s,
        ended_s=time.monotonic(),
        sha256=hashlib.sha256(b"".join(result.images)).hexdigest(),
        tier=result.tier,
    )


async def ask_all(client: Any, work: Asks, answers: list[Answer]) -> None:
    """`outstanding` workers take turns at the list, in its order; each answer is appended as it comes."""
    left: Iterable[Ask] = iter(work.asks)

    async def worker() -> None:
        for ask in left:
            answers.append(await ask_one(client, ask))

    async with asyncio.TaskGroup() as group:
        for _ in range(work.outstanding):
            group.create_task(worker())


async def run(endpoint: str, work: Asks, answers: list[Answer]) -> None:
    """Connect, report, wait for the start, work."""
    async with AsyncClient(endpoint, reconnect_s=60.0) as client:
        await client.ping()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await ask_all(client, work, answers)


def main() -> None:
    endpoint, asks_path, answers_path = sys.argv[1:]
    work = msgspec.json.decode(Path(asks_path).read_bytes(), type=Asks)
    answers: list[Answer] = []
    with contextlib.suppress(KeyboardInterrupt):  # the benchmark's patience is over: say what there is
        asyncio.run(run(endpoint, work, answers))
    Path(answers_path).write_bytes(msgspec.json.encode(answers))


if __name__ == "__main__":
    main()
