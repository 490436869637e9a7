"""When the stage will be free, a model ready, a request on stage: by estimates and the state of things.

It learns, too: each event that ends something says how long that took.
"""

from collections.abc import Mapping

from understudyd.core import events as ev
from understudyd.core.catalogue import Catalogue
from understudyd.core.entities import Blob, Model
from understudyd.core.estimates import Estimates
from understudyd.core.queueing import RequestQueue
from understudyd.core.request import Request
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState, PartsState, RequestState
from understudyd.core.types import Outcome

_SAMPLED = 16
"""Of more than twice as many ahead of a request only some are looked at: a bounded effort."""


class Outlook:
    """What is expected, by what was learned; seconds from now."""

    def __init__(
        self,
        queue: RequestQueue,
        residency: Residency,
        catalogue: Catalogue,
        running: Mapping[str, Request],
        on_deck: Mapping[str, Request],
    ) -> None:
        self.estimates = Estimates()
        self._queue = queue
        self._residency = residency
        self._catalogue = catalogue
        self._running = running
        self._on_deck = on_deck
        self._last_run_s: float | None = None

    def learn(self, event: ev.Event, now_s: float) -> None:
        """An event that is about to be handled; from one that cannot be nothing is learned."""
        match event:
            case ev.LoadFinished(load_id=load_id):
                load = self._residency.loads.get(load_id)
                if load is not None and not load.is_cancelling:
                    size_bytes, seconds = load.blob.info.size_bytes, now_s - load.started_at_s
                    self.estimates.loaded(
                        size_bytes, seconds, from_pool=load.from_pool, had_company=load.had_company
                    )
            case ev.FoldFinished(overlay=key):
                fold = self._residency.folds.under_way
                if fold is not None and fold.overlay.key == key and not fold.is_cancelling:
                    self.estimates.folded(fold.overlay.info.size_bytes, now_s - fold.started_at_s)
            case ev.ViewsBuilt(blob=key):
                blob = self._residency.blobs.get(key)
                if blob is not None and blob.state is BlobState.VIEWING and blob.life.since_s is not None:
                    self.estimates.viewed(now_s - blob.life.since_s)
            case ev.ModelPrepared(key=key):
                model = self._catalogue.editions.get(key)
                if model is not None and model.parts.state is PartsState.PREPARING:
                    self.estimates.prepared(now_s - (model.parts.since_s or now_s))
            case ev.RunStarted(request_id=request_id):
                request = self._queue.requests.get(request_id)
                if request is not None and request.state is RequestState.ON_DECK:
                    self.estimates.waited(request.expected_wait_s, now_s - request.received_at_s)
            case ev.RunEnded(request_id=request_id, outcome=Outcome.FINISHED):
                if (request := self._running.get(request_id)) is not None:
                    self._ran(request, now_s)
            case _:
                pass

    def _ran(self, request: Request, now_s: float) -> None:
        """The first of a batch to end tells of all: they ran together."""
        if (began_s := request.life.since_s) is None or began_s == self._last_run_s:
            return
        self._last_run_s = began_s
        cost = sum(other.info.cost for other in self._running.values() if other.life.since_s == began_s)
        self.estimates.ran(request.model, cost, now_s - began_s)

    # -- the stage ----------------------------------------------------------------------------------

    def run_s(self, request: Request) -> float:
        """How long it keeps the stage."""
        return self.estimates.run_s(request.model, request.info.cost)

    def stage_free_in_s(self, now_s: float) -> float:
        """When what runs and what is on deck will have run."""
        return self.rest_s(now_s) + sum(map(self.run_s, self._on_deck.values()))

    def rest_s(self, now_s: float) -> float:
        """When what runs will have run."""
        if not self._running:
            return 0.0
        began_s = min(request.life.since_s or now_s for request in self._running.values())
        return max(0.0, sum(map(self.run_s, self._running.values())) - (now_s - began_s))

    def wait_s(self, request: Request, now_s: float) -> float:
        """When a request that has just come should be on stage.

        After all that is ahead of it in the fair order, and later by as much as others lately were, whom some
        that came after them went before.
        """
        free_s = self.stage_free_in_s(now_s)
        ahead, some = self._queue.ahead_of(request, _SAMPLED)
        work_s = sum(map(self.run_s, some)) * ahead / max(1, len(some))
        model = self._residency.models[request.model]
        request.expected_wait_s = max(free_s + work_s, self.ready_in_s(model, now_s))
        return self.estimates.wait_s(request.expected_wait_s)

    # -- models -------------------------------------------------------------------------------------

    def ready_in_s(self, model: Model, now_s: float) -> float:
        """When the model could go on deck if a loader began now with what it lacks, blob after blob."""
        load_s = sum(self._blob_s(blob, now_s) for blob in dict.fromkeys(model.needed()))
        estimates = self.estimates
        match model.parts.state:
            case PartsState.UNPREPARED:
                return max(load_s, estimates.prepare_s)
            case PartsState.PREPARING:
                return max(load_s, estimates.prepare_s - (now_s - (model.parts.since_s or now_s)))
            case _:
                return load_s

    def _blob_s(self, blob: Blob, now_s: float) -> float:
        match blob.state:
            case BlobState.RESIDENT | BlobState.MOVING | BlobState.DAMAGED:
                return 0.0
            case BlobState.VIEWING:
                return self.estimates.views_s
            case BlobState.LOADING if blob.load_id is not None:
                load = self._residency.loads[blob.load_id]
                load_s = self.estimates.load_s(
                    blob.info.size_bytes, from_pool=load.from_pool, has_company=load.had_company
                )
                return max(0.0, load_s - (now_s - load.started_at_s)) + self.estimates.views_s
            case BlobState.FOLDING if (fold := self._residency.folds.under_way) is not None:
                fold_s = self.estimates.fold_s(blob.info.size_bytes)
                return max(0.0, fold_s - (now_s - fold.started_at_s)) + self.estimates.views_s
            case _ if blob.is_overlay:
                return self.estimates.fold_s(blob.info.size_bytes) + self.estimates.views_s
            case _:
                load_s = self.estimates.load_s(blob.info.size_bytes, from_pool=blob.has_copy)
                return load_s + self.estimates.views_s
