"""What is legal: one transition table per kind of entity, and the little class that enforces them.

After h11: an illegal transition raises with the entity's recent history and changes nothing.
"""

from collections import deque
from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Generic, TypeVar


class RequestState(StrEnum):
    """A request, from admission to its one answer."""

    WAITING = "waiting"
    ON_DECK = "on_deck"
    RUNNING = "running"
    ENCODING = "encoding"
    ANSWERED = "answered"


class BlobState(StrEnum):
    """A blob as the arena sees it.

    FETCHING: on its way to the host pool only. FOLDING: an overlay that is being made. MOVING: resident,
    changing its place. DAMAGED: its file is wrong, or it cannot be made; nobody tries any more.
    """

    ABSENT = "absent"
    FETCHING = "fetching"
    LOADING = "loading"
    FOLDING = "folding"
    VIEWING = "viewing"
    RESIDENT = "resident"
    MOVING = "moving"
    DAMAGED = "damaged"


class ExtentState(StrEnum):
    """A piece of the arena or of the host pool. FREE is where it ends: the bytes go back to the map."""

    FILLING = "filling"
    READY = "ready"
    LEASED = "leased"
    MOVING = "moving"
    QUARANTINED = "quarantined"
    FREE = "free"


class LoaderState(StrEnum):
    """A loader process. LOST: declared dead, maybe still copying; GONE: reaped."""

    IDLE = "idle"
    BUSY = "busy"
    LOST = "lost"
    GONE = "gone"


class PartsState(StrEnum):
    """A model's small parts: skeletons, tokenizers, scheduler.

    PREPARING ends in UNPREPARED where the files could not be reached, which may pass.
    """

    UNPREPARED = "unprepared"
    PREPARING = "preparing"
    PREPARED = "prepared"
    BROKEN = "broken"


R, B, X, L, P = RequestState, BlobState, ExtentState, LoaderState, PartsState

REQUEST_TABLE: Mapping[RequestState, frozenset[RequestState]] = {
    R.WAITING: frozenset({R.ON_DECK, R.ANSWERED}),
    R.ON_DECK: frozenset({R.RUNNING, R.ANSWERED}),
    R.RUNNING: frozenset({R.ENCODING, R.ANSWERED}),
    R.ENCODING: frozenset({R.ANSWERED}),
    R.ANSWERED: frozenset(),
}
BLOB_TABLE: Mapping[BlobState, frozenset[BlobState]] = {
    B.ABSENT: frozenset({B.LOADING, B.FETCHING, B.FOLDING, B.DAMAGED}),
    B.FETCHING: frozenset({B.ABSENT}),
    B.LOADING: frozenset({B.VIEWING, B.ABSENT}),
    B.FOLDING: frozenset({B.VIEWING, B.ABSENT}),
    B.VIEWING: frozenset({B.RESIDENT, B.ABSENT}),
    B.RESIDENT: frozenset({B.ABSENT, B.MOVING}),
    B.MOVING: frozenset({B.VIEWING, B.ABSENT}),
    B.DAMAGED: frozenset({B.ABSENT}),
}
EXTENT_TABLE: Mapping[ExtentState, frozenset[ExtentState]] = {
    X.FILLING: frozenset({X.READY, X.QUARANTINED, X.FREE}),
    X.READY: frozenset({X.LEASED, X.MOVING, X.FREE}),
    X.LEASED: frozenset({X.READY}),
    X.MOVING: frozenset({X.READY, X.FREE}),
    X.QUARANTINED: frozenset({X.FREE}),
    X.FREE: frozenset(),
}
LOADER_TABLE: Mapping[LoaderState, frozenset[LoaderState]] = {
    L.IDLE: frozenset({L.BUSY, L.LOST}),
    L.BUSY: frozenset({L.IDLE, L.LOST}),
    L.LOST: frozenset({L.GONE}),
    L.GONE: frozenset(),
}
PARTS_TABLE: Mapping[PartsState, frozenset[PartsState]] = {
    P.UNPREPARED: frozenset({P.PREPARING}),
    P.PREPARING: frozenset({P.PREPARED, P.BROKEN, P.UNPREPARED}),
    P.PREPARED: frozenset(),
    P.BROKEN: frozenset(),
}

HISTORY_LENGTH = 12


class IllegalEvent(Exception):
    """An event that cannot happen in this state: a defect of whoever reported it, or of the core."""


S = TypeVar("S", bound=Enum)


class Lifecycle(Generic[S]):
    """One entity's state, its legal moves and how it came here."""

    __slots__ = ("_history", "_table", "label", "state")

    def __init__(self, label: str, state: S, table: Mapping[S, frozenset[S]]) -> None:
        self.label = label
        self.state = state
        self._table = table
        self._history: deque[tuple[float, S, str]] = deque(maxlen=HISTORY_LENGTH)

    def require(self, *states: S) -> None:
        """Raise `IllegalEvent` unless in one of these states; changes nothing."""
        if self.state not in states:
            wanted = " or ".join(str(s.value) for s in states)
            raise IllegalEvent(f"{self.label} must be {wanted}: {self.story()}")

    def to(self, state: S, now_s: float, why: str = "") -> None:
        """Move to `state`. Raises `IllegalEvent` when the table does not allow it."""
        if state not in self._table[self.state]:
            raise IllegalEvent(f"{self.label} cannot become {state.value} ({why}): {self.story()}")
        self._history.append((now_s, self.state, why))
        self.state = state

    @property
    def since_s(self) -> float | None:
        """When it came into this state; None where it began in it."""
        return self._history[-1][0] if self._history else None

    @property
    def last_reason(self) -> str:
        """Why it came into this state; empty where nothing was said."""
        return self._history[-1][2] if self._history else ""

    def story(self) -> str:
        """The recent history in one line, oldest first."""
        past = " ".join(f"{s.value}@{t:.3f}[{why}]" for t, s, why in self._history)
        return f"{past} -> {self.state.value}" if past else str(self.state.value)
