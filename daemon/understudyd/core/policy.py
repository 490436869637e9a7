"""What to run next, what to load next, what to evict: every judgement of the core, and no bookkeeping.

The order in which waiting requests are expected to run is used for all three:

1. *pressing* requests by arrival: those that were overtaken half as often, or waited half as long, as the
   bounds allow. They are loaded for first, so that they are ready before a bound is reached.
2. requests whose model is ready, the one on stage first, by priority and arrival;
3. the others by priority and arrival.

A request at a bound is never overtaken again, whatever the others' priority, unless nothing can be done
for its model at the moment (a pause after a failed load, or no loader lives). Loading for a request may
evict only what no request before it in this order needs.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Literal

from understudyd.core.entities import Blob, Model
from understudyd.core.extents import Extent, Prices
from understudyd.core.forecast import Forecast
from understudyd.core.queueing import Request, RequestQueue
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState

Order = Literal["resident_first", "fcfs"]

PRESSING_SHARE = 0.5
_RELOAD_FROM_POOL = 0.2

Need = tuple[int, int, bool, int]
"""Class, negative priority, whether the stage changes over, arrival: sorts as things are expected to run."""

_STRICT = _PRESSING = 0
_READY, _REST, _WISHED = range(1, 4)
LAST: Need = (_WISHED + 1, 0, False, 0)


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What an operator may choose.

    `lookahead` counts models loaded ahead of the stage; 0 loads on demand, when the stage is free.
    `max_wait_s` and `max_skips` bound overtaking. `prefetch` fills free memory by forecast.
    While a request of at least `pause_priority` runs, loads rest; None: they never do.
    """

    order: Order = "resident_first"
    lookahead: int = 4
    max_wait_s: float = 30.0
    max_skips: int = 64
    prefetch: bool = True
    pause_priority: int | None = None

    def reaches(self, request: Request, now_s: float, share: float) -> bool:
        """The request was overtaken so often, or waited so long, as this share of the bounds."""
        return (
            request.skips >= self.max_skips * share
            or now_s >= request.received_at_s + self.max_wait_s * share
        )


