"""What history says about the next request: the chance that it asks for a given model.

Per model, counts that decay with half-lives of 5, 50 and 500 requests, mixed: bursts, sessions and
lasting popularity (after LRFU, Lee et al. 2001, which spans LRU and LFU with one decay; several at
once need no tuning). Time is counted in requests, so that a quiet night forgets nothing.
"""

from dataclasses import dataclass, field

HALF_LIVES_REQUESTS = (5.0, 50.0, 500.0)
_DECAYS: tuple[float, ...] = tuple(0.5 ** (1.0 / h) for h in HALF_LIVES_REQUESTS)


@dataclass(slots=True)
class _Counts:
    at_request: int
    values: tuple[float, ...]


@dataclass(slots=True)
class Forecast:
    """Decayed request counts per model."""

    requests: int = 0
    _counts: dict[str, _Counts] = field(default_factory=dict)
    _ranked: list[str] | None = None

    def saw(self, model: str) -> None:
        """A request for `model` came."""
        self.requests += 1
        self._ranked = None
        counts = tuple(v + 1.0 for v in self._decayed(model))
        self._counts[model] = _Counts(self.requests, counts)

    def forget(self, model: str) -> None:
        """The model is gone."""
        self._counts.pop(model, None)
        self._ranked = None

    def chance(self, model: str) -> float:
        """About the probability (0 to 1) that the next request asks for `model`.

        A count decaying by d per request has the steady value p / (1 - d) for a model of probability
        p; the three estimates are averaged.
        """
        values = self._decayed(model)
        return sum((v * (1.0 - d) for v, d in zip(values, _DECAYS)), 0.0) / len(_DECAYS)

    def ranked(self) -> list[str]:
        """Models that were ever asked for, likeliest first."""
        if self._ranked is None:
            self._ranked = sorted(self._counts, key=lambda m: (-self.chance(m), m))
        return self._ranked

    def _decayed(self, model: str) -> tuple[float, ...]:
        counts = self._counts.get(model)
        if counts is None:
            return (0.0,) * len(_DECAYS)
        age = self.requests - counts.at_request
        return tuple(v * d**age for v, d in zip(counts.values, _DECAYS))
