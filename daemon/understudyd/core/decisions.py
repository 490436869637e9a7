"""Why the machine did what it did: its last decisions, each with the numbers that it was made by.

Kept only where an operator asks for it (`[policy] decisions`). Nothing here has a part in deciding: a machine
that keeps them does the same as one that does not.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from understudyd.core.entities import Blob, Load
from understudyd.core.forecast import Forecast
from understudyd.core.queueing import RequestQueue
from understudyd.core.states import RequestState
from understudyd.core.types import ErrorCode, RequestInfo

Why = Literal["awaited", "pinned", "wanted", "likely"]
"""Somebody waits for it; it is pinned; an operator wants it; or only the forecast speaks for it."""

NO_DECISION = (ErrorCode.CANCELLED, ErrorCode.CLIENT_GONE)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A request went on deck, and `overtook` others that wait before it in the fair order.

    Of these, one has waited `longest_wait_s` since its turn came, and one has been overtaken `most_skips`
    times by now; the bounds are `max_wait_s` and `max_skips`. `waited_s`, since it was received, and `skips`
    are the chosen one's own. It goes `along_with` another request, in one batch; "" for none.
    """

    at_s: float
    models: tuple[str, ...]
    request: str
    client: str
    priority: int
    waited_s: float
    skips: int
    was_on_stage: bool
    overtook: int
    longest_wait_s: float
    most_skips: int
    max_wait_s: float
    max_skips: int
    along_with: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """A load was started for these models, from disk or from the host pool, into the arena or no further.

    `waiting` counts the requests that wait for one of them, `chance` is that of the blob to be needed next.
    """

    at_s: float
    models: tuple[str, ...]
    blob: str
    size_bytes: int
    is_from_host: bool
    is_to_host: bool
    why: Why
    waiting: int
    chance: float


@dataclass(frozen=True, slots=True)
class Folding:
    """An overlay is being folded for these models, out of the blobs `made_of`: the base's, then adapters'.

    `waiting` counts the requests that wait for one of them, `chance` is that of it to be needed next.
    """

    at_s: float
    models: tuple[str, ...]
    blob: str
    made_of: tuple[str, ...]
    size_bytes: int
    why: Why
    waiting: int
    chance: float


@dataclass(frozen=True, slots=True)
class Victim:
    """A blob that was evicted: at what price, and what it was expected to be needed for.

    Below 1 the price is the expected number of reloads; of what somebody waits for it is far above.
    """

    blob: str
    models: tuple[str, ...]
    size_bytes: int
    price: float | None
    chance: float
    waiting: int
    has_copy: bool


@dataclass(frozen=True, slots=True)
class Evicted:
    """Blobs left the arena, for `room_for` (a blob; "" for none) or `why` else. `price` is that of all."""

    at_s: float
    models: tuple[str, ...]
    room_for: str
    why: str
    price: float | None
    victims: tuple[Victim, ...]


