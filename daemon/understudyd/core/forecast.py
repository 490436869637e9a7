"""What history says about the next request: the chance that it asks for a given model, or needs a blob.

A mixture of simple predictors: decayed counts over requests and over seconds, who followed whom, and which
clients are expected back. Their weights are learned online, by one step of expectation maximisation a
request: whoever gave what came the larger share gains (after Herbster and Warmuth, 1998, tracking the best
expert; the floor lets any of them come back). Nothing in it is tuned to a trace.

What was learned outlives the machine as a document in JSON's types: `document` and `restore`.
"""

from collections.abc import Container, Iterator
from heapq import nlargest
from typing import Any

from understudyd.core.predictors import Popularity, Predictor, Succession
from understudyd.core.ranking import LOOKED_AT, Ranking
from understudyd.core.remembered import DIGITS, DamagedDocument, field, numbers, rows, text, whole
from understudyd.core.returns import Returns

VERSION = 1
MOST_NAMES = 4000

HALF_LIVES_REQUESTS = (10.0, 100.0, 2000.0)
HALF_LIVES_S = (60.0, 300.0, 1800.0)
_STEP = 0.01
_FLOOR = 1e-3
_SURPRISE = 1e-6


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
        self._chances: dict[str, float] = {}
        self._ranking: Ranking[str] = Ranking(lambda name: (-self.chance(name), name))
        self._asked: dict[str, None] = {}

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
        self._models[names[0]] = self._asked[names[0]] = None
        self._chances.clear()

    def forget(self, name: str) -> None:
        """Nobody can, or should, count on this name any more."""
        if name in self._names:
            self._names.discard(name)
            self._models.pop(name, None)
            self._chances.clear()
            self._asked.pop(name, None)
            self._ranking.discard(name)
            for predictor in self._predictors:
                predictor.forget(name)

    def chance(self, name: str) -> float:
        """About the probability (0 to 1) that the next request asks for `name`."""
        chance = self._chances.get(name)
        if chance is None:
            if name not in self._names:
                return 0.0
            shares = [predictor.share(name) for predictor in self._predictors]
            chance = self._chances[name] = sum(map(float.__mul__, self._weights, shares))
        return chance

    def inherit(self, name: str, source: str) -> None:
        """`name` is new and takes its part in whatever `source` was asked for."""
        if name not in self._names and source in self._names:
            self._names.add(name)
            self._chances.clear()
            for predictor in self._predictors:
                predictor.inherit(name, source)

    def ranked(self) -> Iterator[str]:
        """Models that were ever asked for, likeliest first.

        Looking at a thousand takes milliseconds, so a few are looked at each time, and who was asked for.
        """
        for name in self._asked:
            self._ranking.put(name)
        self._asked.clear()
        self._ranking.refresh(LOOKED_AT, self.requests)
        return (name for _, name in self._ranking)

    def knows(self, name: str) -> bool:
        """The model was asked for."""
        return name in self._models

    # -- outliving the machine ----------------------------------------------------------------------

    @property
    def last_request_s(self) -> float:
        """When the last request came; 0 before the first."""
        return self._now_s

    def copy(self) -> "Forecast":
        """As it stands now, taken in a few milliseconds; fit for `document` on another thread."""
        made = Forecast()
        made.requests, made._now_s, made._weights = self.requests, self._now_s, list(self._weights)
        made._predictors = [predictor.copy() for predictor in self._predictors]
        made._names, made._models = set(self._names), dict(self._models)
        return made

    def document(self, most_names: int = MOST_NAMES) -> dict[str, Any]:
        """All that was learned, in JSON's types; with more names than `most_names` only of the likeliest."""
        kept = (
            self._names
            if len(self._names) <= most_names
            else set(nlargest(most_names, self._names, self.chance))
        )
        models = [name for name in self._models if name in kept]
        names = [*models, *sorted(kept - self._models.keys())]
        places = {name: place for place, name in enumerate(names)}
        return {
            "version": VERSION,
            "requests": self.requests,
            "models": len(models),
            "names": names,
            "weights": [round(weight, DIGITS) for weight in self._weights],
            "predictors": [predictor.document(places) for predictor in self._predictors],
        }

    def restore(self, document: Any, models: Container[str], blobs: Container[str], last_s: float) -> None:
        """Know what another life has learned, of these models and blobs; what this one did is forgotten.

        `last_s` is when the last request of that life came, on this life's clock. Raises `DamagedDocument`,
        and then nothing has changed.
        """
        if field(document, "version") != VERSION:
            raise DamagedDocument(f"another version than {VERSION}")
        made = Forecast()
        made.requests = whole(field(document, "requests"), "requests")
        made._now_s = last_s
        weights = numbers(field(document, "weights"), "weights", len(made._weights), _FLOOR / 2, 1.0)
        made._weights = [weight / sum(weights) for weight in weights]
        listed = [text(name, "a name") for name in rows(field(document, "names"), "names")]
        if len(set(listed)) < len(listed):
            raise DamagedDocument("a name comes twice")
        model_count = whole(field(document, "models"), "models", len(listed))
        names = [
            name if name in (models if place < model_count else blobs) else ""
            for place, name in enumerate(listed)
        ]
        parts = rows(field(document, "predictors"), "predictors", len(made._predictors))
        for predictor, part in zip(made._predictors, parts):
            now = float(made.requests) if predictor in made._by_requests else last_s
            predictor.restore(part, names, now)
        made._models = {name: None for name in names[:model_count] if name}
        made._asked = dict(made._models)
        made._names = {name for name in names if name}
        made._ranking = Ranking(lambda name: (-self.chance(name), name))
        vars(self).update(vars(made))  # whole or not at all

    # -- inside -------------------------------------------------------------------------------------

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
