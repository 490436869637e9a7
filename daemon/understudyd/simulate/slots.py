"""Eviction judged alone: one request at a time in trace order, equal slots, no queue, no prefetch.

What LRU misses here is what a system without a forecast loads, what Belady's rule (1966: evict what is needed
last) misses is the least that anybody can. The core's forecast evicts whose chance is the lowest.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from understudyd.core.forecast import Forecast
from understudyd.recorded import TraceRequest
from understudyd.simulate.references import Valuing


@dataclass(frozen=True, slots=True)
class Misses:
    """Loads of each way to evict, first loads included, in percent of the requests."""

    requests: int
    slots: int
    forecast_percent: float
    lru_percent: float
    belady_percent: float

    @property
    def way_percent(self) -> float:
        """How far the forecast comes on the way from LRU (0) to Belady (100)."""
        way = self.lru_percent - self.belady_percent
        return 100.0 * (self.lru_percent - self.forecast_percent) / way if way > 0 else 100.0


def next_uses(models: Iterable[str]) -> "array[int]":
    """For each request the number of the next one for the same model; the number of requests if none."""
    last: dict[str, int] = {}
    following = array("q")
    for i, model in enumerate(models):
        if model in last:
            following[last[model]] = i
        last[model] = i
        following.append(-1)
    end = len(following)
    for i in last.values():
        following[i] = end
    return following


def compare(
    requests: Iterable[TraceRequest],
    following: Sequence[int],
    slots: int,
    forecast: Forecast | Valuing | None = None,
) -> Misses:
    """Play all requests to the three. `following` is `next_uses` of the same requests."""
    forecast = forecast or Forecast()
    ours: set[str] = set()
    recent: OrderedDict[str, None] = OrderedDict()
    needed: dict[str, int] = {}
    our_misses = recent_misses = belady_misses = count = 0
    for count, request in enumerate(requests, 1):
        model = request.model
        forecast.saw(model, client=request.client, now_s=request.arrival_s)
        if model not in ours:
            our_misses += 1
            if len(ours) == slots:
                ours.remove(min(ours, key=lambda name: (forecast.chance(name), name)))
            ours.add(model)
        if model in recent:
            recent.move_to_end(model)
        else:
            recent_misses += 1
            if len(recent) == slots:
                recent.popitem(last=False)
            recent[model] = None
        if model not in needed:
            belady_misses += 1
            if len(needed) == slots:
                del needed[max(needed, key=needed.__getitem__)]
        needed[model] = following[count - 1]
    per_request = 100.0 / max(1, count)
    return Misses(
        count, slots, our_misses * per_request, recent_misses * per_request, belady_misses * per_request
    )