@dataclass(frozen=True, slots=True)
class FoundNoRoom:
    """A load must wait: what could be evicted for it is needed sooner, or is in use."""

    at_s: float
    models: tuple[str, ...]
    blob: str
    size_bytes: int
    free_bytes: int
    largest_gap_bytes: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """A load or a fold was stopped: `waiting` requests wanted it, others were to have its turn or room."""

    at_s: float
    models: tuple[str, ...]
    blob: str
    is_to_host: bool
    waiting: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A request was not admitted, or got no images after `waited_s`."""

    at_s: float
    models: tuple[str, ...]
    request: str
    client: str
    code: str
    message: str
    waited_s: float | None


Decision = Chosen | Loading | Folding | Evicted | FoundNoRoom | Stopped | Refused


class Decisions:
    """The last `most`. `now_s` is the time of the event that is being handled."""

    def __init__(
        self, most: int, queue: RequestQueue, forecast: Forecast, max_wait_s: float, max_skips: int
    ) -> None:
        self.now_s = 0.0
        self._kept: deque[Decision] = deque(maxlen=most)
        self._queue = queue
        self._forecast = forecast
        self._max_wait_s = max_wait_s
        self._max_skips = max_skips

    def last(self, most: int, model: str | None = None) -> list[Decision]:
        """The last `most`, or as many about one model; the newest last."""
        found = [decision for decision in self._kept if model is None or model in decision.models]
        return found[-most:] if most > 0 else []

    # -- what is decided ----------------------------------------------------------------------------

    def chose(self, request_id: str, on_stage: str | None, along_with: str = "") -> None:
        """The request has been taken from the queue, to go on deck."""
        chosen = self._queue.requests[request_id]
        waiting = [r for r in self._queue.requests.values() if r.state is RequestState.WAITING]
        overtaken = [r for r in waiting if r.turn < chosen.turn]
        waits_s = [self.now_s - r.turn_at_s for r in overtaken if r.turn_at_s is not None]
        decision = Chosen(
            at_s=self.now_s,
            models=(chosen.model,),
            request=chosen.id,
            client=chosen.info.client,
            priority=chosen.info.priority,
            waited_s=self.now_s - chosen.received_at_s,
            skips=chosen.skips,
            was_on_stage=chosen.model == on_stage,
            overtook=len(overtaken),
            longest_wait_s=max(waits_s, default=0.0),
            most_skips=max(map(self._queue.skips_of, overtaken), default=0),
            max_wait_s=self._max_wait_s,
            max_skips=self._max_skips,
            along_with=along_with,
        )
        self._kept.append(decision)

    def loading(self, load: Load, *, is_pinned: bool, is_likely: bool) -> None:
        """A load was started, into memory that nobody uses if it is only likely to be asked for."""
        blob = load.blob
        waiting = self._waiting(blob)
        decision = Loading(
            at_s=self.now_s,
            models=tuple(sorted(blob.models)),
            blob=blob.key,
            size_bytes=blob.info.size_bytes,
            is_from_host=load.from_pool,
            is_to_host=load.extent is None,
            why=_why(waiting, is_pinned=is_pinned, is_likely=is_likely),
            waiting=waiting,
            chance=self._forecast.chance(blob.key),
        )
        self._kept.append(decision)

    def folding(self, overlay: Blob, *, is_pinned: bool, is_likely: bool) -> None:
        """A fold was started, into memory that nobody uses if it is only likely to be asked for."""
        waiting = self._waiting(overlay)
        decision = Folding(
            at_s=self.now_s,
            models=tuple(sorted(overlay.models)),
            blob=overlay.key,
            made_of=tuple(source.key for source in overlay.sources),
            size_bytes=overlay.info.size_bytes,
            why=_why(waiting, is_pinned=is_pinned, is_likely=is_likely),
            waiting=waiting,
            chance=self._forecast.chance(overlay.key),
        )
        self._kept.append(decision)

    def evicted(
        self,
        victims: Iterable[tuple[Blob, float | None]],
        room_for: str,
        why: str,
        price: float | None = None,
    ) -> None:
        """These blobs are about to leave the arena, each with its price."""
        told = tuple(self._victim(blob, its_price) for blob, its_price in victims)
        models = dict.fromkeys(name for victim in told for name in victim.models)
        self._kept.append(Evicted(self.now_s, tuple(models), room_for, why, price, told))

    def found_no_room(self, blob: Blob, free_bytes: int, largest_gap_bytes: int) -> None:
        """Nothing may be evicted for this load."""
        models = tuple(sorted(blob.models))
        size_bytes = blob.info.size_bytes
        self._kept.append(
            FoundNoRoom(self.now_s, models, blob.key, size_bytes, free_bytes, largest_gap_bytes)
        )

    def stopped(self, blob: Blob, *, is_to_host: bool) -> None:
        """A load of it, or the fold, is told to stop."""
        models = tuple(sorted(blob.models))
        self._kept.append(Stopped(self.now_s, models, blob.key, is_to_host, self._waiting(blob)))

    def refused(self, info: RequestInfo, code: ErrorCode, message: str) -> None:
        """The request gets no images. Those who did not want them any more are passed over."""
        if code in NO_DECISION:
            return
        request = self._queue.requests.get(info.request_id)
        waited_s = None if request is None else self.now_s - request.received_at_s
        self._kept.append(
            Refused(self.now_s, (info.model,), info.request_id, info.client, code.value, message, waited_s)
        )

    # -- inside -------------------------------------------------------------------------------------

    def _victim(self, blob: Blob, price: float | None) -> Victim:
        return Victim(
            blob=blob.key,
            models=tuple(sorted(blob.models)),
            size_bytes=blob.info.size_bytes,
            price=price,
            chance=self._forecast.chance(blob.key),
            waiting=self._waiting(blob),
            has_copy=blob.has_copy,
        )

    def _waiting(self, blob: Blob) -> int:
        """How many requests wait for it."""
        return sum(len(self._queue.waiting_for(name)) for name in blob.models)


def _why(waiting: int, *, is_pinned: bool, is_likely: bool) -> Why:
    return "awaited" if waiting else "pinned" if is_pinned else "likely" if is_likely else "wanted"
