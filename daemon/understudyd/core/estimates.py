"""How long loads, views, preparations and runs take, learned from those that took place.

A load takes a fixed time and a time a byte: a line through the last few loads, by the weighted median of the
slopes between any two of them (Theil, 1950; Sen, 1968; weights by distance: Sievers, 1978), which up to a
quarter of wild values do not move. Loads from disk and from the host pool are kept apart, and those that had
company from those that had none: who shares a disk is slower.

Anything else is a level that follows the logarithm of what it sees, so that it stands for what is usual;
each value moves it by at most a factor of four (after Gelper, Fried and Croux, 2010, robust exponential
smoothing). The first ones are averaged, later ones count for a sixteenth: hardware that becomes slower is
believed within a few loads.

What was learned outlives the machine as a document in JSON's types. Nothing here is tuned to a machine.
"""

import math
from collections import deque
from collections.abc import Container
from statistics import median
from typing import Any, Self

from understudyd.core.remembered import DIGITS, DamagedDocument, field, number, rows, text, whole

VERSION = 1
MOST_MODELS = 4000

_KEPT_LOADS = 10
_MOST_SEEN = 16
_OUTLIER = math.log(4.0)
_LEAST, _MOST = 1e-9, 1e9

_FIRST_LOAD_S_A_BYTE = 1e-9
_FIRST_RUN_S = 5.0
_FIRST_VIEWS_S = 0.01
_FIRST_FOLD_S_A_MB = 3e-4
_FIRST_PREPARE_S = 0.5
"""Guesses for a machine that has seen nothing; the first thing that it sees replaces them."""

_LEAST_WAIT_S = 1.0
"""Nothing is learned from shorter ones, of which a load or a look-up makes several times as much."""


class Level:
    """A positive quantity as it usually is; `seen` of its values count, at most sixteen."""

    __slots__ = ("_log", "seen")

    def __init__(self, guess: float) -> None:
        self._log = math.log(guess)
        self.seen = 0

    @property
    def value(self) -> float:
        """What is usual."""
        return math.exp(self._log)

    def saw(self, value: float) -> None:
        """One more; the first is believed as it is."""
        error = math.log(min(max(value, _LEAST), _MOST)) - self._log
        if self.seen:
            error = max(-_OUTLIER, min(_OUTLIER, error))
        self.seen = min(self.seen + 1, _MOST_SEEN)
        self._log += error / self.seen

    def document(self) -> list[float | int]:
        """What it has learned."""
        return [round(self._log, DIGITS), self.seen]

    @classmethod
    def restored(cls, document: Any, what: str) -> Self:
        """As it was written. Raises `DamagedDocument`."""
        log, seen = rows(document, what, 2)
        level, most = cls(1.0), math.log(_MOST)
        level._log, level.seen = number(log, what, -most, most), whole(seen, what, _MOST_SEEN)
        return level


class LoadTimes:
    """Seconds of loads over one route, by their bytes."""

    def __init__(self) -> None:
        self.seen: deque[tuple[int, float]] = deque(maxlen=_KEPT_LOADS)
        self.fixed_s, self.s_a_byte = 0.0, _FIRST_LOAD_S_A_BYTE

    def saw(self, size_bytes: int, seconds: float) -> None:
        """One more load."""
        self.seen.append((size_bytes, seconds))
        self._fit()

    def seconds(self, size_bytes: int) -> float:
        """What a load of so many bytes takes."""
        return self.fixed_s + size_bytes * self.s_a_byte

    def _fit(self) -> None:
        slopes = [
            ((y - b) / (x - a), abs(x - a))
            for i, (x, y) in enumerate(self.seen)
            for a, b in list(self.seen)[:i]
            if x != a
        ]
        slope = _weighted_median(slopes)
        if slope <= 0.0:  # all of one size, or the size did not matter
            slope = median(y / max(1, x) for x, y in self.seen)
        self.s_a_byte = slope
        self.fixed_s = max(0.0, median(y - x * slope for x, y in self.seen))


def _weighted_median(values: list[tuple[float, int]]) -> float:
    """The value with half the weight on either side; 0 without any."""
    half, passed = sum(weight for _, weight in values) / 2.0, 0
    for value, weight in sorted(values):
        passed += weight
        if passed >= half:
            return value
    return 0.0


