"""Who is on deck and who runs.

The deck: while one request runs, the next one is already chosen, leased and prepared, so that the stage
changes over without asking anybody. Its choice is final, except for cancellation. Where a model allows it,
waiting requests that can be made by the same run go on deck with the first: a batch. To the machine they are
requests like others, each with a lease, events and an answer of its own; the deck is free when all have left.
"""

from collections.abc import Callable

from understudyd.core import events as ev
from understudyd.core.actions import Action, PutOnDeck
from understudyd.core.catalogue import Catalogue
from understudyd.core.decisions import Decisions
from understudyd.core.entities import Model
from understudyd.core.policy import Policy
from understudyd.core.queueing import RequestQueue
from understudyd.core.request import Request
from understudyd.core.residency import Residency
from understudyd.core.states import IllegalEvent, RequestState
from understudyd.core.types import ErrorCode, Outcome

Answer = Callable[[Request, ErrorCode | None, str, float], None]


class Deck:
    """`on_deck` and `running` by request id. `answer` gives a request its one answer."""

    def __init__(
        self,
        policy: Policy,
        queue: RequestQueue,
        residency: Residency,
        catalogue: Catalogue,
        actions: list[Action],
        answer: Answer,
        decisions: Decisions | None = None,
    ) -> None:
        self.on_deck: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self._staged: Model | None = None
        self._policy = policy
        self._queue = queue
        self._residency = residency
        self._catalogue = catalogue
        self._actions = actions
        self._answer = answer
        self._decisions = decisions

    @property
    def on_stage(self) -> str | None:
        """The model whose weights the stage used last, unless its name has come to stand for others."""
        staged = self._staged
        return staged.name if staged is not None and self._catalogue.is_current(staged) else None

    @property
    def is_busy(self) -> bool:
        """Somebody runs, or is about to."""
        return bool(self.running or self.on_deck)

    # -- going on deck ------------------------------------------------------------------------------

    def fill(self, now_s: float) -> bool:
        """Put the next request on deck, if that is free, and with it who comes along; whether it did."""
        if self.on_deck:
            return False
        first = self._policy.next_to_run(self._queue, self._residency, self.on_stage, now_s)
        if first is None:
            return False
        model = self._residency.models[first.model]
        self._take(first, model, "", now_s)
        companions = self._find_companions(first, model, now_s)
        self._actions.append(PutOnDeck(first.id, model.key, companions))
        return True

    def _find_companions(self, first: Request, model: Model, now_s: float) -> tuple[str, ...]:
        """In the fair order, up to the first that would make the batch too large or pass who may not be."""
        room = model.max_batch - first.info.images
        if room < 1 or not (model.can_batch and first.info.batch_key):
            return ()
        companions = []
        for request in self._queue.alike(first, room):
            room -= request.info.images
            if room < 0 or not self._policy.may_come_along(self._queue, self._residency, request, now_s):
                break
            self._take(request, model, first.id, now_s)
            companions.append(request.id)
        return tuple(companions)

    def _take(self, request: Request, model: Model, along_with: str, now_s: float) -> None:
        self._queue.take(request, now_s)
        request.lease = model
        self._residency.lease(model, now_s)
        self.on_deck[request.id] = request
        if self._decisions is not None:
            self._decisions.chose(request.id, self.on_stage, along_with)

    # -- what the stage reports ---------------------------------------------------------------------

    def changed(self, event: ev.RunStarted | ev.RunEnded | ev.LeaseEnded, now_s: float) -> None:
        """Follow the stage. Raises `IllegalEvent`."""
        match event:
            case ev.RunStarted(request_id=request_id):
                request = self._queue.find(request_id, RequestState.ON_DECK)
                request.life.to(RequestState.RUNNING, now_s)
                self.running[request_id] = self.on_deck.pop(request_id)
                self._staged = request.lease
            case ev.RunEnded(request_id=request_id):
                request = self._queue.find(request_id, RequestState.ON_DECK, RequestState.RUNNING)
                self._ended(request, event, now_s)
                self.running.pop(request_id, None)
                self.on_deck.pop(request_id, None)
            case ev.LeaseEnded(request_id=request_id):
                request = self._queue.find(request_id, RequestState.ENCODING, RequestState.ANSWERED)
                self._end_lease(request, now_s)

    def _ended(self, request: Request, event: ev.RunEnded, now_s: float) -> None:
        if event.outcome is Outcome.FINISHED:
            request.life.to(RequestState.ENCODING, now_s)
            return
        code = request.cancel_code or event.code or ErrorCode.INTERNAL
        default = f"the run was {event.outcome.value}: {code.value}"
        self._answer(request, code, request.cancel_message or event.message or default, now_s)

    def _end_lease(self, request: Request, now_s: float) -> None:
        model = request.lease
        if model is None:
            raise IllegalEvent(f"{request.id} holds no lease: {request.life.story()}")
        request.lease = None
        self._residency.unlease(model, now_s)
        self._catalogue.retire_if_unused(model, now_s)
        self._queue.forget_if_done(request)
