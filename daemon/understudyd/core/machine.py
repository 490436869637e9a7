"""The core machine: one event in, actions out.

`handle(event, now_s)` changes the state, then settles: expires deadlines, puts the next request on
deck, starts loads. It is deterministic; time is an argument and `next_deadline_s` says when it wants
to be woken with `Ticked`. An illegal event raises `IllegalEvent` before anything has changed.
"""

from typing import assert_never

from understudyd.core import events as ev
from understudyd.core.actions import AcceptRequest, Action, AnswerRequest, CancelRun, PauseLoads
from understudyd.core.adoption import adopt
from understudyd.core.catalogue import Catalogue
from understudyd.core.decisions import Decisions
from understudyd.core.deck import Deck
from understudyd.core.demand import Demand
from understudyd.core.entities import Blob, Model
from understudyd.core.forecast import Forecast
from understudyd.core.lookahead import Lookahead
from understudyd.core.outlook import Outlook
from understudyd.core.pace import FILING, MUCH, Pace
from understudyd.core.policy import Policy, PolicySettings
from understudyd.core.refusals import refusal_of
from understudyd.core.request import Request
from understudyd.core.residency import Residency
from understudyd.core.room import evict_model, make_room
from understudyd.core.states import IllegalEvent, RequestState
from understudyd.core.timely import Timely
from understudyd.core.transit import Transit
from understudyd.core.types import ErrorCode, ModelInfo, RequestInfo, Tier

ANSWERING = (ev.ImagesEncoded, ev.EncodingFailed)
"""Events after which nothing can run, load or expire that could not before: they only bring an answer."""


