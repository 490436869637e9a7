"""What a simulated daemon's users felt and what its stage did, in flat memory."""

import math
from dataclasses import dataclass, field

_STEP = math.log(1.01)


@dataclass(slots=True)
class Quantiles:
    """Quantiles to within one percent of their value: counts in buckets of equal ratio.

    Values below `least` count as 0.
    """

    least: float = 1e-9
    count: int = 0
    _buckets: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        """One more value, not negative."""
        bucket = -1 if value < self.least else int(math.log(value / self.least) / _STEP)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1

    def at(self, share: float) -> float:
        """The value that so large a share (0 to 1) does not exceed; 0 when there are none."""
        rest = max(1, math.ceil(self.count * share))
        for bucket in sorted(self._buckets):
            rest -= self._buckets[bucket]
            if rest <= 0:
                return 0.0 if bucket < 0 else self.least * math.exp((bucket + 0.5) * _STEP)
        return 0.0


@dataclass(slots=True)
class Meter:
    """Fed by whoever plays a trace; seconds of virtual time.

    `idle_s` is time in which the stage computed nothing although somebody waited, `busy_s` time in which it
    computed. A visible switch is counted as the daemon reports it (`gap_s`): from the moment when the stage
    was free and the request there, to its first operation, if the model changed.
    """

    served: int = 0
    failed: int = 0
    switches: int = 0
    idle_s: float = 0.0
    busy_s: float = 0.0
    wait_s: Quantiles = field(default_factory=Quantiles)
    switch_s: Quantiles = field(default_factory=Quantiles)
    first_at_s: float | None = None
    last_at_s: float = 0.0
    _waiting: int = 0
    _free_at_s: float | None = None
    _waited_from_s: float = 0.0

    def arrived(self, now_s: float) -> None:
        """A request waits from now on."""
        if self.first_at_s is None:
            self.first_at_s = self._free_at_s = now_s
        if not self._waiting:
            self._waited_from_s = now_s
        self._waiting += 1
        self.last_at_s = now_s

    def gave_up(self, now_s: float) -> None:
        """A waiting request was refused or failed."""
        self.failed += 1
        self._waiting -= 1
        if not self._waiting:
            self._count_idle(now_s)

    def started(self, arrived_at_s: float, is_switch: bool, now_s: float) -> None:
        """Its first operation."""
        assert self._free_at_s is not None
        self.wait_s.add(now_s - arrived_at_s)
        if is_switch:
            self.switches += 1
            self.switch_s.add(now_s - max(arrived_at_s, self._free_at_s))
        self._count_idle(now_s)
        self._waiting -= 1
        self._free_at_s = None

    def joined(self, arrived_at_s: float, now_s: float) -> None:
        """Its first operation, too: it shares the run of the one that has just started."""
        self.wait_s.add(now_s - arrived_at_s)
        self._waiting -= 1

    def ended(self, run_s: float, now_s: float, served: int = 1) -> None:
        """The stage is free again after so many seconds, in which so many requests were served."""
        self.served += served
        self.busy_s += run_s
        self._free_at_s = self._waited_from_s = self.last_at_s = now_s

    def _count_idle(self, now_s: float) -> None:
        """Somebody has waited until now; the stage was free for some of it."""
        if self._free_at_s is not None:
            self.idle_s += now_s - max(self._free_at_s, self._waited_from_s)
        self._waited_from_s = now_s

    @property
    def idle_percent(self) -> float:
        """Idle while somebody waited, in percent of busy time."""
        return 100.0 * self.idle_s / self.busy_s if self.busy_s else 0.0

    @property
    def served_per_s(self) -> float:
        """Requests a second, from the first arrival to the last end."""
        if self.first_at_s is None or self.last_at_s <= self.first_at_s:
            return 0.0
        return self.served / (self.last_at_s - self.first_at_s)

    @property
    def utilisation_percent(self) -> float:
        """Busy time in percent of the time from the first arrival to the last end."""
        if self.first_at_s is None or self.last_at_s <= self.first_at_s:
            return 0.0
        return 100.0 * self.busy_s / (self.last_at_s - self.first_at_s)
