"""Independent books about whose turn it was: the fair order and the bounds on overtaking, worked out plainly.

Every sum is done over all requests; `core/fairness.py` and `core/queueing.py` must come to the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from understudyd.core.machine import Machine
from understudyd.core.types import RequestInfo


@dataclass
class Waiting:
    """A request that was admitted; its turn comes when it was overtaken as often as others are ahead."""

    info: RequestInfo
    arrival: int
    tag: float
    turn_at_s: float | None = None
    overtaken: int = 0

    @property
    def turn(self) -> tuple[float, int]:
        return (self.tag, self.arrival)


@dataclass
class FairLedger:
    """Told who is admitted, who goes on deck and who is answered."""

    machine: Machine
    waiting: dict[str, Waiting] = field(default_factory=dict)
    ends: dict[tuple[int, str], float] = field(default_factory=dict)
    virtual_time: float = 0.0
    arrivals: int = 0

    def admitted(self, info: RequestInfo, now_s: float) -> None:
        tag = 0.0
        if self.machine.policy.settings.order != "fcfs":
            self._advance()
            who = (info.priority, info.client)
            tag = max(self.virtual_time, self.ends.get(who, 0.0))
            self.ends[who] = tag + info.cost
        self.arrivals += 1
        self.waiting[info.request_id] = Waiting(info, self.arrivals, tag)
        self._call_up(now_s)

    def answered(self, request_id: str, now_s: float) -> None:
        """If it waited it was not served: it costs its client nothing."""
        waiting = self.waiting.pop(request_id, None)
        if waiting is None:
            return
        who = (waiting.info.priority, waiting.info.client)
        if who in self.ends:
            self.ends[who] -= waiting.info.cost
        self._has_left(now_s)

    def on_deck(self, request_id: str, now_s: float) -> None:
        """Nobody is overtaken beyond the bounds, unless nothing can be done for it at the moment."""
        chosen = self.waiting[request_id]
        passed = [w for w in self.waiting.values() if w.turn < chosen.turn]
        for waiting in passed:
            at_bound = self._is_at_bound(waiting, now_s)
            assert not at_bound, f"{waiting} was overtaken by {chosen} beyond its bound"
            waiting.overtaken += 1
        if self.machine.policy.settings.order == "fcfs":
            assert all(waiting.info.priority < chosen.info.priority for waiting in passed)
        self.virtual_time += chosen.info.cost / len({w.info.client for w in self.waiting.values()})
        del self.waiting[request_id]
        self._has_left(now_s)

    def pressing(self, now_s: float) -> Iterator[Waiting]:
        """Those who are half-way to a bound."""
        return (waiting for waiting in self.waiting.values() if self._has_reached(waiting, 0.5, now_s))

    # -- inside ---------------------------------------------------------------------------------------

    def _is_at_bound(self, waiting: Waiting, now_s: float) -> bool:
        model = self.machine.residency.models[waiting.info.model]
        return self._has_reached(waiting, 1.0, now_s) and not self.machine.residency.is_held_up(model, now_s)

    def _has_reached(self, waiting: Waiting, share: float, now_s: float) -> bool:
        bounds = self.machine.policy.settings
        if bounds.order == "fcfs":
            return False
        if waiting.overtaken >= bounds.max_skips * share:
            return True
        return waiting.turn_at_s is not None and now_s >= waiting.turn_at_s + bounds.max_wait_s * share

    def _has_left(self, now_s: float) -> None:
        levels = {waiting.info.priority for waiting in self.waiting.values()}
        self.ends = {who: end for who, end in self.ends.items() if who[0] in levels}
        if not self.waiting:
            self.virtual_time = 0.0
        self._advance()
        self._call_up(now_s)

    def _advance(self) -> None:
        tags = [waiting.tag for waiting in self.waiting.values()]
        self.virtual_time = max([self.virtual_time, *([min(tags)] if tags else [])])

    def _call_up(self, now_s: float) -> None:
        turns = sorted(waiting.turn for waiting in self.waiting.values())
        for waiting in self.waiting.values():
            if waiting.turn_at_s is None and waiting.overtaken >= turns.index(waiting.turn):
                waiting.turn_at_s = now_s

    def same_as_machine(self, now_s: float) -> None:
        """The machine believes the same about everybody who waits."""
        theirs = {
            r.id: (r.tag, self.machine.queue.skips_of(r), r.turn_at_s) for r in self.machine.queue.waiting()
        }
        mine = {name: (w.tag, w.overtaken, w.turn_at_s) for name, w in self.waiting.items()}
        assert mine == theirs, f"ledger {mine}, machine {theirs}"
        queue = self.machine.queue
        pressing = {r.model: r for r in queue.pressing.heads()}
        for waiting in self.pressing(now_s):
            assert pressing[waiting.info.model].turn[:2] <= waiting.turn
