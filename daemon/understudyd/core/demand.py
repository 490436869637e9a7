"""Who counts on which blob: those who wait, what an operator wants, and what history says."""

from collections import OrderedDict
from collections.abc import Set

from understudyd.core.entities import Blob
from understudyd.core.forecast import Forecast
from understudyd.core.queueing import RequestQueue


class Demand:
    """`wanted` are the models that an operator wants resident, once."""

    def __init__(self, queue: RequestQueue, forecast: Forecast) -> None:
        self.wanted: OrderedDict[str, None] = OrderedDict()
        self._queue = queue
        self._forecast = forecast
        self._was_wanted: list[str] = []

    @property
    def awaited(self) -> Set[str]:
        """The models that somebody waits for or that an operator wants."""
        models = self._queue.models()
        return models | self.wanted.keys() if self.wanted else models

    def awaits(self, blob: Blob) -> bool:
        """One of its models is awaited."""
        if not self._queue.models().isdisjoint(blob.models):
            return True
        return bool(self.wanted) and not self.wanted.keys().isdisjoint(blob.models)

    def chance(self, blob: Blob) -> float:
        """The chance that the next request needs it."""
        return self._forecast.chance(blob.key)

    def turned(self) -> list[str]:
        """The models that have begun or ceased to be awaited, or were asked for, since the last time."""
        turned = list(self._queue.turned)
        self._queue.turned.clear()
        if self.wanted or self._was_wanted:
            turned += [*self._was_wanted, *self.wanted]
            self._was_wanted = list(self.wanted)
        return turned
