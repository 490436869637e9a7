"""What idle loaders bring to the host pool: what waits, in its order, then what is likely, then the rest.

Nothing is in a hurry here: a load into the arena that finds no loader stops one of these.
"""

from collections.abc import Iterator
from itertools import chain, islice

from understudyd.core.demand import Demand
from understudyd.core.entities import Blob
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
        self, policy: Policy, queue: RequestQueue, residency: Residency, transit: Transit, demand: Demand
    ) -> None:
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
            if not self._fetch(self._awaited(), float("inf"), now_s):
                self._no_room = self._crowd()
            self._settled = self._state()
        if settings.prefetch and self._has_loader() and self._nothing_likely != self._history():
            pool = self._residency.copies.pool
            if pool.largest_gap_bytes > self._too_small_bytes or self._full != self._fullness():
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

    def _fetch(self, blobs: Iterator[Blob], limit: float, now_s: float) -> bool:
        """Fetch one after the other until no loader is left; False when there is no room."""
        for blob in blobs:
            if blob.life.state is not BlobState.ABSENT or blob.copy is not None or blob.retry_at_s > now_s:
                continue
            loader = next(self._residency.idle_loaders(), None)
            if loader is None:
                return True
            if not self._transit.begin_fetch(blob, loader, limit, now_s):
                return False
        return True

    def _awaited(self) -> Iterator[Blob]:
        models = self._residency.models
        for name in islice(self._demand.lacking(), HORIZON_MODELS):
            yield from models[name].files

    def _likely(self) -> Iterator[Blob]:
        """Of those that were ever asked for, likeliest first, then the others: free memory is of no use.

        Of derived models only adapters: the rest is looked at as the other model's, for there are very many.
        """
        models, forecast = self._residency.models, self._policy.forecast
        unknown = (name for name in models if not forecast.knows(name))
        for name in chain(forecast.ranked(), unknown):
            model = models[name]
            if not (model.retiring or model.is_unfit):
                yield from model.adapters or model.blobs

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
