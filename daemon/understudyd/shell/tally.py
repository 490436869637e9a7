"""Counters and recent figures for `status`: what an operator asks first."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from understudyd.core.types import ErrorCode

RECENT = 2048
LAST_ERRORS = 20
OWN_FAULTS = frozenset(
    {ErrorCode.MODEL_CORRUPT, ErrorCode.LOAD_FAILED, ErrorCode.OUT_OF_MEMORY, ErrorCode.INTERNAL}
)
"""What an operator has to look into. Mistakes of clients and a full queue come and go by themselves."""


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that `share` (0 to 1) of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


@dataclass(frozen=True, slots=True)
class Failure:
    """A request's error; `at_s` is monotonic."""

    at_s: float
    code: str
    message: str


@dataclass(slots=True)
class Tally:
    """Requests by outcome and by what they used, visible switch times of the last `RECENT` switches.

    `last_error` is the last of the daemon's own faults; `last_errors` are anybody's.
    """

    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    by_name: Counter[str] = field(default_factory=Counter)
    last_used_at_s: dict[str, float] = field(default_factory=dict)
    last_error: str = ""
    last_errors: deque[Failure] = field(default_factory=lambda: deque(maxlen=LAST_ERRORS))
    tiers_on_receipt: Counter[str] = field(default_factory=Counter)
    clock: Callable[[], float] = time.monotonic
    _switches_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def finished(self, names: Iterable[str], now_s: float, visible_switch_s: float | None) -> None:
        """A request got its images, made with the model and the adapters of these names.

        `visible_switch_s` is None when nothing waited or nothing changed.
        """
        self.done += 1
        for name in names:
            self.by_name[name] += 1
            self.last_used_at_s[name] = now_s
        if visible_switch_s is not None:
            self._switches_s.append(visible_switch_s)

    def forget(self, name: str) -> None:
        """There is nothing of this name any more."""
        self.by_name.pop(name, None)
        self.last_used_at_s.pop(name, None)

    def failure(self, code: str, message: str) -> None:
        """A request got an error."""
        self.failed[code] += 1
        if code in OWN_FAULTS:
            self.last_error = f"{code}: {message}"
        self.last_errors.append(Failure(self.clock(), code, message))

    def visible_switch_ms(self) -> dict[str, float | int | None]:
        """p50 and p99 of recent visible switches, milliseconds."""
        values = [1e3 * s for s in self._switches_s]
        return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99), "count": len(values)}
