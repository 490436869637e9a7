"""Requests with images, and many requests at once, over a real front end."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from understudy import (
    Accepted,
    AsyncClient,
    CallerError,
    Client,
    Request,
    Result,
    UnderstudyError,
    UnknownModel,
)
from understudy.session import Patience
from understudy.wire import Failed, Generate, InputInfo
from wire_kit import FakeSink, accepts, finished, image_of, ipc, serving

ROWS = bytes(range(96))
RAW = InputInfo(name="image", format="raw", width=8, height=4, channels=3)


class Picture:
    """Looks like a Pillow image: the client asks for no more than this."""

    mode, size, info = "RGB", (8, 4), {}

    def convert(self, mode: str) -> "Picture":
        raise AssertionError(mode)

    def tobytes(self) -> bytes:
        return ROWS


def test_an_image_options_and_task_arrive(tmp_path: Path) -> None:
    with serving(ipc(tmp_path)) as served, Client(served.endpoint) as client:
        result = client.generate(
            "sd15-red",
            image=Picture(),
            options={"strength": 0.5},
            task="image-to-image",
            scheduler="DDIMScheduler",
            format="jpeg",
            quality=70,
            size=(64, 32),
        )
        wish = served.sink.submitted[0][1]
        assert (wish.inputs, served.sink.payloads) == ((RAW,), [(ROWS,)])
        assert (wish.prompt, wish.options, wish.task) == ("", {"strength": 0.5}, "image-to-image")
        assert (wish.scheduler, wish.format, wish.quality) == ("DDIMScheduler", "jpeg", 70)
        assert (wish.width, wish.height) == (64, 32)
        assert result.images == [image_of(wish)]


def test_images_are_sent_again_to_the_next_daemon(tmp_path: Path) -> None:
    quick = Patience(heartbeat_s=0.05, silence_s=0.2, reconnect_s=10, refresh_s=1.0)
    with Client(ipc(tmp_path), patience=quick) as client:
        with serving(ipc(tmp_path), FakeSink(accepts), daemon_id="first") as first:
            handle = client.submit("sd15-red", image=Picture())
            first.sink.wait_for(lambda sink: bool(sink.submitted))
            assert client.ping().daemon == "first"
        with serving(ipc(tmp_path), daemon_id="second") as second:
            assert handle.result().images
            assert second.sink.payloads == [(ROWS,)]


def test_a_handle_is_iterated(tmp_path: Path) -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            kinds = [type(event) async for event in await client.submit("sd15-red", "x", steps=1)]
            assert kinds[0] is Accepted and kinds[-1] is Result

    with serving(ipc(tmp_path)) as served:
        asyncio.run(main(served.endpoint))
        with Client(served.endpoint) as client:
            assert isinstance(list(client.submit("sd15-red", "x"))[-1], Result)


class Held:
    """A sink's script that answers nothing by itself; `answer` answers one of those that wait."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[str, Generate]] = {}
        self.most = 0

    def __call__(self, sink: FakeSink, client: str, wish: Generate) -> None:
        self.waiting[wish.seed] = (client, wish)
        self.most = max(self.most, len(self.waiting))

    def answer(self, sink: FakeSink, seed: int) -> None:
        client, wish = self.waiting.pop(seed)
        sink.reply(client, *finished(wish))


def seeds(count: int) -> Iterator[Request]:
    for seed in range(count):
        yield Request(model="sd15-red", prompt="x", seed=seed, request_id=f"r{seed}")


def test_results_come_as_they_finish_and_no_more_than_asked_for_are_open(tmp_path: Path) -> None:
    held = Held()
    with serving(ipc(tmp_path), FakeSink(held)) as served, Client(served.endpoint) as client:
        results = client.generate_many(seeds(6), in_flight=3)
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.extend(results))
        reader.start()
        for seed, sent in ((2, 3), (0, 4), (3, 5), (1, 6), (5, 6), (4, 6)):
            served.sink.wait_for(lambda sink, sent=sent: len(sink.submitted) == sent)
            served.call(lambda seed=seed: held.answer(served.sink, seed))
        reader.join(15)
        assert sorted(result.seed for result in got) == list(range(6))
        assert held.most == 3 and {result.id for result in got} == {f"r{seed}" for seed in range(6)}


