"""What the simulator decides is what the daemon decides: one workload through both, every decision compared.

The daemon's side is its real `Runtime`, on a loop whose time is virtual, with a loader and a stage that take
as long as the simulator's costs say. Those are written anew here, after the ports' documentation.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from simulate_kit import MB, profile
from understudy.wire import Generate, Timings
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.core.types import Outcome
from understudyd.recorded import TraceRequest
from understudyd.shell.model_settings import ModelSetting
from understudyd.shell.ports import LoadRunner, StageDoor
from understudyd.shell.runtime import Runtime
from understudyd.simulate import synthetic
from understudyd.simulate.world import World
from understudyd.store.records import BlobRecord, ComponentRecord, ModelRecord, SignatureRecord
from understudyd.store.store import Store
from understudyd.store.union import FoundModel, StoreUnion

COSTS = profile(
    step_s=0.0313, bind_s=0.00091, image_s=0.0071, request_s=0.0113, bus_bytes_per_s=997.0 * MB,
    loader_bytes_per_s=997.0 * MB, disk_bytes_per_s=211.0 * MB, load_s=0.0023, views_s=0.0031,
    prepare_s=0.2917, encode_s=0.0173,
)  # fmt: skip
START_S = 3600.0


class VirtualLoop:
    """As much of an event loop as the runtime uses; time passes when nothing is left to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._agenda: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def call_later(self, after_s: float, callback: Callable[..., None], *args: Any) -> "Timer":
        timer = Timer(callback, args)
        heapq.heappush(self._agenda, (self.now_s + after_s, next(self._order), timer))
        return timer

    def run(self) -> None:
        while self._agenda:
            self.now_s, _, timer = heapq.heappop(self._agenda)
            if not timer.is_cancelled:
                timer.callback(*timer.args)


@dataclass
class Timer:
    callback: Callable[..., None]
    args: tuple[Any, ...]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class OneLoader:
    """`LoadRunner` with one loader, which has disk and bus for itself."""

    loop: VirtualLoop
    decisions: list[str]
    emit: Callable[[ev.Event], None] = print
    timer: Timer | None = None

    def start_load(self, order: ac.StartLoad, label: str, path: Path, blob: BlobRecord) -> None:
        place = "host" if order.offset is None else "arena"
        self.decisions.append(f"load {order.blob} to {place}{' from host' if order.from_pool else ''}")
        rate = COSTS.bus_bytes_per_s if order.from_pool else COSTS.disk_bytes_per_s
        took_s = order.size_bytes / rate.value
        self.timer = self.loop.call_later(took_s, self._arrived, order.load_id)

    def _arrived(self, load_id: int) -> None:
        self.timer = None
        self.loop.call_later(COSTS.load_s.value, self.emit, ev.LoadFinished(load_id))

    def pause_loads(self, is_paused: bool) -> None:
        raise AssertionError("no request is critical")

    def cancel_load(self, load_id: int) -> None:
        self.decisions.append("cancel a load")
        if self.timer is not None:
            self.timer.cancel()
            self.loop.call_later(
                (4 << 20) / COSTS.disk_bytes_per_s.value, self.emit, ev.LoadCancelled(load_id)
            )


@dataclass
class TimedStage:
    """`StageDoor` with one run on stage and one on deck."""

    loop: VirtualLoop
    decisions: list[str]
    emit: Callable[[ev.Event], None] = print
    deck: tuple[str, dict[str, Generate]] | None = None
    is_busy: bool = False
    last: str = ""
    images: dict[str, int] = field(default_factory=dict)

    def prepare_model(self, name: str) -> None:
        self.decisions.append(f"prepare {name}")
        self.loop.call_later(COSTS.prepare_s.value, self.emit, ev.ModelPrepared(name))

    def build_views(self, blob: str, offset: int, generation: int) -> None:
        self.loop.call_later(COSTS.views_s.value, self.emit, ev.ViewsBuilt(blob, generation))

    def drop_views(self, blob: str, generation: int) -> None:
        self.decisions.append(f"evict {blob}")

    def put_on_deck(
        self,
        request_id: str,
        model: str,
        request: Generate,
        payload: Sequence[bytes],
        companions: Mapping[str, Generate],
    ) -> None:
        batch = {request_id: request, **companions}
        self.decisions.append(f"deck {'+'.join(r.id for r in batch.values())} {model}")
        self.deck = (model, batch)
        self._change_over()

    def _change_over(self) -> None:
        if self.is_busy or self.deck is None:
            return
        (model, batch), self.deck, self.is_busy = self.deck, None, True
        bind_s = 0.0 if model == self.last else COSTS.bind_s.value
        self.last = model
        images = sum(request.images for request in batch.values())
        all_images_s = sum(
            request.images * (request.steps * COSTS.step_s.value + COSTS.image_s.value)
            for request in batch.values()
        )
        if len(batch) > 1:
            fixed = COSTS.batch_fixed_share.value
            all_images_s *= fixed / images + 1.0 - fixed
        for request_id in batch:
            self.loop.call_later(bind_s, self.emit, ev.RunStarted(request_id))
        self.loop.call_later(bind_s + COSTS.request_s.value + all_images_s, self._end, batch)

    def _end(self, batch: dict[str, Generate]) -> None:
        *others, last = batch
        for request_id in others:
            self.emit(ev.RunEnded(request_id, Outcome.FINISHED))
        self.is_busy = False
        self.emit(ev.RunEnded(last, Outcome.FINISHED))
        encoded_s = 0.0
        for request_id, request in batch.items():
            encoded_s += COSTS.encode_s.value * request.images
            self.loop.call_later(0.0, self.emit, ev.LeaseEnded(request_id))
            self.loop.call_later(encoded_s, self.emit, ev.ImagesEncoded(request_id))
        self._change_over()

    def take_result(self, request_id: str, received_at_s: float) -> "NoImages":
        return NoImages()


