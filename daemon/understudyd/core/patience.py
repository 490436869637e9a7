"""Whose patience is at an end: waiting requests that were overtaken so often, or for so long."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from understudyd.core.grouping import Grouped
from understudyd.core.request import Request, Turn
from understudyd.core.states import RequestState


@dataclass(frozen=True, slots=True)
class Limits:
    """A request may be overtaken fewer than `skips` times, and until `wait_s` after its turn came."""

    skips: float
    wait_s: float

    @property
    def most_skips(self) -> float:
        """As a whole number, or infinity."""
        return self.skips if math.isinf(self.skips) else math.ceil(self.skips)


class Patience:
    """Requests that have reached the limits, in the fair order. Time never goes back.

    `turned` is told the models of those that have, or who then left.
    """

    def __init__(self, limits: Limits, turned: dict[str, None] | None = None) -> None:
        self.limits = limits
        self._turned = {} if turned is None else turned
        self.ended: Grouped[Turn] = Grouped()
        self._clocks: deque[Request] = deque()

    def first_of(self, model: str) -> Request | None:
        """The first request of a model whose patience is at an end."""
        turn = self.ended.first(model)
        return None if turn is None else turn[2]

    def heads(self) -> Iterator[Request]:
        """The first of every model."""
        return (turn[2] for turn in self.ended.heads)

    def end(self, request: Request) -> None:
        """Its patience is at an end, if it was not before."""
        if not self.ended.has(request.model, request.turn):
            self.ended.add(request.model, request.turn)
            self._turned[request.model] = None

    def turn_came(self, request: Request) -> None:
        """From now on its time counts."""
        if self.limits.wait_s < math.inf:
            self._clocks.append(request)

    def leave(self, request: Request) -> None:
        """It waits no more."""
        if self.ended.has(request.model, request.turn):
            self.ended.remove(request.model, request.turn)
            self._turned[request.model] = None

    def pass_time(self, now_s: float) -> None:
        """It is `now_s`."""
        while (at_s := self.next_change_s()) is not None and at_s <= now_s:
            self.end(self._clocks.popleft())

    def next_change_s(self) -> float | None:
        """When time alone ends somebody's patience; those who have left are passed over."""
        while self._clocks:
            request = self._clocks[0]
            if request.state is RequestState.WAITING and request.turn_at_s is not None:
                return request.turn_at_s + self.limits.wait_s
            self._clocks.popleft()
        return None
