"""Who counts on which model and which blob: those who wait, what an operator wants, what history says."""

from collections import OrderedDict
from collections.abc import Iterator, Set

from understudyd.core.entities import Blob, Model
from understudyd.core.forecast import Forecast
from understudyd.core.queueing import RequestQueue
from understudyd.core.ranking import LOOKED_AT, Ranking
from understudyd.core.states import BlobState

Need = tuple[int, int, bool, float, int]
"""Class, negative priority, whether the stage changes over, tag, arrival: sorts as things should run."""

_STRICT = _PRESSING = 0
_READY, _REST, _WISHED = range(1, 4)
LAST: Need = (_WISHED + 1, 0, False, 0.0, 0)


def is_pressing(need: Need) -> bool:
    """What is ready may have to make room for it."""
    return need[0] < _READY


class Demand:
    """`wanted` are the models that an operator wants resident, once; `ready` those that can go on deck.

    In a strict order nothing goes before what came earlier, ready or not. What somebody waits for is kept
    sorted: whatever may change a model's place is marked, here or by the queue. Chances change with every
    request: those that things are sorted by are looked at again by turns, `looked_at` at once.
    """

    def __init__(self, queue: RequestQueue, forecast: Forecast, *, is_strict: bool) -> None:
        self.wanted: OrderedDict[str, None] = OrderedDict()
        self.ready: dict[str, Model] = {}
        self._queue = queue
        self.forecast = forecast
        self.looked_at = LOOKED_AT
        self._is_strict = is_strict
        self._was_wanted: list[str] = []
        self._marked = queue.turned
        self._turned: dict[str, None] = {}
        self._lacking: Ranking[str] = Ranking(self.need)
        self._staging: Ranking[str] = Ranking(self.need)

    @property
    def awaited(self) -> Set[str]:
        """The models that somebody waits for or that an operator wants."""
        models = self._queue.models()
        return models | self.wanted.keys() if self.wanted else models

    def awaits(self, blob: Blob) -> bool:
        """One of its users is awaited."""
        users = blob.users
        if not self._queue.models().isdisjoint(users):
            return True
        return bool(self.wanted) and not self.wanted.keys().isdisjoint(users)

    def is_coming(self, blob: Blob) -> bool:
        """Somebody waits for it, and it is not in the arena: a host copy of it is about to be read."""
        return blob.state is not BlobState.RESIDENT and self.awaits(blob)

    def ready_awaits(self, blob: Blob) -> bool:
        """One of its users is awaited and ready."""
        ready, awaited, users = self.ready, self.awaited, blob.users
        if len(users) < len(ready):
            return any(name in ready and name in awaited for name in users)
        return any(name in users and name in awaited for name in ready)

    def chance(self, blob: Blob) -> float:
        """The chance that the next request needs it."""
        return self.forecast.chance(blob.key)

    @property
    def moment(self) -> object:
        """While it is the same, so are all chances."""
        return self._queue.arrivals

    # -- how soon -----------------------------------------------------------------------------------

    def need(self, name: str, on_stage: str | None = None) -> Need:
        """When the model is expected to run, the smaller the sooner; LAST when nobody waits for it."""
        place = self._queue.first_place(name)
        if place is None:
            return (_WISHED, 0, False, 0.0, self._wish(name)) if name in self.wanted else LAST
        urgency, tag, seq, _ = place
        if self._is_strict:
            return (_STRICT, urgency, False, tag, seq)
        if (turn := self._queue.pressing.ended.first(name)) is not None:
            return (_PRESSING, 0, False, turn[0], turn[1])
        if name in self.ready:
            return (_READY, urgency, name != on_stage, tag, seq)
        return (_REST, urgency, False, tag, seq)

    def soonest(self, blob: Blob, on_stage: str | None = None) -> Need:
        """When the first of its users is expected to run; LAST when nobody waits for any."""
        users = blob.users
        if len(users) == 1:
            (name,) = users
            return self.need(name, on_stage)
        return min((self.need(name, on_stage) for name in self.awaited & users), default=LAST)

    def ready_last_first(self, on_stage: str | None) -> Iterator[tuple[Need, str]]:
        """Models that somebody waits for and that are ready, who is expected to run last first."""
        self._sort()
        staged = self.need(on_stage, on_stage) if on_stage is not None and on_stage in self._staging else LAST
        for need, _, name in reversed(self._staging.entries):
            if name == on_stage:
                continue
            if on_stage is not None and need < staged < LAST:
                yield staged, on_stage
                staged = LAST
            yield need, name
        if on_stage is not None and staged < LAST:
            yield staged, on_stage

    def lacking(self) -> Iterator[str]:
        """Models that somebody waits for and that are not ready, as they are expected to run."""
        self._sort()
        return (name for _, name in self._lacking)

    # -- what has changed ---------------------------------------------------------------------------

    def mark(self, name: str) -> None:
        """The model has become ready, or is not any more."""
        self._marked[name] = None

    def turned(self) -> list[str]:
        """The models whose place may have changed since this was last asked."""
        self._sort()
        turned = list(self._turned)
        self._turned.clear()
        if (wanted := list(self.wanted)) != self._was_wanted:
            turned += [*self._was_wanted, *wanted]
            self._was_wanted = wanted
        return turned

    def _sort(self) -> None:
        for name in self._marked:
            self._turned[name] = None
            self._lacking.discard(name)
            self._staging.discard(name)
            if self._queue.first_place(name) is not None:
                (self._staging if name in self.ready else self._lacking).put(name)
        self._marked.clear()

    def _wish(self, name: str) -> int:
        return list(self.wanted).index(name)

    # -- invariants ---------------------------------------------------------------------------------

    def unseen(self) -> Set[str]:
        """What `turned` would tell."""
        unseen = self._marked.keys() | self._turned.keys()
        is_same = list(self.wanted) == self._was_wanted
        return unseen if is_same else unseen | self.wanted.keys() | set(self._was_wanted)

    def check(self) -> None:
        """Who lacks something is known, each in its place, but for those that are marked."""
        for ranking, is_ready in ((self._lacking, False), (self._staging, True)):
            ranking.check()
            names = {name for name in self._queue.models() if (name in self.ready) is is_ready}
            assert {name for _, name in ranking} ^ names <= self._marked.keys()
            assert all(need == self.need(name) or name in self._marked for need, name in ranking)
