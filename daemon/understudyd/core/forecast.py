"""What history says about the next request: the chance that it asks for a given model, or needs a blob.

A mixture of simple predictors: decayed counts over requests and over seconds, who followed whom, and which
clients are expected back. Their weights are learned online, by one step of expectation maximisation a
request: whoever gave what came the larger share gains (after Herbster and Warmuth, 1998, tracking the best
expert; the floor lets any of them come back). Nothing in it is tuned to a trace.
"""

from understudyd.core.predictors import Popularity, Predictor, Returns, Succession

HALF_LIVES_REQUESTS = (10.0, 100.0, 2000.0)
HALF_LIVES_S = (60.0, 300.0, 1800.0)
_STEP = 0.01
_FLOOR = 1e-3
_SURPRISE = 1e-6
_ESTIMATE_REQUESTS = 16


class Forecast:
    """Names of models and blobs alike; time in seconds never goes back."""

    def __init__(self) -> None:
        self.requests = 0
        self._now_s = 0.0
        self._by_requests = [Popularity(half_life) for half_life in HALF_LIVES_REQUESTS]
        self._by_time = [Popularity(half_life) for half_life in HALF_LIVES_S]
        self._succession = Succession()
        self._returns = Returns()
        self._predictors: list[Predictor] = [
            *self._by_requests,
            *self._by_time,
            self._succession,
            self._returns,
        ]
        self._weights = [1.0 / len(self._predictors)] * len(self._predictors)
        self._names: set[str] = set()
        self._models: dict[str, None] = {}
        self._estimates: dict[str, tuple[float, int]] = {}
        self._turn = 0
        self._ranked: list[str] = []
        self._ranked_at = -1

    def saw(self, *names: str, client: str = "", now_s: float = 0.0) -> None:
        """One request came, for all these names: the model first, then what else it needs."""
        self._now_s = now_s = max(self._now_s, now_s)
        self._returns.pass_time(now_s)
        if self.requests:
            self._weigh(names[0])
        self.requests += 1
        for counts in self._by_requests:
            counts.saw(names, float(self.requests))
        for counts in self._by_time:
            counts.saw(names, now_s)
        self._succession.saw(names)
        self._returns.saw(client, names, now_s)
        self._names.update(names)
        self._models[names[0]] = None
        for name in names:
            self._estimates.pop(name, None)

    def forget(self, name: str) -> None:
        """Nobody can, or should, count on this name any more."""
        if name in self._names:
            self._names.discard(name)
            self._models.pop(name, None)
            self._estimates.pop(name, None)
            self._ranked_at = -1
            for predictor in self._predictors:
                predictor.forget(name)

    def chance(self, name: str) -> float:
        """About the probability (0 to 1) that the next request asks for `name`."""
        if name not in self._names:
            return 0.0
        shares = [predictor.share(name) for predictor in self._predictors]
        return sum(map(float.__mul__, self._weights, shares))

    def inherit(self, name: str, source: str) -> None:
        """`name` is new and takes its part in whatever `source` was asked for."""
        if name not in self._names and source in self._names:
            self._names.add(name)
            for predictor in self._predictors:
                predictor.inherit(name, source)

    def estimate(self, name: str) -> float:
        """`chance` as it was at most a few dozen requests ago: for going over hundreds at every load.

        Names fall due one after the other, so that no request pays for all; who is asked for is at once.
        """
        known = self._estimates.get(name)
        if known is not None and self.requests < known[1]:
            return known[0]
        chance = self.chance(name)
        self._turn = (self._turn + 1) % _ESTIMATE_REQUESTS
        self._estimates[name] = (chance, self.requests + _ESTIMATE_REQUESTS + self._turn)
        return chance

    def ranked(self) -> list[str]:
        """Models that were ever asked for, likeliest first.

        Ranking a thousand models takes milliseconds, so the answer may be as many requests old as a
        sixteenth of the models; with fewer than 32 it is always fresh.
        """
        age = self.requests - self._ranked_at
        if self._ranked_at < 0 or age >= max(1, len(self._models) // 16):
            chances = {name: self.chance(name) for name in self._models}
            self._ranked = sorted(chances, key=lambda name: (-chances[name], name))
            self._ranked_at = self.requests
        return self._ranked

    def _weigh(self, name: str) -> None:
        """Who expected this gains weight."""
        gains = [
            weight * (predictor.share(name) + _SURPRISE)
            for weight, predictor in zip(self._weights, self._predictors)
        ]
        step, total = max(_STEP, 1.0 / (self.requests + 20.0)), sum(gains)
        weights = [
            max(_FLOOR, weight + step * (gain / total - weight)) for weight, gain in zip(self._weights, gains)
        ]
        self._weights = [weight / sum(weights) for weight in weights]
