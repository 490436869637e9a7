"""What is counted for the metrics while the daemon serves: a few additions a request, a load or a fold.

Only the event loop's thread adds and reads. `metrics.py` tells it to Prometheus.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate

from understudy.trace import CANCELLED, FAILED, LOST
from understudy.wire import Timings
from understudyd.core import events as ev
from understudyd.core.types import Tier

OTHER = "other"
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
SWITCH_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 25.0)
LOAD_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FOLD_BUCKETS_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_FINISHED = "finished"
_FOLD_ENDINGS = {ev.FoldFinished: _FINISHED, ev.FoldFailed: FAILED, ev.FoldCancelled: CANCELLED}
_FACTOR = 2
FoldEnding = ev.FoldFinished | ev.FoldFailed | ev.FoldCancelled


class Histogram:
    """How many values were at most each of the bounds, as Prometheus counts them, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """One value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound as text and how many values it does not exceed, the last "+Inf"."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return [(bound, float(count)) for bound, count in zip(bounds, accumulate(self._counts), strict=True)]


class ModelLabels:
    """Which models have series of their own: at most `most`, all others share the label "other".

    A place is given away only to a model that was asked for twice as often as the one that has it, so that
    places are those of the most asked for, about, and seldom change hands (the idea of Space-Saving:
    Metwally, Agrawal and El Abbadi, 2005, with exact counts and a hysteresis). What one was counted for under
    "other" stays there: no series ever goes down.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._asked: Counter[str] = Counter()
        self.named: set[str] = set()
        self.displaced: list[str] = []

    def label(self, model: str) -> str:
        """The label of a model that was asked for."""
        self._asked[model] += 1
        if model not in self.named and not self._take_place(model):
            return OTHER
        return model

    def _take_place(self, model: str) -> bool:
        if len(self.named) < self._most:
            self.named.add(model)
            return True
        least = min(self.named, key=lambda name: (self._asked[name], name), default=None)
        if least is None or self._asked[model] < _FACTOR * self._asked[least]:
            return False
        self.named.remove(least)
        self.named.add(model)
        self.displaced.append(least)
        return True

    def forget(self, model: str) -> None:
        """There is no such model any more."""
        self._asked.pop(model, None)
        if model in self.named:
            self.named.remove(model)
            self.displaced.append(model)


class Meter:
    """Requests and folds. `requests` by model's label and outcome, `run_s` by label."""

    def __init__(self, most_models: int = 50) -> None:
        self.labels = ModelLabels(most_models)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.run_s: defaultdict[str, float] = defaultdict(float)
        self.by_tier: Counter[str] = Counter(dict.fromkeys(map(str, Tier), 0))
        self.wait = Histogram(REQUEST_BUCKETS_S)
        self.run = Histogram(REQUEST_BUCKETS_S)
        self.total = Histogram(REQUEST_BUCKETS_S)
        self.switches: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(SWITCH_BUCKETS_S))
        self.folds: Counter[str] = Counter(dict.fromkeys(_FOLD_ENDINGS.values(), 0))
        self.fold = Histogram(FOLD_BUCKETS_S)

    def finished(self, model: str, tier: str, timings: Timings, *, switched: bool) -> None:
        """A request has its images; `tier` is where the model was when it came."""
        label = self._count(model, _FINISHED)
        self.run_s[label] += timings.run_s
        self.by_tier[tier] += 1
        self.wait.add(timings.queued_s + timings.switch_s)
        self.run.add(timings.run_s)
        self.total.add(timings.total_s)
        if switched and timings.gap_s is not None:
            self.switches[tier].add(timings.gap_s)

    def failed(self, model: str | None, code: str) -> None:
        """A request has an error's code for an answer; None is a model that there is not."""
        if model is None:
            self.requests[OTHER, code] += 1
        else:
            self._count(model, code)

    def folded(self, ending: FoldEnding, seconds: float) -> None:
        """A fold has ended."""
        self.folds[_FOLD_ENDINGS[type(ending)]] += 1
        if isinstance(ending, ev.FoldFinished):
            self.fold.add(seconds)

    def forget(self, model: str) -> None:
        """It was removed."""
        self.labels.forget(model)
        self._drop_displaced()

    def _count(self, model: str, outcome: str) -> str:
        label = self.labels.label(model)
        self._drop_displaced()
        self.requests[label, outcome] += 1
        return label

    def _drop_displaced(self) -> None:
        """Their series end."""
        while self.labels.displaced:
            gone = self.labels.displaced.pop()
            self.run_s.pop(gone, None)
            for key in [key for key in self.requests if key[0] == gone]:
                del self.requests[key]


class LoadMeter:
    """Loads, by route ("disk_to_host_to_arena") and by how they ended."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(LOAD_BUCKETS_S))
        self.size_bytes: Counter[str] = Counter()
        self.endings: Counter[str] = Counter(dict.fromkeys((_FINISHED, FAILED, CANCELLED, LOST), 0))

    def ended(self, route: str, size_bytes: int, seconds: float, outcome: str) -> None:
        """A load by a route such as "disk > host > arena"; `outcome` is empty if it went well."""
        self.endings[outcome or _FINISHED] += 1
        route = route.replace(" > ", "_to_")
        if not outcome:
            self.seconds[route].add(seconds)
            self.size_bytes[route] += size_bytes