class Policy:
    """Judgements over the queue, the models and the forecast."""

    def __init__(self, settings: PolicySettings, forecast: Forecast) -> None:
        self.settings = settings
        self.forecast = forecast

    # -- what history says --------------------------------------------------------------------------

    def saw(self, model: Model, client: str, now_s: float) -> None:
        """A request for the model was admitted. Blobs are forecast as models are: shared ones count once."""
        keys = dict.fromkeys(blob.key for blob in model.blobs)
        self.forecast.saw(model.name, *keys, client=client, now_s=now_s)

    def forget(self, model: Model) -> None:
        """The model is retired; blobs that it shares stay in demand."""
        self.forecast.forget(model.name)
        self.forget_blobs(model)

    def replaced(self, model: Model) -> None:
        """The name stands for this model now: what was asked of the old one is expected of it."""
        for blob in model.blobs:
            self.forecast.inherit(blob.key, model.name)

    def forget_blobs(self, model: Model) -> None:
        """Nobody needs those blobs of a retired edition that no model has any more."""
        for blob in model.blobs:
            if not blob.models:
                self.forecast.forget(blob.key)

    def copy_worth(self, queue: RequestQueue, blob: Blob) -> float:
        """The chance that a host copy of the blob saves a read; infinite while somebody waits for it."""
        if blob.state is not BlobState.RESIDENT and not queue.models().isdisjoint(blob.models):
            return float("inf")
        return self.forecast.estimate(blob.key)

    # -- what rests ---------------------------------------------------------------------------------

    def is_critical(self, request: Request) -> bool:
        """Its latency matters more than what loads meanwhile."""
        least = self.settings.pause_priority
        return least is not None and request.info.priority >= least

    def critical_waits_for_load(self, queue: RequestQueue, residency: Residency) -> bool:
        """Pausing loads would hold up a request that matters as much."""
        critical = (request for request in queue.heads() if self.is_critical(request))
        return any(request.model not in residency.ready for request in critical)

    # -- what runs next -----------------------------------------------------------------------------

    def is_bound_reached(self, request: Request, now_s: float) -> bool:
        """The request must not be overtaken any more."""
        return self.settings.reaches(request, now_s, 1.0)

    def next_to_run(
        self, queue: RequestQueue, residency: Residency, on_stage: str | None, now_s: float
    ) -> Request | None:
        """The request to put on deck now, or None when the stage should wait."""
        ready = residency.ready
        if self.settings.order == "fcfs":
            first = next(queue.heads(), None)
            return first if first is not None and first.model in ready else None
        for request in queue.waiting():
            if not self.is_bound_reached(request, now_s):
                break
            if not residency.is_held_up(residency.models[request.model], now_s):
                return request if request.model in ready else None
        best = next((r for r in queue.heads() if r.model in ready), None)
        staged = queue.head_of(on_stage)
        if best is None or staged is None or staged.info.priority < best.info.priority:
            return best
        return staged if staged.model in ready else best

    # -- what is loaded next ------------------------------------------------------------------------

    def expected_order(
        self, queue: RequestQueue, models: dict[str, Model], on_stage: str | None, now_s: float
    ) -> list[str]:
        """Waiting models, each once, in the order in which they are expected to run."""
        needs = Needs(self.settings, queue, models, on_stage, now_s)
        return sorted(queue.models(), key=needs.rank)

    def to_load(
        self, queue: RequestQueue, ready: Container[str], stage_is_busy: bool, now_s: float
    ) -> list[str]:
        """The models to have loaded now: the first `lookahead` of the expected order that are not ready."""
        if self.settings.lookahead == 0 and stage_is_busy:
            return []
        names: dict[str, None] = {}
        for request in self.expected_to_load(queue, now_s):
            if (name := request.info.model) not in ready:
                names[name] = None
                if len(names) >= max(1, self.settings.lookahead):
                    break
        return list(names)

    def expected_to_load(self, queue: RequestQueue, now_s: float) -> Iterator[Request]:
        """The expected order of what is not ready; models may come twice."""
        if self.settings.order == "resident_first":
            yield from self._pressing(queue, now_s)
        yield from queue.heads()

    def next_change_s(self, queue: RequestQueue, handled_at_s: float) -> float | None:
        """When a request becomes pressing by time alone."""
        age_s = self.settings.max_wait_s * PRESSING_SHARE
        request = queue.first_younger_than(age_s, handled_at_s)
        if request is None or self.settings.order == "fcfs":
            return None
        return request.received_at_s + age_s

    # -- what is evicted ----------------------------------------------------------------------------

    def prices(self, residency: Residency, needs: "Needs", requester: str) -> Iterator[Prices]:
        """What evicting each extent loses, for a load on behalf of the model `requester`: twice.

        First what nobody waits for, which is nearly always enough and cheaper to find out; then what is
        needed later, too. Below 1: the chance that it is asked for next, so the sum over a window is the
        expected number of reloads caused, the same bytes being gained; one from the host pool counts a fifth.
        From 1e6: what something later needs, the later the cheaper. What is needed sooner stays, or as soon:
        the requester's own blobs must not evict each other.
        """
        awaited = needs.awaited
        evictable, estimate = residency.evictable, self.forecast.estimate
        spare: dict[Extent, float] = {}
        needed: list[tuple[Extent, Blob]] = []
        for extent in residency.arena:
            if (blob := evictable(extent)) is None:
                continue
            if awaited.isdisjoint(blob.models):
                spare[extent] = estimate(extent.blob) * (_RELOAD_FROM_POOL if blob.has_copy else 1.0)
            else:
                needed.append((extent, blob))
        yield spare
        rank = needs.rank
        limit = rank(requester)
        sooner = awaited & residency.ready.keys()
        if limit[0] <= _READY:
            sooner = {name for name in sooner if rank(name) < limit}
        kept = {blob.info.key for name in sooner for blob in residency.models[name].blobs}
        later = [
            (need, extent)
            for extent, blob in needed
            if extent.blob not in kept and (need := min(map(rank, awaited & blob.models))) > limit
        ]
        place = {need: i for i, need in enumerate(sorted({need for need, _ in later}, reverse=True))}
        yield spare | {extent: 1e6 * (1 + place[need]) for need, extent in later}

    # -- inside -------------------------------------------------------------------------------------

    def _pressing(self, queue: RequestQueue, now_s: float) -> Iterator[Request]:
        skips, wait_s = self.settings.max_skips * PRESSING_SHARE, self.settings.max_wait_s * PRESSING_SHARE
        for request in queue.oldest_of_models():  # `reaches`, written out: these may be hundreds an event
            if request.skips < skips and now_s < request.received_at_s + wait_s:
                return
            yield request


class Needs:
    """How soon each model is expected to run, at one moment; found out once and when asked.

    `wanted` are the models that an operator wants: they come after all that waits.
    """

    def __init__(
        self,
        settings: PolicySettings,
        queue: RequestQueue,
        models: Mapping[str, Model],
        on_stage: str | None,
        now_s: float,
        wanted: Iterable[str] = (),
    ) -> None:
        self._settings, self._queue, self._models = settings, queue, models
        self._on_stage = on_stage
        self._pressing_skips = settings.max_skips * PRESSING_SHARE
        self._pressing_wait_s = settings.max_wait_s * PRESSING_SHARE
        self._now_s = now_s
        self._wished = {name: i for i, name in enumerate(wanted)}
        self._ranks: dict[str, Need] = {}
        self.awaited: Set[str] = queue.models() | self._wished.keys() if self._wished else queue.models()

    def rank(self, name: str) -> Need:
        """The smaller the sooner; LAST when nobody waits for the model."""
        if name not in self._ranks:
            self._ranks[name] = self._find(name)
        return self._ranks[name]

    def _find(self, name: str) -> Need:
        group = self._queue.groups.get(name)
        if group is None:
            return (_WISHED, 0, False, self._wished[name]) if name in self._wished else LAST
        head, oldest = group.head, group.oldest
        priority = head.info.priority
        if self._settings.order == "fcfs":
            return (_STRICT, -priority, False, head.seq)
        if (
            oldest.skips >= self._pressing_skips
            or self._now_s >= oldest.received_at_s + self._pressing_wait_s
        ):
            return (_PRESSING, 0, False, oldest.seq)
        if self._models[name].is_ready:
            return (_READY, -priority, name != self._on_stage, head.seq)
        return (_REST, -priority, False, head.seq)
