"""The shell's middle: event -> machine -> perform. Everything here runs on the event loop's thread.

Stage and loader pool emit core events; the front end hands in requests; the machine's actions are
performed in order. Until the stage is attached (torch is imported while the loaders already read), its
actions are kept and performed then.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from understudy.wire import Accepted, Failed, Finished, Generate, ModelEntry, Progress, Timings
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.machine import Machine
from understudyd.core.states import IllegalEvent
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, RequestInfo, Tier
from understudyd.shell.ports import LoadRunner, ReplySink, RunResult, StageDoor
from understudyd.shell.tally import Tally
from understudyd.store.errors import StoreError
from understudyd.store.records import BlobRecord, ModelRecord
from understudyd.store.store import Store

log = logging.getLogger(__name__)

RETRYABLE = frozenset(
    {
        ErrorCode.QUEUE_FULL,
        ErrorCode.DRAINING,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.LOAD_FAILED,
        ErrorCode.INTERNAL,
    }
)

StageAction = (
    ac.BuildViews
    | ac.DropViews
    | ac.MoveExtent
    | ac.PrepareModel
    | ac.ForgetModel
    | ac.PutOnDeck
    | ac.CancelRun
)


class RunFailed(Exception):
    """A request of the daemon's own (warm-up) was not served."""