def test_results_in_order(tmp_path: Path) -> None:
    held = Held()
    with serving(ipc(tmp_path), FakeSink(held)) as served, Client(served.endpoint) as client:
        results = client.generate_many(list(seeds(3)), ordered=True)
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.extend(results))
        reader.start()
        served.sink.wait_for(lambda sink: len(sink.submitted) == 3)
        for seed in (2, 1, 0):
            served.call(lambda seed=seed: held.answer(served.sink, seed))
        reader.join(15)
        assert [result.seed for result in got] == [0, 1, 2]


def no_blue(sink: FakeSink, client: str, wish: Generate) -> None:
    if wish.model == "blue":
        sink.reply(client, Failed(id=wish.id, code="unknown_model", message="did you mean 'blues'?"))
    else:
        sink.finish(client, wish)


MIXED: list[Any] = [
    ("red", "x"),
    {"model": "blue", "prompt": "x", "request_id": "b"},
    {"model": "red", "stpes": 3, "request_id": "c"},
    ("red", "y"),
]


def test_errors_take_the_place_of_results_or_end_it(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(no_blue)) as served, Client(served.endpoint) as client:
        one, unknown, typo, four = client.generate_many(MIXED, ordered=True, return_errors=True)
        assert isinstance(one, Result) and isinstance(four, Result)
        assert isinstance(unknown, UnknownModel) and "did you mean" in str(unknown)
        assert isinstance(typo, CallerError) and "did you mean 'steps'" in str(typo)
        assert (unknown.request_id, typo.request_id) == ("b", "c")
        with pytest.raises(UnknownModel):
            list(client.generate_many(MIXED, ordered=True))
        assert client.generate("red", "x").images


def test_leaving_early_cancels_the_rest(tmp_path: Path) -> None:
    held = Held()
    with serving(ipc(tmp_path), FakeSink(held)) as served, Client(served.endpoint) as client:
        results = client.generate_many(seeds(9), in_flight=4)
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(next(results)))
        reader.start()
        served.sink.wait_for(lambda sink: len(sink.submitted) == 4)
        served.call(lambda: held.answer(served.sink, 1))
        reader.join(15)
        results.close()
        served.sink.wait_for(lambda sink: len(sink.cancelled) == 3)
        assert sorted(request_id for _, request_id in served.sink.cancelled) == ["r0", "r2", "r3"]


def test_many_from_asyncio(tmp_path: Path) -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            got = [result.seed async for result in client.generate_many(seeds(40), in_flight=7, ordered=True)]
            assert got == list(range(40))
            got = [result.seed async for result in client.generate_many(seeds(40), in_flight=7)]
            assert sorted(got) == list(range(40))
            errors = [e async for e in client.generate_many(MIXED, return_errors=True)]
            assert sum(isinstance(error, UnderstudyError) for error in errors) == 2
            with pytest.raises(CallerError, match="at least 1"):
                await anext(client.generate_many(seeds(1), in_flight=0))

    with serving(ipc(tmp_path), FakeSink(no_blue)) as served:
        asyncio.run(main(served.endpoint))


def test_leaving_early_cancels_the_rest_in_asyncio(tmp_path: Path) -> None:
    held = Held()

    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            results = client.generate_many(seeds(9), in_flight=4)
            first = asyncio.ensure_future(anext(results))
            await asyncio.to_thread(served.sink.wait_for, lambda sink: len(sink.submitted) == 4)
            served.loop.call_soon_threadsafe(held.answer, served.sink, 2)
            assert (await first).id == "r2"
            await results.aclose()
            await asyncio.to_thread(served.sink.wait_for, lambda sink: len(sink.cancelled) == 3)

    with serving(ipc(tmp_path), FakeSink(held)) as served:
        asyncio.run(main(served.endpoint))
