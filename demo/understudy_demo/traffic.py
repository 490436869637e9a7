"""Send a workload through the client library, each request at its time, and note what came back."""

import asyncio
import io
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from understudy import AsyncClient
from understudy.errors import UnderstudyError
from understudy.results import Result
from understudy_demo.measure import Served
from understudy_demo.workload import Request


class Generator(Protocol):
    """The part of `AsyncClient` that is used here."""

    async def generate(self, model: str, prompt: str, **options: Any) -> Result: ...


@dataclass(slots=True)
class Traffic:
    """What came back: `images[i]` is the PNG of the request with index i, `failures[i]` why there is none."""

    served: list[Served] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


OnServed = Callable[[Served], None]


async def send(
    endpoint: str, requests: Sequence[Request], on_served: OnServed, *, give_up_s: float = 60.0
) -> Traffic:
    """Send the requests as the workload says, with one connection a client."""
    async with AsyncExitStack() as stack:
        numbers = {request.client for request in requests}
        clients = {
            number: await stack.enter_async_context(AsyncClient(endpoint, reconnect_s=give_up_s))
            for number in numbers
        }
        return await send_through(clients, requests, on_served)


async def send_through(
    clients: dict[int, Any], requests: Sequence[Request], on_served: OnServed = lambda served: None
) -> Traffic:
    """The same over clients that are there already, by their number."""
    traffic = Traffic()
    origin_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(_one(clients[request.client], request, origin_s, traffic, on_served))
    return traffic


async def _one(
    client: Generator, request: Request, origin_s: float, traffic: Traffic, on_served: OnServed
) -> None:
    await asyncio.sleep(max(0.0, origin_s + request.at_s - time.monotonic()))
    sent_s = time.monotonic()
    try:
        result = await ask(client, request)
    except UnderstudyError as error:
        traffic.failures[request.index] = f"{error.code}: {error}"
        return
    served = Served(request.index, request.model, result.tier, sent_s, ended_s=time.monotonic())
    traffic.served.append(served)
    traffic.images[request.index] = result.images[0]
    on_served(served)


async def ask(client: Generator, request: Request) -> Result:
    """One request of a workload. Raises `UnderstudyError`."""
    return await client.generate(
        request.model,
        request.prompt,
        seed=request.seed,
        steps=request.steps,
        width=request.width,
        height=request.height,
        guidance=request.guidance,
    )


def pixels(png: bytes) -> bytes:
    """The raw RGB rows of a PNG: what is compared, since two encoders may write one image differently."""
    with Image.open(io.BytesIO(png)) as image:
        return bytes(image.convert("RGB").tobytes())
