"""Loads in time: what should be on its way first, and what had better wait, so that the stage is not idle.

As long as each model can be ready when the stage is free, they are loaded in the order in which they will run. Where
the first one cannot, the stage would wait for it: then the model that is ready soonest comes first, be it because
it lies in the host pool or because it is nearly there (shortest job first; who presses keeps his place, which
bounds what that costs the others). And whoever the stage waits for has disk and bus to himself: two loads at a
time each take twice as long, and only the first one's end is awaited.

Nothing is put off but while such a load is under way, and its end is an event: no clock has to wake anybody.
"""

from collections.abc import Sequence

from understudyd.core.entities import Model
from understudyd.core.outlook import Outlook
from understudyd.core.queueing import RequestQueue
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState


class Timely:
    """Judgements over what shall be loaded, by what is expected. Unless it `may_change`, the order stands."""

    def __init__(
        self, queue: RequestQueue, residency: Residency, outlook: Outlook, *, may_change: bool
    ) -> None:
        self._may_change = may_change
        self._queue = queue
        self._models = residency.models
        self._outlook = outlook

    def order(self, names: Sequence[str], now_s: float) -> list[str]:
        """Models to load, given in their expected order, in the order in which to load them."""
        if len(names) < 2 or not self._may_change or self._presses(names[0]) or not self._is_late(names[0], now_s):
            return list(names)
        first = self._queue.head_of(names[0])
        priority = first.info.priority if first is not None else 0
        equals = [name for name in names if self._is_equal(name, priority)]
        equals.sort(key=lambda name: self._outlook.ready_in_s(self._models[name], now_s))
        return [*equals, *(name for name in names if name not in equals)]

    def keeps_others_waiting(self, model: Model, now_s: float) -> bool:
        """It is on its way, and the stage will wait for it: nothing else should slow it down."""
        if all(blob.state is not BlobState.LOADING for blob in model.blobs):
            return False
        return self._is_late(model.name, now_s)

    def _is_late(self, name: str, now_s: float) -> bool:
        """It cannot be ready when the stage is free."""
        return self._outlook.ready_in_s(self._models[name], now_s) > self._outlook.stage_free_in_s(now_s)

    def _presses(self, name: str) -> bool:
        return self._queue.pressing.first_of(name) is not None

    def _is_equal(self, name: str, priority: int) -> bool:
        """It may change places with others of this priority."""
        head = self._queue.head_of(name)
        return head is not None and head.info.priority == priority and not self._presses(name)
