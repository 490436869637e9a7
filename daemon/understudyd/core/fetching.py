"""What idle loaders bring to the host pool: what waits, in its order, then what is likely, then the rest.

Nothing is in a hurry here: a load into the arena that finds no loader stops one of these.
"""

from collections.abc import Iterable
from itertools import chain, islice

from understudyd.core.demand import Demand
from understudyd.core.entities import Blob
from understudyd.core.pace import Pace
from understudyd.core.policy import Policy
from understudyd.core.queueing import RequestQueue
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState
from understudyd.core.transit import Transit

HORIZON_MODELS = 32
"""So many of the models that wait for weights are looked at: enough for minutes, and a bounded effort."""


class Fetching:
    """Starts loads that end in the host pool."""

    def __init__(
        self,
        policy: Policy,
        queue: RequestQueue,
        residency: Residency,
        transit: Transit,
        demand: Demand,
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._policy = policy
        self._demand = demand
        self._queue = queue
        self._residency = residency
        self._transit = transit
        self._no_room: object = None
        self._settled: object = None
        self._nothing_likely: object = None
        self._too_small_bytes = 0
        self._full: object = None

    def start(self, now_s: float) -> None:
        """Give every idle loader something to fetch, if there is anything."""
        settings = self._policy.settings
        if not self._residency.copies.pool.size_bytes or not settings.lookahead or not self._has_loader():
            return
        if self._settled != self._state() and self._no_room != self._crowd():
            if not self._pace.may_go_on():
                return
            if not self._fetch(self._awaited(), float("inf"), now_s):
                self._no_room = self._crowd()
            if self._pace.has_more:
                return
            self._settled = self._state()
        if settings.prefetch and self._has_loader() and self._nothing_likely != self._history():
            pool = self._residency.copies.pool
            is_worth_it = pool.largest_gap_bytes > self._too_small_bytes or self._full != self._fullness()
            if is_worth_it and self._pace.may_go_on():
                self._guess(now_s)

    def _guess(self, now_s: float) -> None:
        pool = self._residency.copies.pool
        self._too_small_bytes = 0
        if not self._fetch(self._likely(), 0.0, now_s):
            self._too_small_bytes, self._full = pool.largest_gap_bytes, self._fullness()
        elif self._has_loader():
            self._nothing_likely = self._history()

    def _has_loader(self) -> bool:
        return next(self._residency.idle_loaders(), None) is not None

    def _fetch(self, blobs: Iterable[Blob], limit: float, now_s: float) -> bool:
        """Fetch one blob after the other until no loader is left; False when there is no room."""
        pool = self._residency.copies.pool
        for blob in blobs:
            if blob.copy is not None or blob.life.state is not BlobState.ABSENT or blob.retry_at_s > now_s:
                continue
            loader = next(self._residency.idle_loaders(), None)
            if loader is None:
                return True
            if blob.info.size_bytes > pool.largest_gap_bytes:
                if not self._pace.may_go_on():
                    return True
                self._pace.went_over(pool.extent_count)
            if not self._transit.begin_fetch(blob, loader, limit, now_s):
                return False
        return True

    def _awaited(self) -> Iterable[Blob]:
        models = self._residency.models
        names = islice(self._demand.lacking(), HORIZON_MODELS)
        return chain.from_iterable(models[name].files for name in names)

    def _likely(self) -> Iterable[Blob]:
        """Whatever is nowhere, the likeliest first: free memory is of no use."""
        evictables, models = self._residency.evictables, self._residency.models
        evictables.file()
        evictables.away.refresh(self._demand.looked_at, self._demand.moment)
        for _, _, blob in list(evictables.away.entries):
            if not all(models[name].retiring or models[name].is_unfit for name in blob.models):
                yield blob

    def _state(self) -> object:
        """While this stands, the same is awaited, and idle loaders have nothing more of it to fetch."""
        return self._residency.version(), self._residency.copies.changes, self._queue.changes

    def _crowd(self) -> object:
        """While this stands, what is awaited finds no more room: nobody left whose copy could be replaced."""
        residency = self._residency
        changes = (residency.copies.changes, residency.replacements, residency.arrivals)
        return (*changes, self._queue.relieved)

    def _fullness(self) -> object:
        """While this stands, a gap in the pool that was too small for what is likely still is."""
        residency = self._residency
        return residency.copies.pool.releases, residency.replacements, len(residency.models)

    def _history(self) -> object:
        """While this stands, nothing else is likely that has no copy yet, or there is no gap for it."""
        residency = self._residency
        changes = (residency.copies.changes, residency.losses, residency.retries.pauses)
        return (*changes, residency.replacements, len(residency.models))
