"""A runtime between hand-made stores and fakes: the core is real, the test plays loaders and stage."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.wire import Adapter, Failed, Generate, ImageInfo, Reply, Timings
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import ErrorCode, ModelInfo
from understudyd.shell.runtime import Runtime
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan
from understudyd.store.records import BlobRecord
from understudyd.store.store import Store
from understudyd.store.union import StoreUnion

ARENA_BYTES = 1 << 20
TOOK = Timings(queued_s=0.0, switch_s=0.0, run_s=1.0, encode_s=0.0, total_s=1.0)


class ScriptedMachine(Machine):
    """Remembers events; hands out the actions in `next` behind its own, an event each."""

    def __init__(self) -> None:
        super().__init__(ARENA_BYTES)
        self.events: list[ev.Event] = []
        self.next: deque[ac.Action] = deque()

    def handle(self, event: ev.Event, now_s: float, *, may_wait: bool = False) -> list[ac.Action]:
        self.events.append(event)
        actions = super().handle(event, now_s, may_wait=may_wait)
        return [*actions, self.next.popleft()] if self.next else actions


@dataclass
class FakePool:
    loads: list[tuple[ac.StartLoad, str, Path]] = field(default_factory=list)

    def start_load(self, order: ac.StartLoad, label: str, path: Path, blob: BlobRecord) -> None:
        self.loads.append((order, label, path))

    def pause_loads(self, is_paused: bool) -> None: ...

    def cancel_load(self, load_id: int) -> None: ...


@dataclass(frozen=True)
class FakeResult:
    images: Sequence[bytes] = (b"image",)
    infos: Sequence[ImageInfo] = (ImageInfo(format="png", width=8, height=8),)
    timings: Timings = TOOK
    switched: bool = True


@dataclass
class FakeStage:
    """`calls` are (method, arguments)."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def prepare_model(self, name: str) -> None:
        self.calls.append(("prepare_model", name))

    def prepare_derived(self, key: str, base_key: str, overlays: Mapping[str, OverlaidComponent]) -> None:
        self.calls.append(("prepare_derived", key, base_key, dict(overlays)))

    def forget_model(self, name: str) -> None:
        self.calls.append(("forget_model", name))

    def fold(
        self,
        overlay: str,
        generation: int,
        offset: int,
        plan: OverlayPlan,
        sources: Sequence[tuple[str, int]],
    ) -> None:
        self.calls.append(("fold", overlay, generation, offset, plan, sources))

    def cancel_fold(self, overlay: str, generation: int) -> None:
        self.calls.append(("cancel_fold", overlay, generation))

    def build_views(self, blob: str, offset: int, generation: int) -> None:
        self.calls.append(("build_views", blob))

    def drop_views(self, blob: str, generation: int) -> None: ...

    def move_extent(
        self, blob: str, offset: int, to_offset: int, size_bytes: int, generation: int
    ) -> None: ...

    def put_on_deck(
        self, request_id: str, model: str, request: Generate, payload: Sequence[bytes], companions: Any
    ) -> None:
        self.calls.append(("put_on_deck", request_id, model))

    def cancel_run(self, request_id: str, code: ErrorCode) -> None: ...

    def take_result(self, request_id: str, received_at_s: float) -> FakeResult:
        return FakeResult()

    def tasks(self, name: str) -> list[str]:
        return []

    def strays(self) -> list[str]:
        return []

    def named(self, method: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == method]


class Shell:
    """`replies` are what clients were told, in order."""

    def __init__(self, own: Store, *read_only: Store, **options: Any) -> None:
        self.machine = ScriptedMachine()
        self.stage = FakeStage()
        self.pool = FakePool()
        self.replies: list[Reply] = []
        self.runtime = Runtime(
            self.machine,
            StoreUnion(own, read_only),
            asyncio.get_running_loop(),
            on_defect=lambda error: None,
            **options,
        )
        self.runtime.attach_pool(self.pool)
        self.runtime.attach_replies(self)
        self.keeper = self.runtime.keeper
        self.adapters = self.keeper.adapters

    def send(self, client: str, reply: Reply, payload: Sequence[bytes] = ()) -> None:
        self.replies.append(reply)

    def ask(self, request_id: str, model: str, *adapters: tuple[str, float]) -> None:
        wish = Generate(id=request_id, model=model, seed=1, adapters=tuple(Adapter(*a) for a in adapters))
        self.runtime.submit("ann", wish)

    def failures(self) -> dict[str, str]:
        return {reply.id: reply.code for reply in self.replies if isinstance(reply, Failed)}

    def failure(self, request_id: str) -> Failed:
        return next(r for r in self.replies if isinstance(r, Failed) and r.id == request_id)

    def added(self) -> list[ModelInfo]:
        """The derived models that the core was told of."""
        return [e.model for e in self.machine.events if isinstance(e, ev.ModelAdded) and e.model.is_derived]

    def told(self, *kinds: type) -> list[str]:
        """Events of these kinds and what they are about, in order, derived models only."""
        told = []
        for event in self.machine.events:
            if isinstance(event, kinds):
                name = event.model.key if isinstance(event, ev.ModelAdded | ev.ModelReplaced) else event.name
                told.append(f"{type(event).__name__} {name}")
        return told

    def prepared(self, key: str) -> None:
        """The stage reports, as from its own thread."""
        if (verified := self.keeper.verified(ev.ModelPrepared(key))) is not None:
            self.runtime.handle(verified)


def play(work: Callable[[], Awaitable[None]]) -> None:
    """Run one test's coroutine within 20 s."""
    asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]


async def until(is_true: Callable[[], bool]) -> None:
    """Let other tasks run until it is true."""
    async with asyncio.timeout(15):
        while not is_true():
            await asyncio.sleep(0)
