"""What history says about the next request: the chance that it asks for a given model, or needs a blob.

Per name, counts that decay with half-lives of 5, 50 and 500 requests, mixed: bursts, sessions and
lasting popularity (after LRFU, Lee et al. 2001, which spans LRU and LFU with one decay; several at
once need no tuning). Time is counted in requests, so that a quiet night forgets nothing.
"""

import math
from dataclasses import dataclass, field, replace

HALF_LIVES_REQUESTS = (5.0, 50.0, 500.0)
_BURST, _SESSION, _LASTING = (math.pow(0.5, 1.0 / h) for h in HALF_LIVES_REQUESTS)


@dataclass(slots=True)
class _Counts:
    """Decayed counts, one per half-life, as they stood at request number `at_request`."""

    at_request: int
    burst: float = 0.0
    session: float = 0.0
    lasting: float = 0.0


@dataclass(slots=True)
class Forecast:
    """Decayed request counts per name."""

    requests: int = 0
    _counts: dict[str, _Counts] = field(default_factory=dict)
    _ranked: list[str] = field(default_factory=list)
    _ranked_at: int = -1

    def saw(self, *names: str) -> None:
        """One request came, for all these names."""
        self.requests += 1
        for name in names:
            counts = self._counts.setdefault(name, _Counts(self.requests))
            age = self.requests - counts.at_request
            counts.at_request = self.requests
            counts.burst = counts.burst * _BURST**age + 1.0
            counts.session = counts.session * _SESSION**age + 1.0
            counts.lasting = counts.lasting * _LASTING**age + 1.0

    def forget(self, name: str) -> None:
        """Nobody can, or should, count on this name any more."""
        if self._counts.pop(name, None) is not None:
            self._ranked_at = -1

    def inherit(self, name: str, other: "Forecast", source: str) -> None:
        """`name` is new and expected as often as `source`, in `other`, which saw the same requests."""
        counts = other._counts.get(source)
        if counts is not None and name not in self._counts:
            self._counts[name] = replace(counts)
            self._ranked_at = -1

    def chance(self, name: str) -> float:
        """About the probability (0 to 1) that the next request asks for `name`.

        A count decaying by d per request has the steady value p / (1 - d) for a name of probability
        p; the three estimates are averaged.
        """
        counts = self._counts.get(name)
        if counts is None:
            return 0.0
        age = self.requests - counts.at_request
        return (
            counts.burst * _BURST**age * (1.0 - _BURST)
            + counts.session * _SESSION**age * (1.0 - _SESSION)
            + counts.lasting * _LASTING**age * (1.0 - _LASTING)
        ) / 3.0

    def ranked(self) -> list[str]:
        """Names that were ever asked for, likeliest first.

        Ranking a thousand names takes a millisecond, so the answer may be as many requests old as a
        sixteenth of the names; with fewer than 32 names it is always fresh.
        """
        age = self.requests - self._ranked_at
        if self._ranked_at < 0 or age >= max(1, len(self._counts) // 16):
            chances = {name: self.chance(name) for name in self._counts}
            self._ranked = sorted(chances, key=lambda name: (-chances[name], name))
            self._ranked_at = self.requests
        return self._ranked
