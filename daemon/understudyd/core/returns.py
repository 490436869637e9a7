"""Who is expected back: most requests come in sessions, from clients that were here a minute ago."""

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from understudyd.core.remembered import (
    DIGITS,
    DamagedDocument,
    field,
    named,
    number,
    numbers,
    rows,
    text,
    whole,
)

_CLIENTS = 4096
_BUCKETS = 44
_RUNS = 4
_LEARN_EVERY = 32
_MEDIAN_STEP = 1.05


@dataclass(eq=False, slots=True)
class _Visit:
    """A client's last request: `stays` is the chance that the next one is for the same."""

    client: str
    at_s: float
    names: tuple[str, ...]
    run: int
    stays: float
    bucket: int = 0


class Returns:
    """Clients that were here lately come back, mostly for the same: most requests come in sessions.

    How likely a client is to come back before the next request of anybody depends on how long it has been
    away. That is learned from all clients together: a life table over half-octaves of absence. How likely it
    then asks for the same depends on how often in a row it has done so.
    """

    def __init__(self) -> None:
        self._requests = 0
        self._last_s = 0.0
        self._gap_s = 1.0  # a running median of the time between requests: the horizon
        self._clients: dict[str, _Visit] = {}
        self._away: list[deque[_Visit]] = [deque() for _ in range(_BUCKETS)]
        self._reached = [1.0] * _BUCKETS
        self._returned = [0.1] * _BUCKETS
        self._stayed = [[1.0, 1.0] for _ in range(_RUNS)]
        self._chances = [0.0] * _BUCKETS
        self._held: dict[str, list[float]] = {}  # by bucket, the clients that would ask for it again
        self._holders: dict[str, int] = {}
        self._all = [0.0] * _BUCKETS
        self._everybody: float | None = None  # `_chances` times `_all`, until one of them changes
        self._due: list[tuple[float, int]] = []  # when the first of each bucket has been there long enough

    def saw(self, client: str, names: tuple[str, ...], now_s: float) -> None:
        """A request of this client. Time in seconds never goes back."""
        if self._requests:
            self._gap_s *= _MEDIAN_STEP if now_s - self._last_s > self._gap_s else 1.0 / _MEDIAN_STEP
            self._gap_s = max(1e-3, self._gap_s)
        self._requests += 1
        self._last_s = now_s
        self.pass_time(now_s)
        run = self._welcome_back(client, names)
        stays, leaves = self._stayed[run]
        visit = self._clients[client] = _Visit(client, now_s, names, run, stays / (stays + leaves))
        self._reached[0] += 1.0
        self._line_up(visit)
        self._hold(visit)
        if len(self._clients) > _CLIENTS:
            self._drop(next(iter(self._clients)))
        if self._requests % _LEARN_EVERY == 1:
            self._learn()

    def pass_time(self, now_s: float) -> None:
        """Clients that have not come back have been away longer."""
        due = self._due
        while due and due[0][0] <= now_s:
            _, bucket = heapq.heappop(due)
            away, longest_s = self._away[bucket], _STARTS_S[bucket + 1]
            while away and away[0].at_s + longest_s <= now_s:
                visit = away.popleft()
                if self._clients.get(visit.client) is visit:
                    self._age(visit)
                    self._reached[bucket + 1] += 1.0
                    self._line_up(visit)
            if away:
                heapq.heappush(due, (away[0].at_s + longest_s, bucket))

    def share(self, name: str) -> float:
        """Among the clients that are expected back, those that will ask for it."""
        held = self._held.get(name)
        if held is None:
            return 0.0
        chances, everybody = self._chances, self._everybody
        if everybody is None:
            everybody = self._everybody = sum(map(mul, chances, self._all))
        expected = sum(map(mul, chances, held))
        return max(0.0, expected / everybody) if everybody > 0.0 else 0.0

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""
        for visit in self._clients.values():
            if source in visit.names:
                self._rename(visit, (*visit.names, name))

    def forget(self, name: str) -> None:
        """Count on this name no more; who asked for it as a model is forgotten with it."""
        for visit in [visit for visit in self._clients.values() if name in visit.names]:
            if visit.names[0] == name:
                self._drop(visit.client)
            else:
                self._rename(visit, tuple(other for other in visit.names if other != name))

    def copy(self) -> "Returns":
        """As it stands now; fit for `document` alone."""
        made = Returns()
        made._requests, made._last_s, made._gap_s = self._requests, self._last_s, self._gap_s
        made._clients = {
            client: _Visit(client, visit.at_s, visit.names, visit.run, visit.stays)
            for client, visit in self._clients.items()
        }
        made._reached, made._returned = list(self._reached), list(self._returned)
        made._stayed, made._chances = [list(pair) for pair in self._stayed], list(self._chances)
        return made

    def document(self, places: Mapping[str, int]) -> dict[str, Any]:
        """The life table, and each client's last visit; the longest absent first."""
        clients = [
            [
                visit.client,
                round(self._last_s - visit.at_s, DIGITS),
                [places[name] for name in visit.names if name in places],
                visit.run,
                round(visit.stays, DIGITS),
            ]
            for visit in self._clients.values()
            if visit.names[0] in places
        ]
        return {
            "requests": self._requests,
            "gap_s": round(self._gap_s, DIGITS),
            "reached": [round(count, DIGITS) for count in self._reached],
            "returned": [round(count, DIGITS) for count in self._returned],
            "stayed": [list(pair) for pair in self._stayed],
            "chances": [round(chance, DIGITS) for chance in self._chances],
            "clients": clients,
        }

    def restore(self, document: Any, names: Sequence[str], now: float) -> None:
        """What was learned, and the clients whose model is known. Raises `DamagedDocument`."""
        self._last_s = now
        self._requests = whole(field(document, "requests"), "requests")
        self._gap_s = number(field(document, "gap_s"), "gap_s", least=1e-3)
        self._reached = numbers(field(document, "reached"), "reached", _BUCKETS)
        self._returned = numbers(field(document, "returned"), "returned", _BUCKETS)
        pairs = rows(field(document, "stayed"), "stayed", _RUNS)
        self._stayed = [numbers(pair, "stayed", 2, least=0.5) for pair in pairs]
        self._chances = numbers(field(document, "chances"), "chances", _BUCKETS, most=1.0)
        longest_s = math.inf
        for row in rows(field(document, "clients"), "clients"):
            client, age_s, its_names, run, stays = rows(row, "a client", 5)
            longest_s = number(age_s, "a client's absence", most=longest_s)
            its_names = [named(place, names, "a client's model") for place in rows(its_names, "names")]
            run, stays = whole(run, "a run", _RUNS - 1), number(stays, "a client's constancy", most=1.0)
            if its_names and its_names[0]:
                self._restore_visit(
                    _Visit(
                        text(client, "a client"), now - longest_s, tuple(filter(None, its_names)), run, stays
                    )
                )

    # -- inside -------------------------------------------------------------------------------------

    def _restore_visit(self, visit: _Visit) -> None:
        if visit.client in self._clients or len(self._clients) > _CLIENTS:
            raise DamagedDocument("a client comes twice, or there are too many")
        visit.bucket = min(_BUCKETS - 1, bisect_right(_STARTS_S, self._last_s - visit.at_s) - 1)
        self._clients[visit.client] = visit
        self._line_up(visit)
        self._hold(visit)

    def _welcome_back(self, client: str, names: tuple[str, ...]) -> int:
        """Learn from a client that came back; how often in a row it has asked for the same, up to a few."""
        before = self._clients.get(client)
        if before is None:
            return 0
        self._drop(client)
        self._returned[before.bucket] += 1.0
        is_same = before.names[0] == names[0]
        self._stayed[before.run][0 if is_same else 1] += 1.0
        return min(before.run + 1, _RUNS - 1) if is_same else 0

    def _drop(self, client: str) -> None:
        self._let_go(self._clients.pop(client))

    def _rename(self, visit: _Visit, names: tuple[str, ...]) -> None:
        self._let_go(visit)
        visit.names = names
        self._hold(visit)

    def _line_up(self, visit: _Visit) -> None:
        """The client is the last in its bucket."""
        bucket = visit.bucket
        if not self._away[bucket] and bucket + 1 < _BUCKETS:
            heapq.heappush(self._due, (visit.at_s + _STARTS_S[bucket + 1], bucket))
        self._away[bucket].append(visit)

    def _hold(self, visit: _Visit) -> None:
        """Count the client among those that would ask for these names again."""
        self._all[visit.bucket] += visit.stays
        self._everybody = None
        for name in visit.names:
            self._held.setdefault(name, [0.0] * _BUCKETS)[visit.bucket] += visit.stays
            self._holders[name] = self._holders.get(name, 0) + 1

    def _let_go(self, visit: _Visit) -> None:
        """The client is none of those."""
        self._all[visit.bucket] -= visit.stays
        self._everybody = None
        for name in visit.names:
            self._held[name][visit.bucket] -= visit.stays
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._held[name], self._holders[name]

    def _age(self, visit: _Visit) -> None:
        """The client has been away longer. Some twenty times a request, so nothing is called."""
        bucket, stays, held = visit.bucket, visit.stays, self._held
        visit.bucket = bucket + 1
        self._all[bucket] -= stays
        self._all[bucket + 1] += stays
        self._everybody = None
        for name in visit.names:
            clients = held[name]
            clients[bucket] -= stays
            clients[bucket + 1] += stays

    def _learn(self) -> None:
        """The chance to come back within the horizon, by how long a client has been away."""
        surviving = [1.0]
        for reached, returned in zip(self._reached, self._returned):
            surviving.append(surviving[-1] * (1.0 - min(0.98, returned / max(reached, returned + 0.01))))

        def at(age_s: float) -> float:
            place = min(_BUCKETS - 1e-9, 2.0 * math.log2(age_s + 1.0))
            bucket = int(place)
            here, there = surviving[bucket], surviving[bucket + 1]
            return here * math.pow(there / here, place - bucket)

        for bucket in range(_BUCKETS):
            age_s = (_starts_at_s(bucket) + _starts_at_s(bucket + 1)) / 2.0
            self._chances[bucket] = 1.0 - at(age_s + self._gap_s) / at(age_s)
        self._everybody = None


def _starts_at_s(bucket: int) -> float:
    """Half-octaves: 0, 0.4, 1, 1.8, 3 ... seconds."""
    return math.pow(2.0, bucket / 2.0) - 1.0


_STARTS_S = [_starts_at_s(bucket) for bucket in range(_BUCKETS)]
