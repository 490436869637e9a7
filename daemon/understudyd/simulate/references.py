"""Ways to value what lies in memory that everybody knows, in the place of the core's forecast.

They answer what the machine asks of `core.forecast.Forecast`. So the same machine, with the same order,
lookahead and loaders, can be played with least recently used, least frequently used, or the future itself
(Belady, 1966) for its forecast.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol, cast

import msgspec

from understudyd.core.forecast import Forecast
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.simulate.profiles import Figure, Profile


class Valuing(Protocol):
    """What the machine asks of a forecast."""

    def saw(self, *names: str, client: str = "", now_s: float = 0.0) -> None:
        """One request came, for all these names: the model's, then its blobs'."""

    def forget(self, name: str) -> None:
        """Nobody counts on it any more."""

    def chance(self, name: str) -> float:
        """The larger, the longer it should stay."""

    def ranked(self) -> Iterable[str]:
        """Models that were ever asked for, the most valuable first."""

    def knows(self, name: str) -> bool:
        """The model was asked for."""


class Recency:
    """The last one asked for is worth most."""

    def __init__(self) -> None:
        self._requests = 0
        self._last: dict[str, int] = {}
        self._models: dict[str, None] = {}

    def saw(self, *names: str, client: str = "", now_s: float = 0.0) -> None:
        """See `Valuing`."""
        self._requests += 1
        self._last.update(dict.fromkeys(names, self._requests))
        self._models.pop(names[0], None)
        self._models[names[0]] = None

    def forget(self, name: str) -> None:
        """See `Valuing`."""
        self._last.pop(name, None)
        self._models.pop(name, None)

    def chance(self, name: str) -> float:
        """See `Valuing`."""
        last = self._last.get(name)
        return 0.0 if last is None else 1.0 / (1 + self._requests - last)

    def knows(self, name: str) -> bool:
        """See `Valuing`."""
        return name in self._models

    def ranked(self) -> list[str]:
        """See `Valuing`."""
        return list(reversed(self._models))


class Frequency:
    """What was asked for most often is worth most."""

    def __init__(self) -> None:
        self._requests = 0
        self._counts: Counter[str] = Counter()
        self._models: dict[str, None] = {}

    def saw(self, *names: str, client: str = "", now_s: float = 0.0) -> None:
        """See `Valuing`."""
        self._requests += 1
        self._counts.update(names)
        self._models[names[0]] = None

    def forget(self, name: str) -> None:
        """See `Valuing`."""
        self._counts.pop(name, None)
        self._models.pop(name, None)

    def chance(self, name: str) -> float:
        """See `Valuing`."""
        return self._counts[name] / max(1, self._requests)

    def knows(self, name: str) -> bool:
        """See `Valuing`."""
        return name in self._models

    def ranked(self) -> list[str]:
        """See `Valuing`."""
        return sorted(self._models, key=self._counts.__getitem__, reverse=True)


class Foresight:
    """What will be asked for soonest is worth most. `next_use[i]` is the i-th request's model's next one.

    A component that models share counts as needed when the model is that was asked for last.
    """

    def __init__(self, next_use: Sequence[int]) -> None:
        self._next_use = next_use
        self._requests = 0
        self._next: dict[str, int] = {}
        self._models: dict[str, None] = {}

    def saw(self, *names: str, client: str = "", now_s: float = 0.0) -> None:
        """See `Valuing`."""
        self._next.update(dict.fromkeys(names, self._next_use[self._requests]))
        self._models[names[0]] = None
        self._requests += 1

    def forget(self, name: str) -> None:
        """See `Valuing`."""
        self._next.pop(name, None)
        self._models.pop(name, None)

    def chance(self, name: str) -> float:
        """See `Valuing`."""
        return 1.0 / (1 + self._next[name] - self._requests) if name in self._next else 0.0

    def knows(self, name: str) -> bool:
        """See `Valuing`."""
        return name in self._models

    def ranked(self) -> list[str]:
        """See `Valuing`."""
        return sorted(self._models, key=self._next.__getitem__)


def plug_in(machine: Machine, valuing: Valuing) -> None:
    """Have a machine that has seen nothing yet value by this instead of its own forecast, and exactly."""
    machine.forecast = machine.policy.forecast = machine.demand.forecast = cast(Forecast, valuing)
    machine.demand.looked_at = sys.maxsize


def on_demand_settings(settings: PolicySettings) -> PolicySettings:
    """In order of arrival, and nothing is loaded or folded before the stage is free."""
    return replace(settings, order="fcfs", lookahead=0, prefetch=False)


def overlays_for_free(profile: Profile) -> Profile:
    """As if every overlay lay in the arena: folding takes no time, and adapters have no size."""
    if profile.loras is None:
        return profile
    nothing = Figure(0.0, "a bound: everything is there")
    loras = msgspec.structs.replace(profile.loras, adapter_bytes=nothing, fold_s=nothing)
    return msgspec.structs.replace(profile, loras=loras, load_s=nothing, views_s=nothing)
