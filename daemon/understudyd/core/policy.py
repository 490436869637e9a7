"""What to run next, what to load next, what to evict: every judgement of the core, and no bookkeeping.

Requests stand in the fair order (`fairness.py`), which is that of arrival while one client asks at one
priority. The order in which they are expected to run is used for all three:

1. *pressing* requests in the fair order: those that were overtaken half as often, or have waited half as long
   since their turn came, as the bounds allow, and those that a client passed which is far ahead of its share.
   They are loaded for first, so that they are ready before a bound is reached.
2. requests whose model is ready, by priority, the one on stage first, and in the fair order;
3. the others by priority and in the fair order.

The bound: from `max_wait_s` after its turn came, or once `max_skips` requests that are behind it in the fair
order went on deck before it, no request behind it does so any more, whatever its priority, unless nothing can
be done for its model at the moment (a pause after a failed load, or no loader lives). Nobody is overtaken by
who is ahead of it in the fair order, however late that came. Loading for a request may evict only what no
request before it in this order needs.

A deadline ends a request; it does not bring it forward. Else who asks for the earliest went first, and
everybody would learn to ask for it: urgency is what priorities are for.
"""

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from typing import Literal

from understudyd.core.demand import Demand, Need, is_pressing
from understudyd.core.entities import Model
from understudyd.core.extents import Extent
from understudyd.core.forecast import Forecast
from understudyd.core.patience import Limits
from understudyd.core.queueing import RequestQueue
from understudyd.core.request import Request
from understudyd.core.residency import Residency
from understudyd.core.states import IllegalEvent
from understudyd.core.windows import Priced

Order = Literal["resident_first", "fcfs"]

PRESSING_SHARE = 0.5


_LATER = 1e6
_SOONER, _SOONEST = 1.5, 1e300
"""What something needs one place sooner costs so much more: rather lose what two need later."""


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

    def limits(self, share: float) -> Limits:
        """A share of the bounds; none when nobody may be overtaken anyway."""
        if self.order == "fcfs":
            return Limits(math.inf, math.inf)
        return Limits(self.max_skips * share, self.max_wait_s * share)

    def queue(self, max_waiting: int) -> RequestQueue:
        """An empty queue that keeps the orders which these settings ask for."""
        is_fair = self.order != "fcfs"
        return RequestQueue(max_waiting, self.limits(PRESSING_SHARE), self.limits(1.0), is_fair=is_fair)


