"""Requests that wait, and those in the machine's hands.

The queue keeps arrival order, groups by model, and counts how often each request was overtaken. It
knows no policy: `policy.py` ranks what `heads` returns.
"""

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from understudyd.core.entities import Model
from understudyd.core.states import REQUEST_TABLE, Lifecycle, RequestState
from understudyd.core.types import ErrorCode, RequestInfo, Tier


@dataclass(eq=False, slots=True)
class Request:
    """One admitted request. `seq` is its arrival number, `skips` how often it was overtaken.

    `lease` is the edition of its model whose blobs stay where they are for it. `cancel_message` is what the
    answer says once a run that `cancel_code` ends has ended.
    """

    info: RequestInfo
    seq: int
    received_at_s: float
    tier: Tier
    life: Lifecycle[RequestState]
    skips: int = 0
    lease: Model | None = None
    cancel_code: ErrorCode | None = None
    cancel_message: str = ""

    @property
    def id(self) -> str:
        """The request's id, unique in the machine."""
        return self.info.request_id

    @property
    def deadline_message(self) -> str:
        """What the answer says when the deadline has passed."""
        deadline_at_s = self.info.deadline_at_s
        given_s = 0.0 if deadline_at_s is None else max(0.0, deadline_at_s - self.received_at_s)
        return (
            f"the deadline of {round(given_s, 3):g} s has passed; "
            "allow more time (deadline_s, --deadline) or ask for fewer steps"
        )

    @property
    def model(self) -> str:
        """The model it asks for."""
        return self.info.model

    @property
    def state(self) -> RequestState:
        """Where it is in its life."""
        return self.life.state

    @property
    def holds_lease(self) -> bool:
        """From the deck until the device has finished the last use."""
        return self.lease is not None

    @property
    def place(self) -> "Place":
        """Where it stands among others: by priority, then by arrival."""
        return (-self.info.priority, self.seq, self)


Place = tuple[int, int, Request]
"""Sorts in C, and never looks at the request: no two have the same arrival number."""


class Group:
    """Waiting requests of one model: `head` runs first, `oldest` came first. It is never empty."""

    __slots__ = ("_arrivals", "head", "oldest", "places")

    def __init__(self, first: Request) -> None:
        self.head = self.oldest = first
        self.places: list[Place] = [first.place]
        self._arrivals: dict[int, Request] = {first.seq: first}

    def join(self, request: Request) -> None:
        """One more, which came last."""
        insort(self.places, request.place)
        self._arrivals[request.seq] = request
        self.head = self.places[0][2]

    def leave(self, request: Request) -> bool:
        """One fewer; whether any is left."""
        del self.places[bisect_left(self.places, request.place)], self._arrivals[request.seq]
        if self.places:
            self.head = self.places[0][2]
            self.oldest = next(iter(self._arrivals.values()))
        return bool(self.places)


@dataclass(slots=True)
class RequestQueue:
    """Every request from admission until it is answered and its lease has ended.

    Groups by model, their heads and their oldest are kept sorted, so that nothing is sorted, and little is
    walked through, per event. `withdrawals` counts those who left without running, `relieved` how often
    nobody waited for a model any more.
    """

    max_waiting: int
    requests: dict[str, Request] = field(default_factory=dict)
    withdrawals: int = 0
    relieved: int = 0
    _waiting: dict[str, Request] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    _heads: list[Place] = field(default_factory=list)
    _oldest: list[tuple[int, Request]] = field(default_factory=list)
    _young: deque[Request] = field(default_factory=deque)
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
        self._young.append(request)
        self._join(request)
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
            self.withdrawals += 1
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

    def heads(self) -> Iterator[Request]:
        """The first waiting request of every model, by priority and arrival."""
        return (place[2] for place in self._heads)

    def oldest_of_models(self) -> Iterator[Request]:
        """The waiting request of every model that came first, by arrival."""
        return (entry[1] for entry in self._oldest)

    def head_of(self, model: str | None) -> Request | None:
        """The first waiting request of one model."""
        group = self.groups.get(model) if model is not None else None
        return None if group is None else group.head

    def models(self) -> Set[str]:
        """The models that somebody waits for."""
        return self.groups.keys()

    def waiting_for(self, model: str) -> list[Request]:
        """Waiting requests of one model, first to run first."""
        group = self.groups.get(model)
        return [] if group is None else [place[2] for place in group.places]

    def first_younger_than(self, age_s: float, now_s: float) -> Request | None:
        """The oldest waiting request that has not waited `age_s` yet. `age_s` and time never go back."""
        while self._young:
            request = self._young[0]
            if request.state is RequestState.WAITING and now_s < request.received_at_s + age_s:
                return request
            self._young.popleft()
        return None

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

    def _join(self, request: Request) -> None:
        group = self.groups.get(request.model)
        if group is None:
            self.groups[request.model] = Group(request)
            insort(self._oldest, (request.seq, request))
            insort(self._heads, request.place)
            return
        head = group.head
        group.join(request)
        self._follow_head(head, group)

    def _leave(self, request: Request) -> None:
        del self._waiting[request.id]
        group = self.groups[request.model]
        head, oldest = group.head, group.oldest
        if not group.leave(request):
            self.relieved += 1
            del self.groups[request.model]
            del self._heads[bisect_left(self._heads, head.place)]
            del self._oldest[bisect_left(self._oldest, (oldest.seq, oldest))]
            return
        self._follow_head(head, group)
        if group.oldest is not oldest:
            del self._oldest[bisect_left(self._oldest, (oldest.seq, oldest))]
            insort(self._oldest, (group.oldest.seq, group.oldest))

    def _follow_head(self, head: Request, group: Group) -> None:
        if group.head is not head:
            del self._heads[bisect_left(self._heads, head.place)]
            insort(self._heads, group.head.place)

    def check(self) -> None:
        """Groups, heads and waiting list agree; answered requests stay only while they hold a lease."""
        groups = self.groups.values()
        grouped = [place for group in groups for place in group.places]
        assert sorted(grouped) == sorted(r.place for r in self._waiting.values())
        for name, group in self.groups.items():
            requests = [place[2] for place in group.places]
            assert requests and all(request.model == name for request in requests)
            assert group.places == sorted(group.places) and group.head is requests[0]
            assert group.oldest is min(requests, key=lambda request: request.seq)
        assert self._heads == sorted(group.head.place for group in groups)
        assert self._oldest == sorted((group.oldest.seq, group.oldest) for group in groups)
        assert len(self._waiting) <= self.max_waiting
        seqs = [r.seq for r in self._waiting.values()]
        assert seqs == sorted(seqs)
        for request in self.requests.values():
            assert (request.state is RequestState.WAITING) == (request.id in self._waiting)
            assert request.state is not RequestState.ANSWERED or request.holds_lease
        skips = [r.skips for r in self._waiting.values()]
        assert skips == sorted(skips, reverse=True), "an older request was overtaken less often"