class Machine:
    """Queue, residency and forecast under one `handle`.

    `arena_bytes` is the size of the arena, `pool_bytes` that of the host pool; `quarantine_grace_s` is how
    long a dead loader's extents stay out of use after its process was reaped (a copy may still be in flight
    on the device). `wanted` are the models that an operator wants resident and that are neither so nor given
    up yet. The last `decisions` decisions are kept, none without it. Of more than `max_derived` derived
    models the one that was not asked for the longest is removed, with `RetireModel`, unless somebody uses it.
    `much` is so much that one event goes over it only once (`pace.py`).
    """

    def __init__(
        self,
        arena_bytes: int,
        *,
        pool_bytes: int = 0,
        policy: PolicySettings | None = None,
        max_waiting: int = 1000,
        quarantine_grace_s: float = 1.0,
        decisions: int = 0,
        max_derived: int = 1000,
        much: int = MUCH,
    ) -> None:
        self._actions: list[Action] = []
        self._pace = Pace(much)
        self.forecast = Forecast()
        self.policy = Policy(policy or PolicySettings(), self.forecast)
        self.queue = self.policy.settings.queue(max_waiting)
        bounds = (self.policy.settings.max_wait_s, self.policy.settings.max_skips)
        self.decisions = Decisions(decisions, self.queue, self.forecast, *bounds) if decisions else None
        self.demand = Demand(self.queue, self.forecast, is_strict=self.policy.settings.order == "fcfs")
        self.wanted = self.demand.wanted
        self.residency = Residency(
            arena_bytes, pool_bytes, quarantine_grace_s, self._actions, self.demand, self.decisions
        )
        self.transit = Transit(self.residency, quarantine_grace_s, self.decisions)
        self.catalogue = Catalogue(self.residency, self.policy, self._actions, max_derived)
        self._deck = Deck(
            self.policy,
            self.queue,
            self.residency,
            self.catalogue,
            self._actions,
            self._answer,
            self.decisions,
        )
        self.on_deck = self._deck.on_deck
        self.running = self._deck.running
        self.outlook = Outlook(self.queue, self.residency, self.catalogue, self.running, self.on_deck)
        may_change = self.policy.settings.order != "fcfs"
        self.timely = Timely(self.queue, self.residency, self.outlook, may_change=may_change)
        self._lookahead = Lookahead(
            self.policy, self.queue, self.residency, self.transit, self.demand, self.timely, self._pace
        )
        self.is_open = True
        self._loads_rest = False

    @property
    def on_stage(self) -> str | None:
        """The model whose weights the stage used last, unless its name has come to stand for others."""
        return self._deck.on_stage

    @property
    def is_unsettled(self) -> bool:
        """Something was left for the next event, which is due at once."""
        return self._pace.has_more

    # -- the two calls of a driver -------------------------------------------------------------------

    def handle(self, event: ev.Event, now_s: float, *, may_wait: bool = False) -> list[Action]:
        """Take in what happened; returns what to do, in order.

        With `may_wait` what follows from it is left for the next event, which is due at once.
        """
        assert not self._actions
        if self.decisions is not None:
            self.decisions.now_s = now_s
        try:
            self.outlook.learn(event, now_s)
            self._take_in(event, now_s)
            if may_wait:
                self._pace.has_more |= not isinstance(event, ANSWERING)
            elif not isinstance(event, ANSWERING) or self.next_deadline_s(now_s) == now_s:
                self._settle(now_s)
            return list(self._actions)
        finally:
            self._actions.clear()
            self._pace.recover()

    def next_deadline_s(self, now_s: float) -> float | None:
        """When to send `Ticked` at the latest, `now_s` at the earliest; None: only an event changes anything.

        What came due since the last event is still due, however late this is asked.
        """
        if self.is_unsettled:
            return now_s
        times = [
            *self.transit.deadlines(),
            self.queue.next_deadline_s(),
            self.queue.pressing.next_change_s(),
        ]
        earliest_s = min((at_s for at_s in times if at_s is not None), default=None)
        return None if earliest_s is None else max(earliest_s, now_s)

    # -- events -------------------------------------------------------------------------------------

    def _take_in(self, event: ev.Event, now_s: float) -> None:
        match event:
            case ev.RequestReceived(request=info):
                self._receive(info, now_s)
            case ev.RequestCancelled(request_id=request_id):
                if (request := self.queue.requests.get(request_id)) is not None:
                    self._cancel(request, event.code, event.message, now_s)
            case ev.ClientGone(client=client):
                for request in [r for r in self.queue.requests.values() if r.info.client == client]:
                    self._cancel(request, ErrorCode.CLIENT_GONE, "the client is gone", now_s)
            case ev.AdmissionChanged(is_open=is_open):
                self.is_open = is_open
            case ev.SettingsChanged() | ev.CopiesFound() | ev.CopiesDropWanted():
                self._look_at_the_whole(event, now_s)
            case ev.ModelAdded(model=added):
                self.catalogue.add(added, now_s)
                for surplus in self.catalogue.surplus(self.demand.awaited):
                    self._remove(surplus, now_s)
            case ev.ModelReplaced(model=added):
                self._replace(added, now_s)
            case ev.ModelRemoved() | ev.PinChanged() | ev.LoadWanted() | ev.EvictWanted():
                self._administer(event, now_s)
            case ev.MaxBatchChanged(name=name, max_batch=max_batch):
                self.catalogue.set_max_batch(name, max_batch)
            case ev.ModelPrepared(key=key, can_batch=can_batch):
                self.catalogue.prepared(self.catalogue.preparing(key), can_batch, now_s)
            case ev.ModelPreparationFailed(key=key, message=message, is_lasting=is_lasting):
                self._preparation_failed(key, message, is_lasting, now_s)
            case ev.LoaderReady() | ev.LoaderLost() | ev.LoaderReaped():
                self._loader_changed(event, now_s)
            case ev.LoadFinished() | ev.LoadFailed() | ev.LoadCancelled():
                self._load_ended(event, now_s)
            case ev.FoldFinished() | ev.FoldFailed() | ev.FoldCancelled():
                self._fold_ended(event, now_s)
            case ev.ViewsBuilt(blob=key, generation=generation):
                self.residency.views_built(self.residency.viewing(key, generation), now_s)
            case ev.ViewsFailed(blob=key, generation=generation, message=message):
                blob = self.residency.viewing(key, generation)
                self.residency.views_failed(blob, now_s, message)
                self._count_failure(blob, ErrorCode.LOAD_FAILED, message, now_s)
            case ev.ExtentMoved(blob=key, generation=generation):
                self.residency.moved(self.residency.moving(key, generation), now_s)
            case ev.MoveFailed(blob=key, generation=generation, message=message):
                blob = self.residency.moving(key, generation)
                self.residency.move_failed(blob, now_s, message)
                self._count_failure(blob, ErrorCode.LOAD_FAILED, message, now_s)
            case ev.RunStarted() | ev.RunEnded() | ev.LeaseEnded():
                self._deck.changed(event, now_s)
            case ev.ImagesEncoded(request_id=request_id):
                self._answer(self.queue.find(request_id, RequestState.ENCODING), None, "", now_s)
            case ev.EncodingFailed(request_id=request_id, message=message):
                request = self.queue.find(request_id, RequestState.ENCODING)
                self._answer(request, ErrorCode.INTERNAL, message, now_s)
            case ev.Ticked():
                pass
            case _:
                assert_never(event)

    def _receive(self, info: RequestInfo, now_s: float) -> None:
        """Admit a request, or refuse it with the reason."""
        if info.request_id in self.queue.requests:
            raise IllegalEvent(f"request {info.request_id} is here already")
        refusal = self._refusal(info)
        if refusal is not None:
            self._actions.append(AnswerRequest(info.request_id, *refusal))
            if self.decisions is not None:
                self.decisions.refused(info, *refusal)
            return
        model = self.residency.models[info.model]
        self.policy.saw(model, info.client, now_s)
        self.catalogue.asked(model)
        self.residency.retries.end_rest(model)
        tier = Tier.BOUND if model.is_ready and self.on_stage == info.model else model.tier
        position = len(self.queue)
        request = self.queue.admit(info, tier, now_s)
        self._pace.went_over(max(position, len(self.residency.blobs)))
        wait_s = self.outlook.wait_s(request, now_s)
        self._actions.append(AcceptRequest(info.request_id, position, tier, wait_s))
        self.residency.prepare(model, now_s)

    def _refusal(self, info: RequestInfo) -> tuple[ErrorCode, str] | None:
        model = self.residency.models.get(info.model)
        if model is None or model.retiring:
            return ErrorCode.UNKNOWN_MODEL, f"no model {info.model!r} here; `understudy models` lists them"
        if not self.is_open:
            return ErrorCode.DRAINING, "the daemon is draining; try another one or later"
        if self.queue.is_full:
            return ErrorCode.QUEUE_FULL, f"{len(self.queue)} requests are waiting already; try again later"
        return refusal_of(self.residency, model)

    def _cancel(self, request: Request, code: ErrorCode, message: str, now_s: float) -> None:
        """A waiting request is answered at once; one on stage at its next checkpoint."""
        match request.state:
            case RequestState.WAITING:
                self._answer(request, code, message, now_s)
            case RequestState.ON_DECK | RequestState.RUNNING if request.cancel_code is None:
                request.cancel_code, request.cancel_message = code, message
                self._actions.append(CancelRun(request.id, code))
            case _:
                pass  # its images are being encoded, or it is being cancelled: the answer is on its way

    def _administer(
        self,
        event: ev.ModelRemoved | ev.PinChanged | ev.LoadWanted | ev.EvictWanted,
        now_s: float,
    ) -> None:
        model = self.catalogue.served(event.name)
        match event:
            case ev.ModelRemoved():
                self._remove(model, now_s)
            case ev.PinChanged(pinned=pinned):
                self.residency.pin(model, pinned)
                self.residency.retries.end_rest(model)
                if pinned:
                    self.residency.prepare(model, now_s)
            case ev.LoadWanted():
                self._want(model, now_s)
            case ev.EvictWanted(name=name):
                self.wanted.pop(name, None)
                self.forecast.forget(name)  # else it were prefetched again at once
                self._lookahead.cancel_needless(model)
                evict_model(self.residency, model, now_s)
            case _:
                assert_never(event)

    def _remove(self, model: Model, now_s: float) -> None:
        name = model.name
        self.residency.pin(model, False)
        message = f"{name} was removed while the request waited"
        self._give_up([name], ErrorCode.MODEL_REMOVED, message, now_s)
        self.forecast.forget(name)
        self.outlook.estimates.forget(name)
        self.catalogue.remove(model, now_s)

    def _want(self, model: Model, now_s: float) -> None:
        if refusal_of(self.residency, model) is None:
            self.wanted[model.name] = None
            self.residency.retries.end_rest(model)
            self.residency.prepare(model, now_s)

    def _look_at_the_whole(
        self, event: ev.SettingsChanged | ev.CopiesFound | ev.CopiesDropWanted, now_s: float
    ) -> None:
        match event:
            case ev.SettingsChanged(policy=policy, max_waiting=max_waiting):
                self.policy.change(policy)
                self.queue.change_limit(max_waiting)
                self.residency.changes += 1  # what was settled is looked at again
                self.residency.copies.changes += 1
            case ev.CopiesFound():
                for model in adopt(event, self.residency, now_s):
                    self._want(model, now_s)
            case ev.CopiesDropWanted():
                self.residency.copies.clear(self.residency.blobs.values(), now_s)
            case _:
                assert_never(event)

    def _replace(self, info: ModelInfo, now_s: float) -> None:
        self.catalogue.replace(info, now_s)
        name = info.name
        if name in self.queue.models() or name in self.wanted or name in self.residency.pinned:
            self.residency.prepare(self.residency.models[name], now_s)

    def _preparation_failed(self, key: str, message: str, is_lasting: bool, now_s: float) -> None:
        model = self.catalogue.preparing(key)
        if self.catalogue.is_current(model):
            code = ErrorCode.INTERNAL if is_lasting else ErrorCode.LOAD_FAILED
            self._give_up([model.name], code, message, now_s)
        self.catalogue.preparation_failed(model, message, is_lasting, now_s)

    def _loader_changed(self, event: ev.LoaderReady | ev.LoaderLost | ev.LoaderReaped, now_s: float) -> None:
        match event:
            case ev.LoaderReady(loader_id=loader_id):
                self.residency.book.loader_ready(loader_id)
            case ev.LoaderLost(loader_id=loader_id, reason=reason):
                blob = self.transit.loader_lost(loader_id, now_s, reason)
                if blob is not None:
                    message = f"{blob.key[:12]} killed its loader several times: {reason}"
                    self._count_failure(blob, ErrorCode.LOAD_FAILED, message, now_s)
            case ev.LoaderReaped(loader_id=loader_id):
                self.transit.loader_reaped(loader_id, now_s)

    def _load_ended(self, event: ev.LoadFinished | ev.LoadFailed | ev.LoadCancelled, now_s: float) -> None:
        load = self.residency.book.find(event.load_id)
        match event:
            case ev.LoadFinished():
                self.transit.load_finished(load, now_s)
            case ev.LoadCancelled():
                self.transit.load_ended_empty(load, now_s, "cancelled")
            case ev.LoadFailed(code=code, message=message):
                self.transit.load_failed(load, now_s, message)
                self._count_failure(load.blob, code, message, now_s)

    def _fold_ended(self, event: ev.FoldFinished | ev.FoldFailed | ev.FoldCancelled, now_s: float) -> None:
        fold = self.residency.folds.find(event.overlay, event.generation)
        match event:
            case ev.FoldFinished():
                self.transit.fold_finished(fold, now_s)
            case ev.FoldCancelled():
                self.transit.fold_ended_empty(fold, now_s, "cancelled")
            case ev.FoldFailed(code=code, message=message):
                self.transit.fold_ended_empty(fold, now_s, message)
                self._count_failure(fold.overlay, code, message, now_s)

    def _count_failure(self, blob: Blob, code: ErrorCode, message: str, now_s: float) -> None:
        """A load or a fold went wrong: try again later, or give up and fail who waits for it."""
        self.residency.evictables.mark([blob])
        if blob.models and self.residency.retries.failed(blob, code, message, now_s):
            self._give_up(sorted(blob.users), code, message, now_s)

    # -- settling -----------------------------------------------------------------------------------

    def _settle(self, now_s: float) -> None:
        self._pace.has_more = False
        self.transit.pass_time(now_s)
        self.queue.pass_time(now_s)
        for request in self.queue.expired(now_s):
            self._cancel(request, ErrorCode.DEADLINE_EXCEEDED, request.deadline_message, now_s)
        self._advance(now_s)
        while not self._pace.has_more and (
            (model := self._lookahead.stuck_on(self._deck.is_busy, now_s)) is not None
        ):
            if not make_room(self.residency, model, self._lookahead.prices(model), now_s):
                message = f"pinned models leave no gap for {model.name}; unpin some"
                self._give_up([model.name], ErrorCode.MODEL_TOO_LARGE, message, now_s)
            self._advance(now_s)
        if not self._pace.has_more:
            self._lookahead.fetch(now_s)
        self._pause_loads()

    def _pause_loads(self) -> None:
        """Loads rest while a latency-critical request runs, unless another such request waits for one."""
        running = any(self.policy.is_critical(request) for request in self.running.values())
        should_rest = running and not self.policy.critical_waits_for_load(self.queue, self.residency)
        if should_rest is not self._loads_rest:
            self._loads_rest = should_rest
            self._actions.append(PauseLoads(should_rest))

    def _advance(self, now_s: float) -> None:
        if self._deck.fill(now_s):
            self._pace.went_over(len(self.queue))
        if self._pace.may_go_on():
            self._pace.went_over(FILING * self.residency.evictables.file())
            self._lookahead.start_loads(self.on_stage, self._deck.is_busy, now_s)

    # -- inside -------------------------------------------------------------------------------------

    def _answer(self, request: Request, code: ErrorCode | None, message: str, now_s: float) -> None:
        if code is not None and self.decisions is not None:
            self.decisions.refused(request.info, code, message)
        self.queue.answered(request, now_s, code.value if code is not None else "finished")
        self._actions.append(AnswerRequest(request.id, code, message))

    def _give_up(self, names: list[str], code: ErrorCode, message: str, now_s: float) -> None:
        """Nobody gets these models: fail who waits for them, and the operator's wish."""
        for name in names:
            self.wanted.pop(name, None)
            for request in self.queue.waiting_for(name):
                self._answer(request, code, message, now_s)
