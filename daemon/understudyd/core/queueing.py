"""Requests that wait, and those in the machine's hands.

The queue keeps the fair order (`fairness.py`), groups by model, and counts how often each request was
overtaken: one that is behind it in the fair order went on deck. It knows no policy: `policy.py` ranks what it
finds here.

A request's turn comes when it was overtaken as often as others are still ahead of it: had all run in the fair
order, it would be next. Until then it would wait in any case, and its time does not count.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Set
from itertools import islice

from understudyd.core.fairness import MAX_LEAD, FairTags
from understudyd.core.grouping import Grouped
from understudyd.core.patience import Limits, Patience
from understudyd.core.request import Place, Request, Turn
from understudyd.core.states import REQUEST_TABLE, IllegalEvent, Lifecycle, RequestState
from understudyd.core.types import RequestInfo, Tier


class RequestQueue:
    """Every request from admission until it is answered and its lease has ended.

    Everything is kept sorted, so that nothing is sorted, and little is walked through, per event. Whom the
    limits `pressing` or `bound` concern is kept under these names. Unless the queue `is_fair`, all tags are
    equal and the fair order is that of arrival. `withdrawals` counts those who left without running,
    `relieved` how often nobody waited for a model any more. `turned` collects the models whose place in any
    order may have changed, until somebody takes note.
    """

    def __init__(self, max_waiting: int, pressing: Limits, bound: Limits, *, is_fair: bool = True) -> None:
        self.max_waiting = max_waiting
        self.requests: dict[str, Request] = {}
        self.turned: dict[str, None] = {}
        self.withdrawals = 0
        self.relieved = 0
        self.pressing = Patience(pressing, self.turned)
        self.bound = Patience(bound)
        self._tags = FairTags(max_waiting) if is_fair else None
        self._waiting: dict[str, Request] = {}
        self._turns: list[Turn] = []
        self._skips: list[int] = []
        self._of_models: Grouped[Place] = Grouped()
        self.first_place = self._of_models.first
        self._of_clients: Grouped[Turn] = Grouped()
        self._coming: list[tuple[int, int, Request]] = []
        self._deadlines: list[tuple[float, int, str]] = []
        self._seq = 0
        self._left = 0
        self._left_over = 0

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def arrivals(self) -> int:
        """How many were ever admitted."""
        return self._seq

    @property
    def is_full(self) -> bool:
        """No further request may wait."""
        return len(self._waiting) >= self.max_waiting

    def change_limit(self, max_waiting: int) -> None:
        """So many may wait from now on; who waits already stays."""
        self.max_waiting, self._left_over = max_waiting, len(self)

    def admit(self, info: RequestInfo, tier: Tier, now_s: float) -> Request:
        """A new waiting request, behind what its client has waiting."""
        self._seq += 1
        life = Lifecycle(f"request {info.request_id}", RequestState.WAITING, REQUEST_TABLE)
        tag = 0.0 if self._tags is None else self._tags.admit(info, self._least_tag())
        request = Request(info, self._seq, tag, now_s, tier, life)
        self.requests[request.id] = request
        self._waiting[request.id] = request
        ahead = bisect_left(self._turns, request.turn)
        self._turns.insert(ahead, request.turn)
        self._skips.insert(ahead, 0)
        if self._of_models.add(request.model, request.place):
            self.turned[request.model] = None
        self._of_clients.add(info.client, request.turn)
        for patience in (self.pressing, self.bound):
            if patience.limits.skips <= 0:
                patience.end(request)
        heapq.heappush(self._coming, (self._left + ahead, request.seq, request))
        self._call_up(now_s)
        if info.deadline_at_s is not None:
            heapq.heappush(self._deadlines, (info.deadline_at_s, request.seq, request.id))
        return request

    def take(self, request: Request, now_s: float) -> None:
        """The request goes on deck; whoever is ahead of it has been overtaken once more."""
        request.life.to(RequestState.ON_DECK, now_s, "chosen")
        clients = len(self._of_clients.groups)
        self._leave(request)
        if self._tags is not None:
            self._tags.take(request.info, clients, self._least_tag())
        self._overtake(bisect_left(self._turns, request.turn))
        for passed in self.wronged_by(request):
            self.pressing.end(passed)
        self._call_up(now_s)

    def _overtake(self, passed: int) -> None:
        """Somebody went before the first so many. Of a thousand, at every run: so nothing is called."""
        skips = self._skips[:passed] = [skips + 1 for skips in self._skips[:passed]]
        for patience in (self.pressing, self.bound):
            if (limit := patience.limits.most_skips) in skips:
                for place in [place for place, count in enumerate(skips) if count == limit]:
                    patience.end(self._turns[place][2])

    def answered(self, request: Request, now_s: float, why: str) -> None:
        """The request has its answer; it is forgotten once it holds no lease."""
        was_waiting = request.state is RequestState.WAITING
        request.life.to(RequestState.ANSWERED, now_s, why)
        if was_waiting:
            self.withdrawals += 1
            self._leave(request)
            if self._tags is not None:
                self._tags.withdraw(request.info, self._least_tag())
            self._call_up(now_s)
        self.forget_if_done(request)

    def forget_if_done(self, request: Request) -> None:
        """Drop an answered request without a lease."""
        if request.state is RequestState.ANSWERED and not request.holds_lease:
            self.requests.pop(request.id, None)

    def pass_time(self, now_s: float) -> None:
        """It is `now_s`."""
        self.pressing.pass_time(now_s)
        self.bound.pass_time(now_s)

    # -- who waits ----------------------------------------------------------------------------------

    def skips_of(self, request: Request) -> int:
        """How often it was overtaken: a request behind it in the fair order went on deck."""
        if request.state is not RequestState.WAITING:
            return request.skips
        return self._skips[bisect_left(self._turns, request.turn)]

    def waiting(self) -> Iterator[Request]:
        """Waiting requests by arrival."""
        return iter(self._waiting.values())

    def heads(self) -> Iterator[Request]:
        """The first waiting request of every model, by priority and in the fair order."""
        return (place[3] for place in self._of_models.heads)

    def heads_up_to(self, request: Request) -> Iterator[Request]:
        """Those of `heads` that are not behind this request in the fair order."""
        heads, begin = self._of_models.heads, 0
        while begin < len(heads):
            priority = heads[begin][0]
            end = bisect_left(heads, (priority, request.tag, request.seq + 1), begin)
            yield from (place[3] for place in heads[begin:end])
            begin = bisect_left(heads, (priority + 1,), end)

    def ahead_of(self, request: Request, most: int) -> tuple[int, list[Request]]:
        """How many are ahead of it in the fair order, and some of these: fewer than twice `most`."""
        ahead = bisect_left(self._turns, request.turn)
        step = max(1, ahead // most)
        return ahead, [turn[2] for turn in self._turns[:ahead:step]]

    def head_of(self, model: str | None) -> Request | None:
        """The first waiting request of one model, by priority and in the fair order."""
        place = self.first_place(model) if model is not None else None
        return None if place is None else place[3]

    def models(self) -> Set[str]:
        """The models that somebody waits for."""
        return self._of_models.groups.keys()

    def waiting_for(self, model: str) -> list[Request]:
        """Waiting requests of one model, first to run first."""
        return [place[3] for place in self._of_models.groups.get(model, ())]

    def find(self, request_id: str, *states: RequestState) -> Request:
        """The request, in one of these states. Raises `IllegalEvent`."""
        request = self.requests.get(request_id)
        if request is None:
            raise IllegalEvent(f"no request {request_id}")
        request.life.require(*states)
        return request

    def alike(self, request: Request, most: int) -> list[Request]:
        """The first `most` that wait and fit into one run with it, as urgent as it, in the fair order."""
        info = request.info
        group = self._of_models.groups.get(info.model, ())
        others = (place[3] for place in group if place[0] == -info.priority)
        return list(islice((r for r in others if r.info.batch_key == info.batch_key), most))

    def wronged_by(self, request: Request) -> Iterator[Request]:
        """The first of every client that it is more than `MAX_LEAD` such requests ahead of, if as urgent."""
        info = request.info
        limit = request.tag - MAX_LEAD * info.cost
        for tag, _, other in self._of_clients.heads:
            if tag >= limit:
                return
            if other.info.client != info.client and other.info.priority >= info.priority:
                yield other

    @property
    def changes(self) -> tuple[int, int]:
        """While it stands, so does who is first of each model, and who of them presses."""
        return self._of_models.changes, self.pressing.ended.changes

    # -- deadlines ----------------------------------------------------------------------------------

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

    # -- inside -------------------------------------------------------------------------------------

    def _least_tag(self) -> float | None:
        return self._turns[0][0] if self._turns else None

    def _leave(self, request: Request) -> None:
        del self._waiting[request.id]
        place = bisect_left(self._turns, request.turn)
        request.skips = self._skips.pop(place)
        del self._turns[place]
        self._of_clients.remove(request.info.client, request.turn)
        heads = self._of_models.changes
        if not self._of_models.remove(request.model, request.place):
            self.relieved += 1
        if self._of_models.changes != heads:
            self.turned[request.model] = None
        for patience in (self.pressing, self.bound):
            patience.leave(request)
        self._left += 1

    def _call_up(self, now_s: float) -> None:
        """The turn of some has come. One more may have to leave than was thought for each that got ahead."""
        while self._coming and self._coming[0][0] <= self._left:
            _, seq, request = heapq.heappop(self._coming)
            if request.state is not RequestState.WAITING:
                continue
            ahead = bisect_left(self._turns, request.turn)
            if (before := ahead - self._skips[ahead]) > 0:
                heapq.heappush(self._coming, (self._left + before, seq, request))
                continue
            request.turn_at_s = now_s
            self.pressing.turn_came(request)
            self.bound.turn_came(request)
        self.pass_time(now_s)

    def check(self) -> None:
        """All orders agree; answered requests stay only while they hold a lease."""
        waiting = self._waiting.values()
        assert self._turns == sorted(request.turn for request in waiting)
        assert len(self._skips) == len(self._turns)
        self._of_models.check()
        self._of_clients.check()
        for request in waiting:
            assert self._of_models.has(request.model, request.place)
            assert self._of_clients.has(request.info.client, request.turn)
        for grouped in (self._of_models, self._of_clients):
            assert sum(map(len, grouped.groups.values())) == len(waiting)
        for patience in (self.pressing, self.bound):
            patience.ended.check()
            turns = [turn for group in patience.ended.groups.values() for turn in group]
            assert all(turn[2].state is RequestState.WAITING for turn in turns)
            most = patience.limits.skips
            spent = {turn[1] for turn, skips in zip(self._turns, self._skips) if skips >= most}
            assert spent <= {turn[1] for turn in turns}
        assert len(self._waiting) <= max(self.max_waiting, self._left_over)
        seqs = [r.seq for r in self._waiting.values()]
        assert seqs == sorted(seqs)
        for request in self.requests.values():
            assert (request.state is RequestState.WAITING) == (request.id in self._waiting)
            assert request.state is not RequestState.ANSWERED or request.holds_lease
