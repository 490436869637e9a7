"""Loads in time: what should be on its way first, and what had better wait, so that the stage is not idle.

As long as each model can be ready when the stage is free, they are loaded in the order in which they will
run. Where the first one cannot, the stage would wait for it: then the model that is ready soonest comes
first, be it because it lies in the host pool or because it is nearly there (shortest job first; who presses
keeps his place, which bounds what that costs the others). And whoever the stage waits for has disk and bus
to himself: two loads at a time each take twice as long, and only the first one's end is awaited.

The other way round, nothing is thrown out for a model long before its turn: what is popular would make way
for what lies there and waits. While enough that is ready runs before it, only memory that nobody uses is
filled.

What is put off waits for a load's end or a run's, which are events: no clock has to wake anybody.
"""

from collections.abc import Sequence
from itertools import islice

from understudyd.core.entities import Model
from understudyd.core.outlook import Outlook
from understudyd.core.queueing import RequestQueue
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState

_MARGIN = 4.0
"""Early is what could be ready so many times over: loads keep each other waiting, and estimates err."""

_LOOKED_AT = 16


class Timely:
    """Judgements over what shall be loaded, by what is expected. Unless it `may_change`, the order stands.

    `names` are the models to load, as they were last put in order. While `stage_awaits_load`, nothing else
    starts.
    """

    def __init__(
        self, queue: RequestQueue, residency: Residency, outlook: Outlook, *, may_change: bool
    ) -> None:
        self.names: Sequence[str] = ()
        self.stage_awaits_load = False
        self._queue = queue
        self._models = residency.models
        self._outlook = outlook
        self._may_change = may_change
        self._is_changed = False

    def order(self, names: Sequence[str], now_s: float) -> Sequence[str]:
        """Models to load, given as they are expected to run, in the order in which to load them."""
        self.names, self._is_changed = names, False
        may_change = self._may_change and len(names) > 1 and not self._presses(names[0])
        if may_change and self._is_late(names[0], now_s):
            equals = self._equals(names)
            equals.sort(key=lambda name: self._outlook.ready_in_s(self._models[name], now_s))
            self.names = [*equals, *names[len(equals) :]]
            self._is_changed = self.names != names
        return self.names

    def loaded_before(self, name: str) -> frozenset[str]:
        """The blobs of those that come before it in an order that was changed."""
        if not self._is_changed or name not in self.names:
            return frozenset()
        before = self.names[: self.names.index(name)]
        known = (self._models[other] for other in before if other in self._models)  # one may just have left
        return frozenset(blob.key for model in known for blob in model.all_blobs)

    def keeps_others_waiting(self, model: Model, now_s: float) -> bool:
        """It is on its way, and the stage will wait for it: nothing else should slow it down."""
        is_coming = any(blob.state is BlobState.LOADING for blob in model.needed())
        self.stage_awaits_load = is_coming and self._is_late(model.name, now_s)
        return self.stage_awaits_load

    def is_early(self, model: Model, now_s: float) -> bool:
        """What is ready, and runs before it, keeps the stage busy far longer than it takes to be ready.

        What runs already does not count: it may run for minutes, in which nothing happens.
        """
        own = self._queue.head_of(model.name)
        if own is None or self._presses(model.name):
            return False
        left_s = _MARGIN * self._outlook.ready_in_s(model, now_s)
        for request in islice(self._queue.heads(), _LOOKED_AT):
            if request is own:
                return False
            if self._models[request.model].is_ready:
                left_s -= self._outlook.run_s(request)
                if left_s < 0.0:
                    return True
        return False

    def _is_late(self, name: str, now_s: float) -> bool:
        """It cannot be ready when the stage is free."""
        return self._outlook.ready_in_s(self._models[name], now_s) > self._outlook.stage_free_in_s(now_s)

    def _presses(self, name: str) -> bool:
        return self._queue.pressing.first_of(name) is not None

    def _equals(self, names: Sequence[str]) -> list[str]:
        """Those in front that may change places: of one priority, the highest."""
        heads = [self._queue.head_of(name) for name in names]
        priorities = [head.info.priority if head is not None else 0 for head in heads]
        return [name for name, priority in zip(names, priorities) if priority == priorities[0]]
