"""Requests that wait, and those in the machine's hands.

The queue keeps arrival order, groups by model, and counts how often each request was overtaken. It
knows no policy: `policy.py` ranks what `heads` returns.
"""

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from understudyd.core.states import REQUEST_TABLE, Lifecycle, RequestState
from understudyd.core.types import ErrorCode, RequestInfo, Tier


@dataclass(eq=False, slots=True)
class Request:
    """One admitted request. `seq` is its arrival number, `skips` how often it was overtaken."""

    info: RequestInfo
    seq: int
    received_at_s: float
    tier: Tier
    life: Lifecycle[RequestState]
    skips: int = 0
    holds_lease: bool = False
    cancel_code: ErrorCode | None = None

    @property
    def id(self) -> str:
        """The request's id, unique in the machine."""
        return self.info.request_id

    @property
    def model(self) -> str:
        """The model it asks for."""
        return self.info.model

    @property
    def state(self) -> RequestState:
        """Where it is in its life."""
        return self.life.state

    def __lt__(self, other: "Request") -> bool:
        """Order within a model: priority, then arrival."""
        return (-self.info.priority, self.seq) < (-other.info.priority, other.seq)


@dataclass(slots=True)
class RequestQueue:
    """Every request from admission until it is answered and its lease has ended."""

    max_waiting: int
    requests: dict[str, Request] = field(default_factory=dict)
    _waiting: dict[str, Request] = field(default_factory=dict)
    _by_model: dict[str, list[Request]] = field(default_factory=dict)
    _deadlines: list[tuple[float, int, str]] = field(default_factory=list)
    _seq: int = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """No further request may wait."""
        return len(self._waiting) >= self.max_waiting

    def admit(self, info: RequestInfo, tier: Tier, now_s: float) -> Request:
        """A new waiting request at the end of the queue."""
        self._seq += 1
        life = Lifecycle(f"request {info.request_id}", RequestState.WAITING, REQUEST_TABLE)
        request = Request(info, self._seq, now_s, tier, life)
        self.requests[request.id] = request
        self._waiting[request.id] = request
        insort(self._by_model.setdefault(info.model, []), request)
        if info.deadline_at_s is not None:
            heapq.heappush(self._deadlines, (info.deadline_at_s, request.seq, request.id))
        return request

    def take(self, request: Request, now_s: float) -> None:
        """The request goes on deck; whoever came before it has been overtaken once more."""
        request.life.to(RequestState.ON_DECK, now_s, "chosen")
        self._leave(request)
        for earlier in self._waiting.values():
            if earlier.seq > request.seq:
                break
            earlier.skips += 1

    def answered(self, request: Request, now_s: float, why: str) -> None:
        """The request has its answer; it is forgotten once it holds no lease."""
        was_waiting = request.state is RequestState.WAITING
        request.life.to(RequestState.ANSWERED, now_s, why)
        if was_waiting:
            self._leave(request)
        self.forget_if_done(request)

    def forget_if_done(self, request: Request) -> None:
        """Drop an answered request without a lease."""
        if request.state is RequestState.ANSWERED and not request.holds_lease:
            self.requests.pop(request.id, None)

    def oldest(self) -> Request | None:
        """The waiting request that came first; nobody was overtaken more often or waited longer."""
        return next(iter(self._waiting.values()), None)

    def waiting(self) -> Iterator[Request]:
        """Waiting requests by arrival."""
        return iter(self._waiting.values())

    def heads(self) -> list[Request]:
        """The first waiting request of every model."""
        return [group[0] for group in self._by_model.values()]

    def waiting_for(self, model: str) -> list[Request]:
        """Waiting requests of one model, first to run first."""
        return list(self._by_model.get(model, ()))

    def expired(self, now_s: float) -> list[Request]:
        """Requests that are not answered and whose deadline has passed; each is returned once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, seq, request_id = heapq.heappop(self._deadlines)
            request = self.requests.get(request_id)
            if request is not None and request.seq == seq and request.state is not RequestState.ANSWERED:
                late.append(request)
        return late

    def next_deadline_s(self) -> float | None:
        """When `expired` may have something; answered requests are passed over."""
        while self._deadlines:
            at_s, seq, request_id = self._deadlines[0]
            request = self.requests.get(request_id)
            if request is not None and request.seq == seq and request.state is not RequestState.ANSWERED:
                return at_s
            heapq.heappop(self._deadlines)
        return None

    def _leave(self, request: Request) -> None:
        del self._waiting[request.id]
        group = self._by_model[request.model]
        group.remove(request)
        if not group:
            del self._by_model[request.model]

    def check(self) -> None:
        """Groups and waiting list agree; answered requests stay only while they hold a lease."""
        assert sum(map(len, self._by_model.values())) == len(self._waiting)
        assert len(self._waiting) <= self.max_waiting
        seqs = [r.seq for r in self._waiting.values()]
        assert seqs == sorted(seqs)
        for request in self.requests.values():
            assert (request.state is RequestState.WAITING) == (request.id in self._waiting)
            assert request.state is not RequestState.ANSWERED or request.holds_lease
        skips = [r.skips for r in self._waiting.values()]
        assert skips == sorted(skips, reverse=True), "an older request was overtaken less often"
