"""What to run next, what to load next, what to evict: every judgement of the core, and no bookkeeping.

The order in which waiting requests are expected to run is computed once and used for all three:

1. *pressing* requests by arrival: those that were overtaken half as often, or waited half as long, as the
   bounds allow. They are loaded for first, so that they are ready before a bound is reached.
2. requests whose model is ready, the one on stage first, by priority and arrival;
3. the others by priority and arrival.

A request at a bound is never overtaken again, whatever the others' priority, unless nothing can be done
for its model at the moment (a pause after a failed load). Loading for a request may evict only what no
request before it in this order needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from understudyd.core.entities import Blob, Model
from understudyd.core.extents import Extent
from understudyd.core.forecast import Forecast
from understudyd.core.queueing import Request, RequestQueue
from understudyd.core.residency import Price, Residency

Order = Literal["resident_first", "fcfs"]


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What an operator may choose.

    `lookahead` counts models loaded ahead of the stage; 0 loads on demand, when the stage is free.
    `max_wait_s` and `max_skips` bound overtaking. `prefetch` fills free memory by forecast.
    """

    order: Order = "resident_first"
    lookahead: int = 4
    max_wait_s: float = 30.0
    max_skips: int = 64
    prefetch: bool = True


class Policy:
    """Pure judgements over the queue, the models and the forecast."""

    def __init__(self, settings: PolicySettings, forecast: Forecast) -> None:
        self.settings = settings
        self.forecast = forecast

    # -- what runs next -----------------------------------------------------------------------------

    def is_bound_reached(self, request: Request, now_s: float) -> bool:
        """The request must not be overtaken any more."""
        return self._reaches(request, now_s, 1.0)

    def next_to_run(
        self, queue: RequestQueue, residency: Residency, on_stage: str | None, now_s: float
    ) -> Request | None:
        """The request to put on deck now, or None when the stage should wait."""
        models = residency.models
        oldest = queue.oldest()
        if oldest is None:
            return None
        if self.settings.order == "fcfs":
            first = min(queue.heads())
            return first if models[first.model].is_ready else None
        held_up = residency.is_held_up(models[oldest.model], now_s)
        if self.is_bound_reached(oldest, now_s) and not held_up:
            return oldest if models[oldest.model].is_ready else None
        runnable = [r for r in queue.heads() if models[r.model].is_ready]
        return min(runnable, key=lambda r: self._run_rank(r, on_stage), default=None)

    # -- what is loaded next ------------------------------------------------------------------------

    def expected_order(
        self, queue: RequestQueue, models: dict[str, Model], on_stage: str | None, now_s: float
    ) -> list[str]:
        """Waiting models, each once, in the order in which they are expected to run."""
        heads = queue.heads()
        if self.settings.order == "fcfs":
            return [r.model for r in sorted(heads)]
        pressing: dict[str, None] = {}
        for request in queue.waiting():
            if not self._reaches(request, now_s, 0.5):
                break
            pressing[request.model] = None
        ready = [r for r in heads if models[r.model].is_ready and r.model not in pressing]
        rest = [r for r in heads if not models[r.model].is_ready and r.model not in pressing]
        ready.sort(key=lambda r: self._run_rank(r, on_stage))
        return [*pressing, *(r.model for r in ready), *(r.model for r in sorted(rest))]

    def to_load(self, expected: Sequence[str], models: dict[str, Model], stage_is_busy: bool) -> list[str]:
        """The models of `expected` to have loaded now: the first `lookahead` that are not ready."""
        if self.settings.lookahead == 0:
            return [] if stage_is_busy else list(expected[:1])
        return [name for name in expected if not models[name].is_ready][: self.settings.lookahead]

    # -- what is evicted ----------------------------------------------------------------------------

    def price(
        self, evictable: Callable[[Extent], Blob | None], expected: Sequence[str], requester: str | None
    ) -> Price:
        """What evicting an extent loses, for a load on behalf of `requester` (None: nobody waits).

        None: it must stay. Below 1: the chance that one of its models is asked for next, so the sum over a
        window is the expected number of reloads caused, the same bytes being gained. From 1e6: a later
        request waits for it, the later the cheaper.
        """
        needed_at: dict[str, int] = {name: i for i, name in enumerate(expected)}
        allowed_from = needed_at.get(requester, len(expected)) if requester is not None else len(expected)

        def of(extent: Extent) -> float | None:
            blob = evictable(extent)
            if blob is None:
                return None
            first = min((needed_at[m] for m in blob.models if m in needed_at), default=None)
            if first is None:
                return sum(self.forecast.chance(m) for m in blob.models)
            if first <= allowed_from:
                return None
            return 1e6 * (1 + len(expected) - first)

        return of

    # -- inside -------------------------------------------------------------------------------------

    def _reaches(self, request: Request, now_s: float, share: float) -> bool:
        waited_s = now_s - request.received_at_s
        return (
            request.skips >= self.settings.max_skips * share or waited_s >= self.settings.max_wait_s * share
        )

    @staticmethod
    def _run_rank(request: Request, on_stage: str | None) -> tuple[int, bool, int]:
        return (-request.info.priority, request.model != on_stage, request.seq)
