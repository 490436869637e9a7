"""What the daemon did lately: a ring of spans, cheap enough to be always on.

Nothing is locked: a thread that was put to sleep with a lock in its hands would hold up the stage.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import count

from understudy.trace import Span, TracePage

CAPACITY = 65_536
"""Of images of a tenth of a second, with all that belongs to them, about ten minutes."""

_PAGE_SPANS = 8192
_LOOKED_AT = 32_768


class Timeline:
    """The last `capacity` spans, in a ring that is made at once. `record` may be called from any thread."""

    def __init__(self, capacity: int = CAPACITY, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring: list[tuple[int, Span] | None] = [None] * capacity
        self._numbers = count()  # its `next` is atomic, and so is an assignment to a list's item
        self._last = -1
        self._clock = clock

    def record(self, span: Span) -> None:
        """Remember it, in place of the oldest."""
        number = next(self._numbers)
        self._ring[number % len(self._ring)] = (number, span)
        self._last = number

    @contextlib.contextmanager
    def phase(self, lane: str, name: str) -> Iterator[None]:
        """A span of what is done within, if that is gone through to its end."""
        started_at_s = self._clock()
        yield
        self.record(Span(lane, name, started_at_s, self._clock()))

    def page(self, seconds: float, start: int = 0, most: int = _PAGE_SPANS) -> TracePage:
        """Spans that ended within the last `seconds`, from the one of number `start` on.

        At most about `most` of them, steps of runs counted with them: a page is made between two events of
        the loop. There may be none on a page that is not the last.
        """
        now_s, end = self._clock(), self._last + 1
        since_s = now_s - seconds
        first = max(start, end - len(self._ring))
        oldest = self._at(first) if first else None
        is_cut = start == 0 and oldest is not None and oldest.end_s > since_s
        found: list[Span] = []
        for number in range(first, min(end, first + _LOOKED_AT)):
            span = self._at(number)
            if span is None or span.end_s < since_s:
                continue
            found.append(span)
            most -= 1 + len(span.steps_s)
            if most <= 0:
                break
        else:
            number = min(end, first + _LOOKED_AT) - 1
        return TracePage(
            spans=found, next=number + 1 if number + 1 < end else None, is_cut=is_cut, now_s=now_s
        )

    def _at(self, number: int) -> Span | None:
        """The span of that number; None if another is in its place by now, or it is not there yet."""
        entry = self._ring[number % len(self._ring)]
        return entry[1] if entry is not None and entry[0] == number else None