@dataclass(slots=True)
class _Pending:
    """A request that has no answer yet. `done` is set for the daemon's own requests."""

    client: str
    request: Generate
    received_at_s: float
    tier: Tier = Tier.DISK
    step: int = 0
    steps: int = 0
    done: asyncio.Future[RunResult] | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a blob is on disk, and what to call it in the timeline."""

    record: BlobRecord
    label: str


class Runtime:
    """Performs what the machine decides. Implements `RequestSink` for the front end."""

    def __init__(
        self,
        machine: Machine,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        *,
        on_defect: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.machine = machine
        self.store = store
        self.tally = Tally()
        self.records: dict[str, ModelRecord] = {}
        self.pending: dict[str, _Pending] = {}
        self.store_lock = asyncio.Lock()
        self._loop = loop
        self._clock = clock
        self._on_defect = on_defect
        self._thread = threading.get_ident()
        self._pool: LoadRunner | None = None
        self._stage: StageDoor | None = None
        self._replies: ReplySink | None = None
        self._places: dict[str, _Place] = {}
        self._inbox: deque[ev.Event] = deque()
        self._deferred: list[StageAction] = []
        self._is_handling = False
        self._wake_at_s: float | None = None
        self._waker: asyncio.TimerHandle | None = None
        self._watches: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._retired: dict[str, asyncio.Future[int]] = {}
        self._deletions: set[asyncio.Task[None]] = set()

    # -- wiring -------------------------------------------------------------------------------------

    def attach_pool(self, pool: LoadRunner) -> None:
        """Who performs loads; before the first loader is ready."""
        self._pool = pool

    def attach_replies(self, replies: ReplySink) -> None:
        """Who carries answers to clients; before the first client connects."""
        self._replies = replies

    def attach_stage(self, stage: StageDoor) -> None:
        """The stage is built: perform what it was to do meanwhile."""
        self._stage = stage
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            self._perform_on_stage(stage, action)

    # -- events in ----------------------------------------------------------------------------------

    def emit(self, event: ev.Event) -> None:
        """Give the machine an event; from any thread."""
        if threading.get_ident() == self._thread:
            self.handle(event)
        else:
            self._loop.call_soon_threadsafe(self.handle, event)

    def handle(self, event: ev.Event) -> None:
        """Machine, then actions; events that performing causes are handled after, in order."""
        self._inbox.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._inbox:
                self._handle_one(self._inbox.popleft())
        finally:
            self._is_handling = False
        self._set_waker()
        self._look_at_watches()

    def _handle_one(self, event: ev.Event) -> None:
        try:
            actions = self.machine.handle(event, self._clock())
        except IllegalEvent:
            log.exception("an event that cannot be was ignored: %r", event)
            return
        except BaseException as error:
            self._on_defect(error)
            raise
        for action in actions:
            self._perform(action)

    def _set_waker(self) -> None:
        now_s = self._clock()
        at_s = self.machine.next_deadline_s(now_s)
        if at_s == self._wake_at_s:
            return
        if self._waker is not None:
            self._waker.cancel()
        self._wake_at_s, self._waker = at_s, None
        if at_s is not None:
            self._waker = self._loop.call_later(max(0.0, at_s - now_s) + 0.001, self._wake)

    def _wake(self) -> None:
        self._wake_at_s, self._waker = None, None
        self.handle(ev.Ticked())

    # -- actions out --------------------------------------------------------------------------------

    def _perform(self, action: ac.Action) -> None:
        match action:
            case ac.AcceptRequest(request_id=request_id, position=position, tier=tier):
                pending = self.pending[request_id]
                pending.tier = tier
                if pending.done is None and self._replies is not None:
                    accepted = Accepted(id=pending.request.id, position=position, tier=tier.value)
                    self._replies.send(pending.client, accepted)
            case ac.AnswerRequest(request_id=request_id, code=code, message=message):
                self._answer(request_id, code, message)
            case ac.StartLoad(blob=key):
                assert self._pool is not None
                place = self._places[key]
                self._pool.start_load(action, place.label, self.store.blob_path(key), place.record)
            case ac.CancelLoad(load_id=load_id):
                assert self._pool is not None
                self._pool.cancel_load(load_id)
            case ac.PauseLoads(is_paused=is_paused):
                assert self._pool is not None
                self._pool.pause_loads(is_paused)
            case ac.RetireModel(name=name):
                self._retire(name)
            case _:
                if self._stage is None:
                    self._deferred.append(action)
                else:
                    self._perform_on_stage(self._stage, action)

    def _perform_on_stage(self, stage: StageDoor, action: StageAction) -> None:
        match action:
            case ac.BuildViews(blob=key, offset=offset, generation=generation):
                stage.build_views(key, offset, generation)
            case ac.DropViews(blob=key, generation=generation):
                stage.drop_views(key, generation)
            case ac.MoveExtent(blob=key):
                stage.move_extent(key, action.offset, action.to_offset, action.size_bytes, action.generation)
            case ac.PrepareModel(name=name):
                stage.prepare_model(name)
            case ac.ForgetModel(name=name):
                stage.forget_model(name)
            case ac.PutOnDeck(request_id=request_id, model=model):
                stage.put_on_deck(request_id, model, self.pending[request_id].request)
            case ac.CancelRun(request_id=request_id, code=code):
                stage.cancel_run(request_id, code)
            case _:
                assert_never(action)

    def _answer(self, request_id: str, code: ErrorCode | None, message: str) -> None:
        pending = self.pending.pop(request_id)
        request = pending.request
        if code is None:
            assert self._stage is not None
            result = self._stage.take_result(request_id, pending.received_at_s)
            timings = result.timings
            visible_s = timings.gap_s if result.switched else None
            if pending.done is None:
                self.tally.finished(request.model, self._clock(), visible_s)
                self._send_images(pending, result, timings)
            elif not pending.done.done():
                pending.done.set_result(result)
            return
        if pending.done is not None:
            if not pending.done.done():
                pending.done.set_exception(RunFailed(f"{code.value}: {message}"))
            return
        if code not in (ErrorCode.CANCELLED, ErrorCode.CLIENT_GONE):
            self.tally.failure(code.value, message)
        failed = Failed(id=request.id, code=code.value, message=message, retryable=code in RETRYABLE)
        if self._replies is not None:
            self._replies.send(pending.client, failed)

    def _send_images(self, pending: _Pending, result: RunResult, timings: Timings) -> None:
        finished = Finished(
            id=pending.request.id,
            model=pending.request.model,
            seed=pending.request.seed,
            images=tuple(result.infos),
            timings=timings,
            tier=pending.tier.value,
            switched=result.switched,
        )
        if self._replies is not None:
            self._replies.send(pending.client, finished, result.images)

    # -- RequestSink --------------------------------------------------------------------------------

    def submit(self, client: str, request: Generate) -> None:
        """A client's request; ids are made unique by the client's name."""
        self._submit(f"{client}/{request.id}", _Pending(client, request, self._clock()))

    def cancel(self, client: str, request_id: str) -> None:
        """A client takes its request back."""
        self.handle(ev.RequestCancelled(f"{client}/{request_id}"))

    def client_gone(self, client: str) -> None:
        """Cancel all that the client asked for."""
        self.handle(ev.ClientGone(client))

    def models(self) -> list[ModelEntry]:
        """What may be asked for, by name."""
        return [
            ModelEntry(
                name=view.name,
                pipeline=self.records[view.name].pipeline_class,
                size_bytes=view.size_bytes,
                tier=view.tier.value,
            )
            for view in snapshot.models(self.machine)
            if not self.machine.residency.models[view.name].retiring
        ]

    def progress(self, request_id: str, step: int, steps: int) -> None:
        """The stage reports a step; from any thread."""
        self._loop.call_soon_threadsafe(self._progress, request_id, step, steps)

    def _progress(self, request_id: str, step: int, steps: int) -> None:
        pending = self.pending.get(request_id)
        if pending is None:
            return
        pending.step, pending.steps = step, steps
        if pending.done is None and pending.request.progress and self._replies is not None:
            self._replies.send(pending.client, Progress(id=pending.request.id, step=step, steps=steps))

    # -- the daemon's own requests --------------------------------------------------------------------

    async def run(self, request: Generate) -> RunResult:
        """Run a request of the daemon's own. Raises `RunFailed`."""
        done: asyncio.Future[RunResult] = self._loop.create_future()
        self._submit(f"understudyd/{request.id}", _Pending("understudyd", request, self._clock(), done=done))
        return await done

    def _submit(self, request_id: str, pending: _Pending) -> None:
        request = pending.request
        deadline = request.deadline_s
        info = RequestInfo(
            request_id=request_id,
            client=pending.client,
            model=request.model,
            priority=request.priority,
            deadline_at_s=pending.received_at_s + deadline if deadline is not None else None,
        )
        self.pending[request_id] = pending
        self.handle(ev.RequestReceived(info))

    # -- models -------------------------------------------------------------------------------------

    def add_model(self, record: ModelRecord) -> None:
        """The store has this model: it may be asked for from now on."""
        self.records[record.name] = record
        for component in record.components:
            label = f"{record.name} {component.name}"
            self._places.setdefault(component.blob.sha256, _Place(component.blob, label))
        blobs = tuple(BlobInfo(c.blob.sha256, c.blob.size_bytes) for c in record.components)
        self.handle(ev.ModelAdded(ModelInfo(record.name, blobs)))

    async def remove_model(self, name: str) -> int:
        """Stop serving a model, delete it when its last user is gone; returns freed bytes on disk."""
        retired: asyncio.Future[int] = self._loop.create_future()
        self._retired[name] = retired
        self.handle(ev.ModelRemoved(name))
        return await retired

    def _retire(self, name: str) -> None:
        record = self.records.pop(name)
        for component in record.components:
            if component.blob.sha256 not in self.machine.residency.blobs:
                self._places.pop(component.blob.sha256, None)
        task = self._loop.create_task(self._delete(name))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _delete(self, name: str) -> None:
        """Delete a retired model's files; whoever waits for it hears how that went."""
        waiter = self._retired.pop(name, None)
        try:
            async with self.store_lock:
                freed_bytes = await self._loop.run_in_executor(None, self.store.remove, name)
        except StoreError as error:
            log.error("%s could not be deleted from the store: %s", name, error)
            if waiter is not None and not waiter.done():
                waiter.set_exception(error)
        else:
            if waiter is not None and not waiter.done():
                waiter.set_result(freed_bytes)

    def strays(self) -> list[str]:
        """Tensors of bound components outside the arena; see `StageDoor`."""
        return self._stage.strays() if self._stage is not None else []

    # -- waiting ------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is looked at after every event."""
        if not condition():
            watch: asyncio.Future[None] = self._loop.create_future()
            self._watches.append((condition, watch))
            await watch

    def _look_at_watches(self) -> None:
        for condition, watch in self._watches:
            if not watch.done() and condition():
                watch.set_result(None)
        if self._watches:
            self._watches = [(c, w) for c, w in self._watches if not w.done()]

    def close(self) -> None:
        """No more timers."""
        if self._waker is not None:
            self._waker.cancel()
