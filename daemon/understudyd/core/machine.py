"""The core machine: one event in, actions out.

`handle(event, now_s)` changes the state, then settles: expires deadlines, puts the next request on
deck, starts loads. It is deterministic; time is an argument and `next_deadline_s` says when it wants
to be woken with `Ticked`. An illegal event raises `IllegalEvent` before anything has changed.

The deck: while one request runs, the next one is already chosen, leased and prepared, so that the
stage changes over without asking anybody. Its choice is final, except for cancellation.
"""

from collections import OrderedDict
from typing import assert_never

from understudyd.core import events as ev
from understudyd.core.actions import AcceptRequest, Action, AnswerRequest, CancelRun, PutOnDeck
from understudyd.core.entities import Blob, Model
from understudyd.core.forecast import Forecast
from understudyd.core.policy import Policy, PolicySettings
from understudyd.core.queueing import Request, RequestQueue
from understudyd.core.residency import Price, Residency
from understudyd.core.states import BlobState, IllegalEvent, PartsState, RequestState
from understudyd.core.types import ErrorCode, Outcome, RequestInfo, Tier


class Machine:
    """Queue, residency and forecast under one `handle`.

    `arena_bytes` is the size of the arena; `quarantine_grace_s` how long a dead loader's extents stay
    out of use after its process was reaped (a copy may still be in flight on the device).
    """

    def __init__(
        self,
        arena_bytes: int,
        *,
        policy: PolicySettings | None = None,
        max_waiting: int = 1000,
        quarantine_grace_s: float = 1.0,
    ) -> None:
        self._actions: list[Action] = []
        self.forecast = Forecast()
        self.policy = Policy(policy or PolicySettings(), self.forecast)
        self.queue = RequestQueue(max_waiting)
        self.residency = Residency(arena_bytes, quarantine_grace_s, self._actions)
        self.on_deck: Request | None = None
        self.running: dict[str, Request] = {}
        self.on_stage: str | None = None
        self.wanted: OrderedDict[str, None] = OrderedDict()
        self.is_open = True

    # -- the two calls of a driver -------------------------------------------------------------------

    def handle(self, event: ev.Event, now_s: float) -> list[Action]:
        """Take in what happened; returns what to do, in order."""
        assert not self._actions
        try:
            self._take_in(event, now_s)
            self._settle(now_s)
            return list(self._actions)
        finally:
            self._actions.clear()

    def next_deadline_s(self, now_s: float) -> float | None:
        """When to send `Ticked` at the latest; None when only an event can change anything."""
        times = list(self.residency.deadlines(now_s))
        deadline = self.queue.next_deadline_s()
        if deadline is not None:
            times.append(deadline)
        return min(times, default=None)

    # -- events -------------------------------------------------------------------------------------

    def _take_in(self, event: ev.Event, now_s: float) -> None:
        match event:
            case ev.RequestReceived(request=info):
                self._receive(info, now_s)
            case ev.RequestCancelled(request_id=request_id):
                if (request := self.queue.requests.get(request_id)) is not None:
                    self._cancel(request, ErrorCode.CANCELLED, "the request was cancelled", now_s)
            case ev.ClientGone(client=client):
                for request in [r for r in self.queue.requests.values() if r.info.client == client]:
                    self._cancel(request, ErrorCode.CLIENT_GONE, "the client is gone", now_s)
            case ev.AdmissionChanged(is_open=is_open):
                self.is_open = is_open
            case ev.ModelAdded() | ev.ModelRemoved() | ev.PinChanged() | ev.LoadWanted() | ev.EvictWanted():
                self._administer(event, now_s)
            case ev.ModelPrepared(name=name):
                model = self._preparing(name)
                model.parts.to(PartsState.PREPARED, now_s)
                self.residency.retire_if_unused(model, now_s)
            case ev.ModelPreparationFailed(name=name, message=message):
                model = self._preparing(name)
                model.parts.to(PartsState.BROKEN, now_s, message)
                self._fail_waiting([name], ErrorCode.INTERNAL, message, now_s)
                self.residency.retire_if_unused(model, now_s)
            case ev.LoaderReady() | ev.LoaderLost() | ev.LoaderReaped():
                self._loader_changed(event, now_s)
            case ev.LoadFinished() | ev.LoadFailed() | ev.LoadCancelled():
                self._load_ended(event, now_s)
            case ev.ViewsBuilt(blob=key, generation=generation):
                self.residency.views_built(self.residency.viewing(key, generation), now_s)
            case ev.ViewsFailed(blob=key, generation=generation, message=message):
                blob = self.residency.viewing(key, generation)
                self.residency.views_failed(blob, now_s, message)
                self._count_failure(blob, ErrorCode.LOAD_FAILED, message, now_s)
            case ev.RunStarted() | ev.RunEnded() | ev.LeaseEnded():
                self._stage_changed(event, now_s)
            case ev.ImagesEncoded(request_id=request_id):
                self._answer(self._request(request_id, RequestState.ENCODING), None, "", now_s)
            case ev.EncodingFailed(request_id=request_id, message=message):
                request = self._request(request_id, RequestState.ENCODING)
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
            return
        model = self.residency.models[info.model]
        self.forecast.saw(info.model)
        tier = Tier.BOUND if model.is_ready and self.on_stage == info.model else model.tier
        position = len(self.queue)
        self.queue.admit(info, tier, now_s)
        self._actions.append(AcceptRequest(info.request_id, position, tier))

    def _refusal(self, info: RequestInfo) -> tuple[ErrorCode, str] | None:
        model = self.residency.models.get(info.model)
        if model is None or model.retiring:
            return ErrorCode.UNKNOWN_MODEL, f"no model {info.model!r} here; ask for the list of models"
        if not self.is_open:
            return ErrorCode.DRAINING, "the daemon is draining; try another one or later"
        if self.queue.is_full:
            return ErrorCode.QUEUE_FULL, f"{len(self.queue)} requests are waiting already; try again later"
        if model.parts.state is PartsState.BROKEN:
            return ErrorCode.INTERNAL, f"{info.model} could not be prepared: {model.parts.story()}"
        if any(b.state is BlobState.DAMAGED for b in model.blobs):
            return ErrorCode.MODEL_CORRUPT, f"{info.model} is damaged on disk; remove it and add it again"
        needed, size = self.residency.required_bytes(model), self.residency.arena.size_bytes
        if needed > size:
            why = f"{info.model} needs {needed} bytes beside what is pinned, the arena has {size}"
            return ErrorCode.MODEL_TOO_LARGE, f"{why}; unpin models or enlarge the arena"
        return None

    def _cancel(self, request: Request, code: ErrorCode, message: str, now_s: float) -> None:
        """A waiting request is answered at once; one on stage at its next checkpoint."""
        match request.state:
            case RequestState.WAITING:
                self._answer(request, code, message, now_s)
            case RequestState.ON_DECK | RequestState.RUNNING if request.cancel_code is None:
                request.cancel_code = code
                self._actions.append(CancelRun(request.id, code))
            case _:
                pass  # its images are being encoded, or it is being cancelled: the answer is on its way

    def _administer(
        self,
        event: ev.ModelAdded | ev.ModelRemoved | ev.PinChanged | ev.LoadWanted | ev.EvictWanted,
        now_s: float,
    ) -> None:
        if isinstance(event, ev.ModelAdded):
            self.residency.add_model(event.model)
            return
        model = self.residency.models.get(event.name)
        if model is None or model.retiring:
            raise IllegalEvent(f"no model {event.name!r}")
        match event:
            case ev.ModelRemoved(name=name):
                model.retiring = True
                self.residency.pin(model, False)
                self.wanted.pop(name, None)
                self.forecast.forget(name)
                message = f"{name} was removed while the request waited"
                self._fail_waiting([name], ErrorCode.MODEL_REMOVED, message, now_s)
                self.residency.retire_if_unused(model, now_s)
            case ev.PinChanged(pinned=pinned):
                self.residency.pin(model, pinned)
            case ev.LoadWanted(name=name):
                self.wanted[name] = None
            case ev.EvictWanted(name=name):
                self.wanted.pop(name, None)
                self._evict_model(model, now_s)
            case _:
                assert_never(event)

    def _evict_model(self, model: Model, now_s: float) -> None:
        """Evict what no other resident model shares and nobody holds."""
        for blob in model.blobs:
            others = (self.residency.models[m] for m in blob.models if m != model.name)
            if blob.extent is None or any(other.is_resident for other in others):
                continue
            if self.residency.evictable(blob.extent) is not None:
                self.residency.evict(blob, now_s, "operator")

    def _loader_changed(self, event: ev.LoaderReady | ev.LoaderLost | ev.LoaderReaped, now_s: float) -> None:
        match event:
            case ev.LoaderReady(loader_id=loader_id):
                self.residency.loader_ready(loader_id)
            case ev.LoaderLost(loader_id=loader_id, reason=reason):
                blob = self.residency.loader_lost(loader_id, now_s, reason)
                if blob is not None and blob.models:
                    message = f"{blob.key[:12]} killed its loader several times: {reason}"
                    self._count_failure(blob, ErrorCode.LOAD_FAILED, message, now_s)
            case ev.LoaderReaped(loader_id=loader_id):
                self.residency.loader_reaped(loader_id, now_s)

    def _load_ended(self, event: ev.LoadFinished | ev.LoadFailed | ev.LoadCancelled, now_s: float) -> None:
        load = self.residency.load(event.load_id)
        match event:
            case ev.LoadFinished():
                self.residency.load_finished(load, now_s)
            case ev.LoadCancelled():
                self.residency.load_ended_empty(load, now_s, "cancelled")
            case ev.LoadFailed(code=code, message=message):
                self.residency.load_ended_empty(load, now_s, message)
                if load.blob.models:
                    self._count_failure(load.blob, code, message, now_s)

    def _count_failure(self, blob: Blob, code: ErrorCode, message: str, now_s: float) -> None:
        """A load went wrong: try again later, or give up and fail who waits for it."""
        if self.residency.failed(blob, code, now_s):
            self._fail_waiting(sorted(blob.models), code, message, now_s)
            for name in blob.models:
                self.wanted.pop(name, None)

    def _stage_changed(self, event: ev.RunStarted | ev.RunEnded | ev.LeaseEnded, now_s: float) -> None:
        match event:
            case ev.RunStarted(request_id=request_id):
                request = self._request(request_id, RequestState.ON_DECK)
                request.life.to(RequestState.RUNNING, now_s)
                self.on_deck, self.on_stage = None, request.model
                self.running[request.id] = request
            case ev.RunEnded(request_id=request_id, outcome=outcome, code=code, message=message):
                self._run_ended(request_id, outcome, code, message, now_s)
            case ev.LeaseEnded(request_id=request_id):
                request = self._request(request_id, RequestState.ENCODING, RequestState.ANSWERED)
                if not request.holds_lease:
                    raise IllegalEvent(f"{request_id} holds no lease: {request.life.story()}")
                request.holds_lease = False
                model = self.residency.models[request.model]
                self.residency.unlease(model, now_s)
                self.residency.retire_if_unused(model, now_s)
                self.queue.forget_if_done(request)

    def _run_ended(
        self, request_id: str, outcome: Outcome, code: ErrorCode | None, message: str, now_s: float
    ) -> None:
        request = self._request(request_id, RequestState.ON_DECK, RequestState.RUNNING)
        if outcome is Outcome.FINISHED:
            request.life.to(RequestState.ENCODING, now_s)
        else:
            code = request.cancel_code or code or ErrorCode.INTERNAL
            self._answer(request, code, message or f"the run was {outcome.value}: {code.value}", now_s)
        self.running.pop(request_id, None)
        if self.on_deck is request:
            self.on_deck = None

    # -- settling -----------------------------------------------------------------------------------

    def _settle(self, now_s: float) -> None:
        self.residency.release_quarantined(now_s)
        for request in self.queue.expired(now_s):
            self._cancel(request, ErrorCode.DEADLINE_EXCEEDED, "the request's deadline has passed", now_s)
        self._fill_deck(now_s)
        self._start_loads(now_s)
        if self._is_stuck(now_s):
            self._unstick(now_s)

    def _fill_deck(self, now_s: float) -> None:
        if self.on_deck is not None:
            return
        request = self.policy.next_to_run(self.queue, self.residency, self.on_stage, now_s)
        if request is None:
            return
        self.queue.take(request, now_s)
        self.residency.lease(self.residency.models[request.model], now_s)
        request.holds_lease = True
        self.on_deck = request
        self._actions.append(PutOnDeck(request.id, request.model))

    def _start_loads(self, now_s: float) -> None:
        """Have loaded, in this order: what waits, what an operator wants, what is likely to be asked for."""
        models = self.residency.models
        expected = self.policy.expected_order(self.queue, models, self.on_stage, now_s)
        busy = bool(self.running) or self.on_deck is not None
        queued = self.policy.to_load(expected, models, busy)
        for name in queued:
            self.residency.prepare(models[name], now_s)
        for name in queued:
            if not self._load_model(models[name], expected, name, now_s):
                self._make_way(queued, now_s)
                return
        for name in [n for n in self.wanted if models[n].is_ready]:
            del self.wanted[name]
        asked = [*self.wanted, *(m.name for m in self.residency.pinned.values() if not m.is_ready)]
        for name in asked:
            self.residency.prepare(models[name], now_s)
            if not self._load_model(models[name], expected, None, now_s):
                return
        if self.policy.settings.prefetch and self.policy.settings.lookahead:
            self._prefetch(now_s)

    def _load_model(self, model: Model, expected: list[str], requester: str | None, now_s: float) -> bool:
        """Start loads for what the model lacks; False when a loader or room is wanting."""

        def pricing() -> Price:
            return self.policy.price(self.residency.evictable, expected, requester)

        for blob in model.blobs:
            if blob.state is not BlobState.ABSENT or blob.retry_at_s > now_s:
                continue
            loader = next(self.residency.idle_loaders(), None)
            if loader is None or not self.residency.begin_load(blob, loader, pricing, now_s):
                return False
        return True

    def _make_way(self, queued: list[str], now_s: float) -> None:
        """All loaders are busy while a request waits for one: stop a load that nobody waits for."""
        if next(self.residency.idle_loaders(), None) is not None:
            return
        needed = set(queued) | set(self.wanted)
        for load in self.residency.loads.values():
            if load.is_cancelling:
                return
        for load in self.residency.loads.values():
            if not load.blob.models & needed and not self.residency.is_pinned(load.blob):
                self.residency.cancel_load(load)
                return

    def _prefetch(self, now_s: float) -> None:
        """Idle loaders fill free memory with what is likeliest to be asked for; nothing is evicted."""
        room = self.residency.arena.largest_gap_bytes
        for name in self.forecast.ranked() if next(self.residency.idle_loaders(), None) else ():
            model = self.residency.models[name]
            if model.is_ready or self._refusal_of_parts(model):
                continue
            if sum(b.info.size_bytes for b in model.blobs if b.state is BlobState.ABSENT) > room:
                return
            self.residency.prepare(model, now_s)
            for blob in model.blobs:
                loader = next(self.residency.idle_loaders(), None)
                if loader is None:
                    return
                if blob.state is BlobState.ABSENT and blob.retry_at_s <= now_s:
                    self.residency.begin_load(blob, loader, None, now_s)

    @staticmethod
    def _refusal_of_parts(model: Model) -> bool:
        return model.parts.state is PartsState.BROKEN or any(
            b.state is BlobState.DAMAGED for b in model.blobs
        )

    # -- liveness -----------------------------------------------------------------------------------

    def _is_stuck(self, now_s: float) -> bool:
        """Requests wait, a loader is idle, and nothing at all is under way that could help them."""
        residency = self.residency
        return (
            len(self.queue) > 0
            and not self.running
            and self.on_deck is None
            and not residency.loads
            and not residency.has_quarantine
            and not any(r.holds_lease for r in self.queue.requests.values())
            and next(residency.idle_loaders(), None) is not None
            and not any(
                b.state is BlobState.VIEWING or b.retry_at_s > now_s for b in residency.blobs.values()
            )
            and not any(m.parts.state is PartsState.PREPARING for m in residency.models.values())
        )

    def _unstick(self, now_s: float) -> None:
        """Fragments keep the first model out: clear what may be cleared, then try once more.

        What then still does not fit is kept out by pins that lie in its way: that is the operator's.
        """
        for extent in list(self.residency.arena):
            blob = self.residency.evictable(extent)
            if blob is not None:
                self.residency.evict(blob, now_s, "fragmentation")
        self._start_loads(now_s)
        oldest = self.queue.oldest()
        if not self.residency.loads and oldest is not None:
            message = f"pinned models leave no gap for {oldest.model}; unpin some"
            self._fail_waiting([oldest.model], ErrorCode.MODEL_TOO_LARGE, message, now_s)

    # -- inside -------------------------------------------------------------------------------------

    def _request(self, request_id: str, *states: RequestState) -> Request:
        request = self.queue.requests.get(request_id)
        if request is None:
            raise IllegalEvent(f"no request {request_id}")
        request.life.require(*states)
        return request

    def _preparing(self, name: str) -> Model:
        model = self.residency.models.get(name)
        if model is None:
            raise IllegalEvent(f"no model {name!r} is being prepared")
        model.parts.require(PartsState.PREPARING)
        return model

    def _answer(self, request: Request, code: ErrorCode | None, message: str, now_s: float) -> None:
        self.queue.answered(request, now_s, code.value if code is not None else "finished")
        self._actions.append(AnswerRequest(request.id, code, message))

    def _fail_waiting(self, names: list[str], code: ErrorCode, message: str, now_s: float) -> None:
        for name in names:
            for request in self.queue.waiting_for(name):
                self._answer(request, code, message, now_s)