class Estimates:
    """All that was learned about time; seconds everywhere, sizes in bytes, `cost` as in `RequestInfo`."""

    def __init__(self) -> None:
        self.learned = 0
        self._loads = {(pool, company): LoadTimes() for pool in (False, True) for company in (False, True)}
        self._views = Level(_FIRST_VIEWS_S)
        self._preparing = Level(_FIRST_PREPARE_S)
        self._fold = Level(_FIRST_FOLD_S_A_MB)
        self._run = Level(_FIRST_RUN_S)
        self._delay = Level(1.0)
        self._runs: dict[str, Level] = {}

    # -- learning -----------------------------------------------------------------------------------

    def loaded(self, size_bytes: int, seconds: float, *, from_pool: bool, had_company: bool) -> None:
        """A load has ended well. `had_company`: another one was under way at some time."""
        self.learned += 1
        self._loads[from_pool, had_company].saw(size_bytes, seconds)

    def viewed(self, seconds: float) -> None:
        """A blob's views were built in so long."""
        self._views.saw(seconds)

    def folded(self, size_bytes: int, seconds: float) -> None:
        """An overlay was made."""
        self.learned += 1
        self._fold.saw(seconds * 1e6 / max(1, size_bytes))

    def prepared(self, seconds: float) -> None:
        """A model's small parts were prepared in so long."""
        self._preparing.saw(seconds)

    def ran(self, model: str, cost: float, seconds: float) -> None:
        """A request kept the stage for so long."""
        self.learned += 1
        self._run.saw(seconds / cost)
        level = self._runs.get(model)
        if level is None:
            level = self._runs[model] = Level(1.0)
        level.saw(seconds / cost)

    def waited(self, expected_s: float, seconds: float) -> None:
        """A request that was expected on stage after so long came there, which may have been later."""
        if expected_s >= _LEAST_WAIT_S:
            self._delay.saw(max(seconds, 0.1) / expected_s)

    def forget(self, model: str) -> None:
        """The name stands for nothing any more, or for something else."""
        self._runs.pop(model, None)

    # -- what is expected ---------------------------------------------------------------------------

    def load_s(self, size_bytes: int, *, from_pool: bool, has_company: bool = False) -> float:
        """What a load takes; as it is with or without company where only that is known."""
        times = self._loads[from_pool, has_company]
        if not times.seen:
            times = self._loads[from_pool, not has_company]
        return times.seconds(size_bytes)

    @property
    def views_s(self) -> float:
        """What building a blob's views takes."""
        return self._views.value

    def fold_s(self, size_bytes: int) -> float:
        """What making an overlay takes."""
        return self._fold.value * size_bytes / 1e6

    @property
    def prepare_s(self) -> float:
        """What preparing a model's small parts takes."""
        return self._preparing.value

    def run_s(self, model: str, cost: float) -> float:
        """How long a request keeps the stage; of a model that never ran, as others do."""
        return self._runs.get(model, self._run).value * cost

    def wait_s(self, expected_s: float) -> float:
        """When a request should be on stage, if others come before it as often as they lately did."""
        return expected_s * self._delay.value if expected_s >= _LEAST_WAIT_S else expected_s

    # -- outliving the machine ----------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """All that was learned, in JSON's types; of the models that ran last where there are very many."""
        return {
            "version": VERSION,
            "loads": [[list(load) for load in times.seen] for times in self._loads.values()],
            "views": self._views.document(),
            "preparing": self._preparing.document(),
            "fold": self._fold.document(),
            "run": self._run.document(),
            "runs": {name: self._runs[name].document() for name in list(self._runs)[-MOST_MODELS:]},
        }

    def restore(self, document: Any, models: Container[str]) -> None:
        """Know what another life has learned, of these models; what this one did is forgotten.

        Raises `DamagedDocument`, and then nothing has changed.
        """
        if field(document, "version") != VERSION:
            raise DamagedDocument(f"another version than {VERSION}")
        made = Estimates()
        for times, loads in zip(made._loads.values(), rows(field(document, "loads"), "loads", 4)):
            for load in rows(loads, "loads")[-_KEPT_LOADS:]:
                size_bytes, seconds = rows(load, "a load", 2)
                times.saw(whole(size_bytes, "size_bytes", 1e15), number(seconds, "seconds", 0.0, _MOST))
        made._views = Level.restored(field(document, "views"), "views")
        made._preparing = Level.restored(field(document, "preparing"), "preparing")
        if "fold" in document:  # earlier daemons knew none
            made._fold = Level.restored(document["fold"], "fold")
        made._run = Level.restored(field(document, "run"), "run")
        runs = field(document, "runs")
        if not isinstance(runs, dict):
            raise DamagedDocument("runs is no object")
        for name, level in runs.items():
            if text(name, "a name") in models:
                made._runs[name] = Level.restored(level, name)
        vars(self).update(vars(made))
