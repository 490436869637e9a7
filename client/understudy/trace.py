"""The timeline's spans: what a daemon remembers of its last minutes, and how to fetch them.

Imports msgspec and the standard library only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from understudy.admin import AdminRequest, Trace

STAGE, BIND, SWITCH, ENCODE = "stage", "bind", "switch", "encode"
FOLD, VIEWS, MOVE, PREPARE, COMPILE = "fold", "views", "move", "prepare", "compile"
REQUESTS, QUEUE, START_UP = "requests", "queue", "start-up"
FAILED, CANCELLED, LOST = "failed", "cancelled", "lost"


class Span(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One piece of work in a lane, by the daemon's monotonic clock, in seconds.

    Lanes: "stage" (a run; `steps_s` are when its steps ended), "bind", "switch" (the stage did nothing while
    this request waited), "loader 0" and so on (a load of `size_bytes` by `route`, "disk > host > arena"),
    "fold", "compile", "views", "move", "prepare", "encode", "requests" (from receipt to answer; these
    overlap), "queue" (how many requests wait from `start_s` on, in `value`) and "start-up".

    `name` is the model, and of what is made of a component "MODEL COMPONENT". `outcome` is empty for what
    ended well. `tier` is where the model was when the request came. `size_bytes` are in the arena.
    """

    lane: str
    name: str
    start_s: float
    end_s: float
    size_bytes: int = 0
    route: str = ""
    outcome: str = ""
    request: str = ""
    tier: str = ""
    steps_s: tuple[float, ...] = ()
    value: int | None = None


def lane(spans: Iterable[Span], name: str) -> list[Span]:
    """One lane's spans in time order."""
    return sorted((span for span in spans if span.lane == name), key=lambda span: span.start_s)


_ORDER = (START_UP, STAGE, BIND, SWITCH, "loader ", FOLD, COMPILE, PREPARE, VIEWS, MOVE, ENCODE)


def by_lane(spans: Iterable[Span]) -> dict[str, list[list[Span]]]:
    """Each lane's spans in as many rows as it takes for none to overlap, lanes in the order to show them.

    Requests and the queue are no lanes of work: they are left out.
    """
    lanes: dict[str, list[list[Span]]] = {}
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.lane in (REQUESTS, QUEUE):
            continue
        rows = lanes.setdefault(span.lane, [])
        free = next((row for row in rows if row[-1].end_s <= span.start_s), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return dict(sorted(lanes.items(), key=lambda item: (_place(item[0]), item[0])))


def _place(name: str) -> int:
    return next((place for place, known in enumerate(_ORDER) if name.startswith(known)), len(_ORDER))


Record = Callable[[Span], None]
"""Remember a span; callable from any thread, and cheap."""


class TracePage(msgspec.Struct, frozen=True, kw_only=True):
    """Some of what is remembered, in the order in which it was recorded.

    `next` is where the next page begins, None after the last. `is_cut`: what came before was forgotten
    although it was asked for. `now_s` is the daemon's clock.
    """

    spans: list[Span]
    next: int | None = None
    is_cut: bool = False
    now_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Recording:
    """Spans by their start, of the `seconds` before `now_s`; `is_cut`: older ones were asked for in vain."""

    spans: list[Span]
    seconds: float
    now_s: float
    is_cut: bool = False

    @property
    def begin_s(self) -> float:
        """When it begins: what was asked for, or the oldest span if that is later."""
        asked_s = self.now_s - self.seconds
        return max(asked_s, min((span.start_s for span in self.spans), default=asked_s))


def pages(ask: Callable[[AdminRequest], Any], seconds: float) -> Iterable[TracePage]:
    """All pages of the last `seconds`; `ask` gives the document that answers an admin command."""
    start: int | None = 0
    while start is not None:
        page = msgspec.convert(ask(Trace(seconds=seconds, start=start)), TracePage)
        yield page
        start = page.next


def fetch(ask: Callable[[AdminRequest], Any], seconds: float) -> Recording:
    """What the daemon did in the last `seconds`. Raises what `ask` does, and `msgspec.ValidationError`."""
    found = list(pages(ask, seconds))
    spans = sorted((span for page in found for span in page.spans), key=lambda span: span.start_s)
    return Recording(spans, seconds, found[0].now_s, found[0].is_cut)
