"""Single views of what comes next. Each gives names shares that add up to about 1; `forecast.py` mixes them.

A request brings several names at once, its model and the blobs of it, and each is predicted like a model.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_FOLLOWERS = 16
_FOLLOWER_HALF_LIFE = 34.0
_CLIENTS = 4096
_BUCKETS = 44
_RUNS = 4
_LEARN_EVERY = 32
_MEDIAN_STEP = 1.05


class Predictor(Protocol):
    """What all of them can do besides learning from a request."""

    def share(self, name: str) -> float:
        """The part of the next requests that is expected to ask for `name`, 0 to 1."""

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""

    def forget(self, name: str) -> None:
        """Count on this name no more."""


class Popularity:
    """Counts that decay with a half-life, in requests or in seconds (LRFU: Lee et al., 2001).

    A short one sees bursts, a long one lasting popularity. In requests a quiet night forgets nothing, in
    seconds it does.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._now = 0.0
        self._total = 0.0
        self._total_at = 0.0
        self._counts: dict[str, tuple[float, float]] = {}  # as it stood, and when that was

    def saw(self, names: Iterable[str], now: float) -> None:
        """A request; `now` is in the unit of the half-life and never goes back."""
        self._total = self._total * self._fade(now - self._total_at) + 1.0
        self._total_at = self._now = now
        for name in names:
            count, at = self._counts.get(name, (0.0, now))
            self._counts[name] = (count * self._fade(now - at) + 1.0, now)

    def share(self, name: str) -> float:
        """The name's share of the requests that still count."""
        known = self._counts.get(name)
        if known is None:
            return 0.0
        count, at = known
        return count * self._fade(self._total_at - at) / self._total  # both fade alike since then

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""
        if source in self._counts:
            self._counts[name] = self._counts[source]

    def forget(self, name: str) -> None:
        """Count on this name no more."""
        self._counts.pop(name, None)

    def _fade(self, age: float) -> float:
        return math.pow(0.5, age / self._half_life)


class Succession:
    """Which names come right after which model: a few followers each, the recent ones first."""

    def __init__(self) -> None:
        self._last = ""
        self._after: dict[str, dict[str, float]] = {}

    def saw(self, names: tuple[str, ...]) -> None:
        """A request; its first name stands for it."""
        if self._last:
            followers = self._after.setdefault(self._last, {})
            fade = math.pow(0.5, 1.0 / _FOLLOWER_HALF_LIFE)
            for name in followers:
                followers[name] *= fade
            for name in ("", *names):  # "" counts them all
                followers[name] = followers.get(name, 0.0) + 1.0
            if len(followers) > _FOLLOWERS * len(names):
                del followers[min(followers, key=followers.__getitem__)]
        self._last = names[0]

    def share(self, name: str) -> float:
        """How often it came after what came last."""
        followers = self._after.get(self._last)
        return followers.get(name, 0.0) / followers[""] if followers else 0.0

    def inherit(self, name: str, source: str) -> None:
        """A new name for what `source` was asked for."""
        for followers in self._after.values():
            if source in followers:
                followers[name] = followers[source]

    def forget(self, name: str) -> None:
        """Count on this name no more."""
        self._after.pop(name, None)
        for followers in self._after.values():
            followers.pop(name, None)


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
        self._held: dict[str, dict[int, float]] = {}  # name -> bucket -> clients that would ask for it again
        self._all = [0.0] * _BUCKETS

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
        self._away[0].append(visit)
        self._hold(visit, 1.0)
        if len(self._clients) > _CLIENTS:
            self._drop(next(iter(self._clients)))
        if self._requests % _LEARN_EVERY == 1:
            self._learn()

    def pass_time(self, now_s: float) -> None:
        """Clients that have not come back have been away longer."""
        for bucket, away in enumerate(self._away[:-1]):
            longest_s = _starts_at_s(bucket + 1)
            while away and now_s - away[0].at_s >= longest_s:
                visit = away.popleft()
                if self._clients.get(visit.client) is visit:
                    self._hold(visit, -1.0)
                    visit.bucket = bucket + 1
                    self._hold(visit, 1.0)
                    self._reached[bucket + 1] += 1.0
                    self._away[bucket + 1].append(visit)

    def share(self, name: str) -> float:
        """Among the clients that are expected back, those that will ask for it."""
        held = self._held.get(name)
        if not held:
            return 0.0
        chances = self._chances
        everybody = sum(map(float.__mul__, chances, self._all))
        expected = sum(chances[bucket] * clients for bucket, clients in held.items())
        return expected / everybody if everybody > 0.0 else 0.0

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

    # -- inside -------------------------------------------------------------------------------------

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
        self._hold(self._clients.pop(client), -1.0)

    def _rename(self, visit: _Visit, names: tuple[str, ...]) -> None:
        self._hold(visit, -1.0)
        visit.names = names
        self._hold(visit, 1.0)

    def _hold(self, visit: _Visit, sign: float) -> None:
        """Count the client among those that would ask for these names again, or no longer."""
        clients, bucket = sign * visit.stays, visit.bucket
        self._all[bucket] += clients
        for name in visit.names:
            held = self._held.setdefault(name, {})
            held[bucket] = held.get(bucket, 0.0) + clients
            if held[bucket] < 1e-9:
                del held[bucket]
                if not held:
                    del self._held[name]

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


def _starts_at_s(bucket: int) -> float:
    """Half-octaves: 0, 0.4, 1, 1.8, 3 ... seconds."""
    return math.pow(2.0, bucket / 2.0) - 1.0
