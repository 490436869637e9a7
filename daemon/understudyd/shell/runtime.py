"""The shell's middle: event -> machine -> perform. Everything here runs on the event loop's thread.

Stage and loader pool emit core events; the front end hands in requests; the machine's actions are
performed in order.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from understudy.trace import Record
from understudy.wire import Accepted, Failed, Finished, Generate, ModelEntry, Progress, Timings
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.machine import ANSWERING, Machine
from understudyd.core.states import IllegalEvent
from understudyd.core.types import ErrorCode
from understudyd.names import how_to_list, unknown_model
from understudyd.shell.adapter_book import AdapterRefused
from understudyd.shell.arrivals import Arrivals
from understudyd.shell.blob_files import BlobFiles
from understudyd.shell.chronicle import Chronicle
from understudyd.shell.keeper import Keeper
from understudyd.shell.lora_views import lora_entries
from understudyd.shell.meter import FoldEnding, Meter
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.pending import RETRYABLE, Pending, RunFailed, Step
from understudyd.shell.ports import LoadRunner, ReplySink, RunResult, StageDoor
from understudyd.shell.read_through import ReadThrough
from understudyd.shell.request_log import RequestLog
from understudyd.shell.stage_hands import Asked, StageHands
from understudyd.shell.tally import Tally
from understudyd.shell.watches import Watches
from understudyd.store.records import ModelRecord
from understudyd.store.union import StoreUnion

log = logging.getLogger(__name__)


class Runtime:
    """Performs what the machine decides. Implements `RequestSink` for the front end.

    `on_change` sees the machine after each event, before anything is done about it. `stage_moved_at_s` is
    when the stage got something to run, made a step or ended a run.
    """

    def __init__(
        self,
        machine: Machine,
        stores: StoreUnion,
        loop: asyncio.AbstractEventLoop,
        *,
        cache: ReadThrough | None = None,
        request_log: RequestLog | None = None,
        settings: ModelSettings | None = None,
        record: Record = lambda span: None,
        meter: Meter | None = None,
        on_defect: Callable[[BaseException], None],
        on_change: Callable[[Machine], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.machine = machine
        self.keeper = Keeper(machine, stores, loop, self.handle, settings)
        self.files = BlobFiles(stores.own, cache)
        self.tally = Tally()
        self.meter = meter or Meter()
        self._chronicle = Chronicle(record)
        self.stage_moved_at_s = clock()
        self._request_log = request_log
        self.pending: dict[str, Pending] = {}
        self._loop = loop
        self._clock = clock
        self._on_defect = on_defect
        self._on_change = on_change
        self._thread = threading.get_ident()
        self._pool: LoadRunner | None = None
        self._hands = StageHands(self.keeper.adapters.derived, self._asked, self.handle)
        self._replies: ReplySink | None = None
        self._inbox: deque[ev.Event] = deque()
        self._arrivals: Arrivals[ev.Event | Step] = Arrivals(loop, self._take)
        self._is_handling = self._are_more_coming = False
        self._wake_at_s: float | None = None
        self._waker: asyncio.Handle | None = None
        self._watches = Watches(loop)

    @property
    def records(self) -> dict[str, ModelRecord]:
        """What each name stands for."""
        return self.keeper.served.records

    @property
    def store_lock(self) -> asyncio.Lock:
        """Held by whoever changes the store: one writer at a time."""
        return self.keeper.lock

    # -- wiring -------------------------------------------------------------------------------------

    def attach_pool(self, pool: LoadRunner) -> None:
        """Who performs loads; before the first loader is ready."""
        self._pool = pool

    def attach_replies(self, replies: ReplySink) -> None:
        """Who carries answers to clients; before the first client connects."""
        self._replies = replies

    def attach_stage(self, stage: StageDoor) -> None:
        """The stage is built: perform what it was to do meanwhile."""
        self._hands.attach(stage)

    # -- events in ----------------------------------------------------------------------------------

    def emit(self, event: ev.Event) -> None:
        """Give the machine an event; from any thread."""
        if threading.get_ident() == self._thread:
            self.handle(event)
        elif (verified := self.keeper.verified(event)) is not None:
            self._arrivals.put(verified)

    def progress(self, request_id: str, step: int, steps: int) -> None:
        """The stage reports a step; from any thread."""
        self._arrivals.put(Step(request_id, step, steps))

    def _take(self, arrived: list[ev.Event | Step]) -> None:
        """What comes in a row is handled as one; steps first, for nobody makes one after his answer."""
        for told in arrived:
            if isinstance(told, Step):
                self._progress(told)
        self.handle(*(told for told in arrived if not isinstance(told, Step)))

    def handle(self, *events: ev.Event) -> None:
        """Machine, then actions; events that performing causes are handled after, in order.

        What follows from several at once is looked at after the last; after an answer, in a turn of its own.
        """
        self._inbox.extend(events)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._inbox:
                event = self._inbox.popleft()
                are_more_coming = bool(self._inbox) or self._are_more_coming
                self._handle_one(event, may_wait=are_more_coming or isinstance(event, ANSWERING))
        finally:
            self._is_handling = False
        if self._are_more_coming:
            return
        self._set_waker()
        self._watches.look()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What follows from all that is handed in meanwhile is looked at when this ends."""
        self._are_more_coming = True
        try:
            yield
        finally:
            self._are_more_coming = False
            self.handle(*([ev.Ticked()] if self.machine.is_unsettled else []))

    def _handle_one(self, event: ev.Event, *, may_wait: bool) -> None:
        self.files.follow(event)
        if isinstance(event, FoldEnding) and (fold := self.machine.residency.folds.under_way) is not None:
            self.meter.folded(event, self._clock() - fold.started_at_s)
        if isinstance(event, ev.RunStarted | ev.RunEnded):
            self.stage_moved_at_s = self._clock()
        try:
            actions = self.machine.handle(event, self._clock(), may_wait=may_wait)
        except IllegalEvent:
            log.exception("an event that cannot be was ignored: %r", event)
            return
        except BaseException as error:
            self._on_defect(error)
            raise
        self._chronicle.follow(self.machine, self._clock())
        if self._on_change is not None:
            self._on_change(self.machine)
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
        if at_s is None:
            return
        if at_s <= now_s:
            self._waker = self._loop.call_soon(self._wake)
        else:
            self._waker = self._loop.call_later(at_s - now_s + 0.001, self._wake)

    def _wake(self) -> None:
        self._wake_at_s, self._waker = None, None
        self.handle(ev.Ticked())

    # -- actions out --------------------------------------------------------------------------------

    def _perform(self, action: ac.Action) -> None:
        match action:
            case ac.AcceptRequest(request_id=request_id, position=position, tier=tier):
                wait_s = round(action.estimated_wait_s, 3)
                pending = self.pending[request_id]
                pending.tier = tier
                if pending.done is None and self._replies is not None:
                    self.tally.tiers_on_receipt[tier.value] += 1
                    name = pending.request.id
                    accepted = Accepted(id=name, position=position, tier=tier.value, estimated_wait_s=wait_s)
                    self._replies.send(pending.client, accepted)
            case ac.AnswerRequest(request_id=request_id, code=code, message=message):
                self._answer(request_id, code, message)
            case ac.StartLoad(blob=key):
                assert self._pool is not None
                place = self.keeper.served.places[key]
                self._pool.start_load(action, place.label, self.files.choose(action, place), place.record)
            case ac.CancelLoad(load_id=load_id):
                assert self._pool is not None
                self._pool.cancel_load(load_id)
            case ac.PauseLoads(is_paused=is_paused):
                assert self._pool is not None
                self._pool.pause_loads(is_paused)
            case ac.RetireModel() | ac.AdoptEdition() | ac.RejectEdition() | ac.RetireEdition():
                if isinstance(action, ac.RetireModel):
                    self._forget(action.name)
                self.keeper.perform(action)
            case _:
                if isinstance(action, ac.PutOnDeck):
                    self.stage_moved_at_s = self._clock()
                self._hands.perform(action)

    def _forget(self, name: str) -> None:
        self.meter.forget(name)
        if name in self.keeper.adapters.derived:
            self.tally.forget(name)

    def _asked(self, request_id: str) -> Asked:
        pending = self.pending[request_id]
        return pending.request, pending.payload

    def _answer(self, request_id: str, code: ErrorCode | None, message: str) -> None:
        """The client's answer leaves first: the books can wait."""
        pending = self.pending.pop(request_id)
        if code is None:
            assert self._hands.stage is not None
            result = self._hands.stage.take_result(request_id, pending.received_at_s)
            if pending.done is None:
                self._send_images(pending, result)
            elif not pending.done.done():
                pending.done.set_result(result)
            self._book(request_id, pending, result)
        elif pending.done is None:
            self._refuse(request_id, pending, code, message)
        elif not pending.done.done():
            pending.done.set_exception(RunFailed(code, message))
        self._chronicle.answered(request_id, pending, "" if code is None else code.value, self._clock())

    def _book(self, request_id: str, pending: Pending, result: RunResult) -> None:
        timings = result.timings
        if result.switched:
            self._chronicle.switched(request_id, pending, timings)
        if pending.done is None:
            wish = pending.wish
            used = {wish.base, wish.model, *(adapter.name for adapter in wish.adapters)}
            self.tally.finished(used, self._clock(), timings.gap_s if result.switched else None)
            self.meter.finished(wish.base, pending.tier.value, timings, switched=result.switched)
            self._log_request(request_id, pending, timings)

    def _refuse(self, request_id: str, pending: Pending, code: ErrorCode, message: str) -> None:
        self._log_request(request_id, pending, None)
        self.meter.failed(None if code is ErrorCode.UNKNOWN_MODEL else pending.wish.base, code.value)
        if code is ErrorCode.UNKNOWN_MODEL:
            names = [*self.keeper.names(), *self.keeper.adapters.book.found]
            message = unknown_model(pending.wish.base, names, how_to_list(names, "understudy models"))
        self._send_failure(pending.client, pending.request, code.value, message)

    def _send_failure(self, client: str, request: Generate, code: str, message: str) -> None:
        if code not in (ErrorCode.CANCELLED, ErrorCode.CLIENT_GONE):
            self.tally.failure(code, message)
        failed = Failed(id=request.id, code=code, message=message, retryable=code in RETRYABLE)
        if self._replies is not None:
            self._replies.send(client, failed)

    def _log_request(self, request_id: str, pending: Pending, timings: Timings | None) -> None:
        if self._request_log is None:
            return
        if timings is None:
            self._request_log.failed(request_id)
        else:
            line = (pending.client, pending.request, pending.wish, pending.steps, pending.received_at_s)
            self._request_log.finished(request_id, *line, timings)

    def _send_images(self, pending: Pending, result: RunResult) -> None:
        finished = Finished(
            id=pending.request.id,
            model=pending.request.model,
            seed=pending.request.seed,
            images=tuple(result.infos),
            timings=result.timings,
            tier=pending.tier.value,
            switched=result.switched,
            adapters=pending.wish.adapters,
        )
        if self._replies is not None:
            self._replies.send(pending.client, finished, result.images)

    # -- RequestSink --------------------------------------------------------------------------------

    def submit(self, client: str, request: Generate, payload: Sequence[bytes] = ()) -> None:
        """A client's request; ids are made unique by the client's name."""
        request_id = f"{client}/{request.id}"
        try:
            wish = self.keeper.adapters.wish(request.model, request.adapters)
        except AdapterRefused as error:
            self.meter.failed(None, error.code)
            self._send_failure(client, request, error.code, str(error))
            return
        if self._request_log is not None:
            self._request_log.received(request_id)
        self._submit(request_id, Pending(client, request, wish, self._clock(), tuple(payload)))

    def cancel(self, client: str, request_id: str) -> None:
        """A client takes its request back."""
        self.handle(ev.RequestCancelled(f"{client}/{request_id}"))

    def client_gone(self, client: str) -> None:
        """Cancel all that the client asked for."""
        self.handle(ev.ClientGone(client))

    def models(self) -> list[ModelEntry]:
        """What may be asked for, by name: models, then adapters."""
        names = set(self.keeper.names())
        entries = [
            ModelEntry(
                name=view.name,
                pipeline=self.records[view.name].pipeline_class,
                size_bytes=view.size_bytes,
                tier=view.tier.value,
            )
            for view in snapshot.models(self.machine)
            if view.name in names
        ]
        return entries + lora_entries(self.keeper.adapters.book, self.machine)

    def _progress(self, told: Step) -> None:
        self.stage_moved_at_s = self._clock()
        pending = self.pending.get(told.request_id)
        if pending is None:
            return
        pending.step, pending.steps = told.step, told.steps
        if pending.done is None and pending.request.progress and self._replies is not None:
            progress = Progress(id=pending.request.id, step=told.step, steps=told.steps)
            self._replies.send(pending.client, progress)

    # -- the daemon's own requests --------------------------------------------------------------------

    async def run(self, request: Generate) -> RunResult:
        """Run a request of the daemon's own. Raises `RunFailed`."""
        done: asyncio.Future[RunResult] = self._loop.create_future()
        request_id = f"understudyd/{request.id}"
        try:
            wish = self.keeper.adapters.wish(request.model, request.adapters)
        except AdapterRefused as error:
            raise RunFailed(ErrorCode.BAD_REQUEST, str(error)) from error
        self._submit(request_id, Pending("understudyd", request, wish, self._clock(), done=done))
        try:
            return await done
        finally:
            if not done.done() or done.cancelled():
                self.handle(ev.RequestCancelled(request_id))

    def _submit(self, request_id: str, pending: Pending) -> None:
        self.pending[request_id] = pending
        self.handle(ev.RequestReceived(pending.info(request_id)))

    def tasks(self, name: str) -> list[str]:
        """What the model's components can do; nothing is known before it is prepared."""
        key = self.machine.residency.models[name].key
        return self._hands.stage.tasks(key) if self._hands.stage is not None else []

    def strays(self) -> list[str]:
        """Tensors of bound components outside the arena; see `StageDoor`."""
        return self._hands.stage.strays() if self._hands.stage is not None else []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is looked at after every event."""
        await self._watches.until(condition)

    def close(self) -> None:
        """No more timers."""
        if self._waker is not None:
            self._waker.cancel()
