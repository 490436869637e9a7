"""Traffic through a scripted client, and the benchmark's bookkeeping of what came back."""

import asyncio
import io
from hashlib import sha256
from typing import Any

import pytest
from benchmarks.serve import sum_up
from benchmarks.serve_client import Answer, Ask, Asks, ask_all
from benchmarks.serve_scene import QUICK, wish, workload
from PIL import Image

from understudy.errors import CapacityError, TransportError
from understudy.results import Result
from understudy.trace import Span
from understudy.wire import ImageInfo, Timings
from understudy_demo import traffic
from understudy_demo.workload import Request

RED = bytes([255, 0, 0]) * 64


def png() -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (8, 8), RED).save(out, "png")
    return out.getvalue()


class ScriptedClient:
    """Answers with a red square; `errors` are raised for a model's requests instead."""

    def __init__(self, **errors: Exception) -> None:
        self.errors = errors
        self.seen: list[str] = []
        self.most_open = 0
        self._open = 0

    async def generate(self, model: str, prompt: str, **options: Any) -> Result:
        self.seen.append(model)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        for _ in range(3):
            await asyncio.sleep(0)
        self._open -= 1
        if model in self.errors:
            raise self.errors[model]
        data = RED if options.get("format") == "raw" else png()
        return Result(
            id="1", model=model, seed=options["seed"], images=[data],
            infos=(ImageInfo(format="png", width=8, height=8),),
            timings=Timings(queued_s=0, switch_s=0, run_s=0.1, encode_s=0, total_s=0.1),
            tier="resident", switched=True,
        )  # fmt: skip


def request(index: int, model: str, client: int = 0) -> Request:
    return Request(index, client, model, "a prompt", 7, 1, 8, 8, 0.0)


def test_every_request_is_an_image_or_a_failure() -> None:
    client = ScriptedClient(bad=CapacityError("the queue is full", code="queue_full"))
    told: list[int] = []
    asked = [request(0, "a"), request(1, "bad"), request(2, "a")]
    got = asyncio.run(traffic.send_through({0: client}, asked, lambda one: told.append(one.index)))
    assert sorted(told) == sorted(got.images) == [0, 2]
    assert got.failures == {1: "queue_full: the queue is full"}
    assert traffic.pixels(got.images[0]) == RED
    assert {one.tier for one in got.served} == {"resident"}


def test_a_client_process_keeps_so_many_outstanding_and_no_more() -> None:
    client = ScriptedClient(bad=CapacityError("full"), gone=TransportError("gone"))
    models = ["a"] * 8 + ["bad", "gone"]
    asks = tuple(Ask(index=i, model=m, prompt="p", seed=1, steps=1, size=8) for i, m in enumerate(models))
    answers: list[Answer] = []
    asyncio.run(ask_all(client, Asks(outstanding=3, asks=asks), answers))
    assert client.most_open == 3
    assert sorted(answer.index for answer in answers) == list(range(10))
    assert [a.outcome for a in sorted(answers, key=lambda a: a.index)][7:] == ["image", "error", "none"]
    assert answers[0].sha256 == sha256(RED).hexdigest()


def answer(index: int, **changes: Any) -> Answer:
    fields = {"outcome": "image", "model": "a", "sent_s": 0.0, "ended_s": 1.0, "sha256": "right"}
    return Answer(index=index, **fields | changes)


def test_lost_and_wrong_images_are_counted() -> None:
    requests = [request(i, "a") for i in range(6)]
    answers = [
        answer(0),
        answer(1, sha256="wrong"),
        answer(2, outcome="none", message="no_answer: gone"),
        answer(3, outcome="error", message="queue_full: full"),
        answer(4),
        answer(4),  # twice
    ]
    stage = [Span("stage", "a", i, i + 1.0) for i in range(4)]
    load = Span("loader 0", "a unet", 0.5, 0.75)
    rounds = [answers[:3], answers[3:]]
    run = sum_up(requests, {wish(requests[0]): "right"}, rounds, rounds[1:], [*stage, load])
    assert run.completed == 4
    assert run.wrong == 1
    assert run.lost == 3, "no answer, two answers, never heard of"
    assert run.load_ms == pytest.approx(250)
    assert run.throughput_per_s == 2.0, "of the shared rounds"


def test_the_benchmark_needs_few_references() -> None:
    requests = workload(QUICK, [f"m-{i}" for i in range(QUICK.models)])
    assert len(requests) == QUICK.requests
    assert len({wish(r) for r in requests}) <= 2 * QUICK.models