class Policy:
    """Judgements over the queue, the models and the forecast."""

    def __init__(self, settings: PolicySettings, forecast: Forecast) -> None:
        self.settings = settings
        self.forecast = forecast

    def change(self, settings: PolicySettings) -> None:
        """An operator chose anew. Raises `IllegalEvent` for what the queue was built for."""
        now = self.settings
        kept = replace(settings, order=now.order, max_wait_s=now.max_wait_s, max_skips=now.max_skips)
        if kept != settings:
            raise IllegalEvent("the order of the queue and the bounds on overtaking are chosen at the start")
        self.settings = settings

    # -- what history says --------------------------------------------------------------------------

    def saw(self, model: Model, client: str, now_s: float) -> None:
        """A request for the model was admitted. Blobs are forecast as models are: shared ones count once."""
        keys = dict.fromkeys(blob.key for blob in model.all_blobs)
        self.forecast.saw(model.name, *keys, client=client, now_s=now_s)

    def forget(self, model: Model) -> None:
        """The model is retired; blobs that it shares stay in demand."""
        self.forecast.forget(model.name)
        self.forget_blobs(model)

    def replaced(self, model: Model) -> None:
        """The name stands for this model now: what was asked of the old one is expected of it."""
        for blob in model.all_blobs:
            self.forecast.inherit(blob.key, model.name)

    def forget_blobs(self, model: Model) -> None:
        """Nobody needs those blobs of a retired edition that no model has any more."""
        for blob in model.all_blobs:
            if not blob.models:
                self.forecast.forget(blob.key)

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

    def next_to_run(
        self, queue: RequestQueue, residency: Residency, on_stage: str | None, now_s: float
    ) -> Request | None:
        """The request to put on deck now, or None when the stage should wait."""
        ready = residency.ready
        if self.settings.order == "fcfs":
            first = next(queue.heads(), None)
            return first if first is not None and first.model in ready else None
        for bound in queue.bound.heads():
            if not residency.is_held_up(residency.models[bound.model], now_s):
                best = bound if bound.model in ready else None
                return next((r for r in queue.heads_up_to(bound) if r.model in ready), best)
        best = next((r for r in queue.heads() if r.model in ready), None)
        staged = queue.head_of(on_stage)
        if best is None or staged is None or staged.info.priority < best.info.priority:
            return best
        if staged.model not in ready:
            return best
        return next((r for r in queue.wronged_by(staged) if r.model in ready), staged)

    def may_come_along(
        self, queue: RequestQueue, residency: Residency, request: Request, now_s: float
    ) -> bool:
        """The request may go on deck with one that just did, for the same run: it passes nobody who is at the
        bound, nor anybody ready whom its client would wrong. In order of arrival it must be the very next.
        """
        if self.settings.order == "fcfs":
            return next(queue.heads(), None) is request
        for bound in queue.bound.heads():
            if bound.turn < request.turn and not residency.is_held_up(residency.models[bound.model], now_s):
                return False
        return not any(r.model in residency.ready for r in queue.wronged_by(request))

    # -- what is loaded next ------------------------------------------------------------------------

    def expected_order(self, queue: RequestQueue, demand: Demand, on_stage: str | None) -> list[str]:
        """Waiting models, each once, in the order in which they are expected to run."""
        return sorted(queue.models(), key=lambda name: demand.need(name, on_stage))

    def to_load(self, demand: Demand, stage_is_busy: bool) -> list[str]:
        """The models to have loaded now: the first `lookahead` of the expected order that are not ready."""
        if self.settings.lookahead == 0 and stage_is_busy:
            return []
        return list(islice(demand.lacking(), max(1, self.settings.lookahead)))

    # -- what is evicted ----------------------------------------------------------------------------

    def candidates(
        self, residency: Residency, demand: Demand, requester: str, on_stage: str | None
    ) -> Iterator[Priced]:
        """What may be evicted for a load on behalf of the model `requester`, the cheapest first.

        First what nobody waits for, which is nearly always enough; found out as far as it is asked for.
        Below 1: the chance that it is asked for next, so the sum over a window is the expected number of
        reloads caused, the same bytes being gained; one from the host pool counts a fifth. From 1e6: what
        something later needs, the later the cheaper by far, so that little of it is looked at. What is needed
        sooner stays, or as soon: the requester's own blobs must not evict each other.
        """
        evictables = residency.evictables
        evictables.file()
        evictables.spare.refresh(demand.looked_at, demand.moment)
        for price, _, extent in evictables.spare.entries:
            yield price, extent
        limit = demand.need(requester, on_stage)
        later: Iterable[tuple[Need, int, Extent]] = reversed(evictables.partial.entries)
        if is_pressing(limit):
            later = _merged(later, self._missed(residency, demand, limit, on_stage))
        price, last = _LATER, None
        for need, _, extent in later:
            if need <= limit:
                return
            if need != last:
                price, last = price * _SOONER if price < _SOONEST else price, need
            yield price, extent

    def _missed(
        self, residency: Residency, demand: Demand, limit: Need, on_stage: str | None
    ) -> Iterator[tuple[Need, int, Extent]]:
        """What models wait for that are ready: whoever is needed last loses first."""
        for need, name in demand.ready_last_first(on_stage):
            if need <= limit:
                return
            for blob in residency.models[name].blobs:
                if residency.evictables.may_leave(blob) and demand.soonest(blob, on_stage) == need:
                    assert blob.extent is not None
                    yield need, 0, blob.extent


def _merged(
    partial: Iterable[tuple[Need, int, Extent]], missed: Iterator[tuple[Need, int, Extent]]
) -> Iterator[tuple[Need, int, Extent]]:
    """Both, last needed first. Nearly all that is partial comes before all that is missed."""
    rest = iter(partial)
    for found in rest:
        if is_pressing(found[0]):
            yield from heapq.merge(chain([found], rest), missed, key=itemgetter(0), reverse=True)
            return
        yield found
    yield from missed
