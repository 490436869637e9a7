"""Models of one architecture, brought into one arena by real loaders, and a real stage over them."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any
from unittest import mock

from torch import nn

from benchmarks.gpu.bench import GIB, Bench
from benchmarks.loaders import Source
from understudy.trace import Span
from understudyd.core.events import (
    Event,
    ImagesEncoded,
    LeaseEnded,
    ModelPrepared,
    RunEnded,
    RunStarted,
    ViewsBuilt,
)
from understudyd.core.types import Outcome
from understudyd.shell.memory import Arena
from understudyd.stage import stage as stage_module
from understudyd.stage.device import Device
from understudyd.stage.run import RunParams, RunResult
from understudyd.stage.stage import Stage
from understudyd.store.store import Store

PROMPT = "a red circle on a white ground"
RESERVE_BYTES = 6 * GIB  # two loaders' contexts, and what an image needs beside weights
_EVENT_TIMEOUT_S = 120.0


class Theatre:
    """The stage and its events. `models` are "<kind>-a" and so on; `spans` is what it recorded."""

    def __init__(
        self, arena: Arena, store: Store, models: Sequence[str], device: str, compile_backend: str | None
    ) -> None:
        self.arena = arena
        self.models = tuple(models)
        self.spans: list[Span] = []
        self._ids = (f"run-{number}" for number in itertools.count())
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._seen: set[Event] = set()
        self.stage = Stage(
            arena.tensor(),
            store,
            device=device,
            emit=self._events.put,
            record=self.spans.append,
            compile_backend=compile_backend,
        )

    def open(self, places: dict[str, int]) -> None:
        """The blobs lie at these offsets: build their views, prepare the models."""
        for blob, offset in places.items():
            self.stage.build_views(blob, offset, 1)
            self._wait(ViewsBuilt(blob, 1))
        for name in self.models:
            self.stage.prepare_model(name)
            self._wait(ModelPrepared(name))

    def module(self, class_name: str) -> nn.Module:
        """The one skeleton's module of this class."""
        return self.skeleton(class_name).module

    def skeleton(self, class_name: str) -> Any:
        """The one skeleton of this class."""
        return next(s for s in self.stage.skeletons() if s.signature.class_name == class_name)

    def play(self, models: Sequence[str], *, seed: int = 1, steps: int = 2) -> list[RunResult]:
        """One image of each, the next one always waiting; every lease has ended when this returns."""
        runs = [(next(self._ids), model) for model in models]
        for request_id, model in runs:
            params = RunParams(prompt=PROMPT, seed=seed, steps=steps, format="raw")
            self.stage.put_on_deck(request_id, model, params)
            self._wait(RunStarted(request_id))
        for request_id, _ in runs:
            self._wait(ImagesEncoded(request_id))
            self._wait(LeaseEnded(request_id))
        return [self.stage.take_result(request_id) for request_id, _ in runs]

    def _wait(self, event: Event) -> None:
        while event not in self._seen:
            seen = self._events.get(timeout=_EVENT_TIMEOUT_S)
            self._seen.add(seen)
            if isinstance(seen, RunEnded) and seen.outcome is not Outcome.FINISHED:
                raise RuntimeError(f"a request ended with {seen}")


@contextlib.contextmanager
def theatre(
    bench: Bench,
    kind: str,
    *,
    extra_bytes: int = 0,
    device: Device | None = None,
    letters: str = "ab",
    compile_backend: str | None = None,
) -> Iterator[Theatre]:
    """Open it; behind the models `extra_bytes` of the arena are left. `device` replaces the stage's own."""
    store = bench.store()
    models = [f"{kind}-{letter}" for letter in letters]
    records = [store.model(name) for name in models]
    blobs = {c.blob.sha256: c.blob for record in records for c in record.components}
    ends = itertools.accumulate((blob.size_bytes for blob in blobs.values()), initial=0)
    places = dict(zip(blobs, ends))
    size_bytes = sum(blob.size_bytes for blob in blobs.values()) + extra_bytes
    bench.need(size_bytes + RESERVE_BYTES)
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(bench.arena(size_bytes))
        with bench.loaders(arena, count=2) as loaders:
            loaders.load(
                [Source(store.blob_path(sha256), blob).at(places[sha256]) for sha256, blob in blobs.items()]
            )
        if device is not None:
            stack.enter_context(mock.patch.object(stage_module, "open_device", lambda name: device))
        opened = Theatre(arena, store, models, bench.device, compile_backend)
        stack.callback(opened.stage.close)
        opened.open(places)
        yield opened