class NoImages:
    images, infos, switched = (), (), False
    timings = Timings(queued_s=0.0, switch_s=0.0, run_s=0.0, encode_s=0.0, total_s=0.0, bind_s=0.0, gap_s=0.0)


class NoFiles:
    """The only store, as far as a load asks for it."""

    def __init__(self) -> None:
        self.own = self

    def signature(self, signature_id: str) -> SignatureRecord:
        raise AssertionError("the stage is not real")

    def blob_path(self, key: str) -> Path:
        return Path(key)


def record(name: str) -> ModelRecord:
    blobs = [
        BlobRecord(sha256=b.key, data_start_bytes=0, size_bytes=b.size_bytes, chunk_bytes=1, xxh3=())
        for b in COSTS.model(name).blobs
    ]
    parts = tuple(ComponentRecord(name="unet", signature="s", blob=blob) for blob in blobs)
    return ModelRecord(name=name, pipeline_class="Pipeline", components=parts, parts=())


def machine(room: int, in_host: int) -> Machine:
    pool_bytes = COSTS.bytes_of(in_host) if in_host else 0
    settings = PolicySettings(max_wait_s=5.0, max_skips=9, lookahead=2)
    return Machine(COSTS.bytes_of(room), pool_bytes=pool_bytes, policy=settings, max_waiting=10_000)


async def by_the_daemon(requests: list[TraceRequest], room: int, in_host: int, max_batch: int) -> list[str]:
    """Through the runtime."""
    loop, decisions = VirtualLoop(), list[str]()
    files = NoFiles()
    runtime = Runtime(
        machine(room, in_host),
        cast(StoreUnion, files),
        cast(asyncio.AbstractEventLoop, loop),
        on_defect=lambda error: pytest.fail(repr(error)),
        clock=lambda: loop.now_s,
    )
    pool, stage = OneLoader(loop, decisions, runtime.emit), TimedStage(loop, decisions, runtime.emit)
    runtime.attach_pool(cast(LoadRunner, pool))
    runtime.attach_stage(cast(StageDoor, stage))
    runtime.emit(ev.LoaderReady(0))
    for name in dict.fromkeys(r.model for r in requests):
        await runtime.keeper.settings.put(name, ModelSetting(max_batch=max_batch))
        runtime.keeper.add(FoundModel(record(name), cast(Store, files)))
    for i, r in enumerate(requests, 1):
        ask = Generate(id=f"r{i}", model=r.model, prompt="", seed=i, images=r.images, steps=r.steps)
        loop.call_later(START_S + r.arrival_s, runtime.submit, r.client, ask)
    loop.run()
    assert not runtime.pending
    return decisions


def by_the_simulator(requests: list[TraceRequest], room: int, in_host: int, max_batch: int) -> list[str]:
    decisions: list[str] = []

    def watch(at_s: float, action: ac.Action) -> None:
        match action:
            case ac.StartLoad(blob=blob, offset=offset, from_pool=from_pool):
                place = "host" if offset is None else "arena"
                decisions.append(f"load {blob} to {place}{' from host' if from_pool else ''}")
            case ac.DropViews(blob=blob):
                decisions.append(f"evict {blob}")
            case ac.PutOnDeck(request_id=request_id, model=model, companions=companions):
                decisions.append(f"deck {'+'.join((request_id, *companions))} {model}")
            case ac.CancelLoad():
                decisions.append("cancel a load")
            case ac.PrepareModel(which):
                decisions.append(f"prepare {which}")

    world = World(machine(room, in_host), COSTS, loaders=1, max_batch=max_batch, watch=watch)
    world.add_models(dict.fromkeys(r.model for r in requests))
    world.settle(START_S)
    world.play(requests)
    return decisions


@pytest.mark.parametrize(("room", "in_host", "max_batch"), [(3, 0, 1), (4, 8, 1), (2, 30, 1), (4, 8, 8)])
def test_the_daemon_takes_the_same_decisions_in_the_same_order(
    room: int, in_host: int, max_batch: int
) -> None:
    """400 requests at about 85 % of what the stage can do; the bounds on overtaking are reached."""
    made = list(synthetic.generate(400, synthetic.Shape(models=30, seed=7)))
    work_s = sum(COSTS.run_s(request) for request in made)
    compress = 0.85 * made[-1].arrival_s / work_s
    requests = [
        TraceRequest(r.arrival_s / compress, r.model, r.client, images=r.images, steps=r.steps) for r in made
    ]
    simulated = by_the_simulator(requests, room, in_host, max_batch)
    assert simulated == asyncio.run(by_the_daemon(requests, room, in_host, max_batch))
    assert sum(d.startswith("evict") for d in simulated) > 30
    runs = [d.split()[1].split("+") for d in simulated if d.startswith("deck")]
    assert sum(map(len, runs)) == 400
    assert (len(runs) < 390) is (max_batch > 1)
