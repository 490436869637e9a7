"""What the stage and the loaders did lately: a ring of spans, cheap enough to be always on."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work in a lane ("stage", "loader 0", ...); monotonic seconds."""

    lane: str
    name: str
    start_s: float
    end_s: float


class Timeline:
    """The last `capacity` spans. `record` may be called from any thread (deque.append is atomic)."""

    def __init__(self, capacity: int = 50_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._clock = clock

    def record(self, lane: str, name: str, started_at_s: float, ended_at_s: float) -> None:
        """Remember a finished piece of work."""
        self._spans.append(Span(lane, name, started_at_s, ended_at_s))

    def last(self, seconds: float) -> list[Span]:
        """Spans that ended within the last `seconds`, by their start."""
        since_s = self._clock() - seconds
        return sorted((s for s in tuple(self._spans) if s.end_s >= since_s), key=lambda s: s.start_s)
