"""The seams between the event loop's parts, as protocols: who calls whom, with what.

Only the event loop's thread calls these, except where a docstring says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from understudy.wire import Generate, ModelEntry, Reply

from understudyd.core.events import Event

Emit = Callable[[Event], None]
"""Give the core an event; callable from any thread."""

RecordSpan = Callable[[str, str, float, float], None]
"""`record(lane, name, started_at_s, ended_at_s)` for the timeline; callable from any thread."""


class RequestSink(Protocol):
    """What the front end hands requests to. The front end has checked sizes, limits and duplicates."""

    def submit(self, client: str, request: Generate) -> None:
        """A new request of this client; the answer comes through `ReplySink.send`."""

    def cancel(self, client: str, request_id: str) -> None:
        """The client takes its request back; unknown ids are ignored."""

    def client_gone(self, client: str) -> None:
        """The client cannot be reached or has expired."""

    def models(self) -> list[ModelEntry]:
        """What may be asked for."""


class ReplySink(Protocol):
    """What the runtime answers through: the front end."""

    def send(self, client: str, reply: Reply, payload: Sequence[bytes] = ()) -> None:
        """Queue a reply for this client. Never blocks; a client that is gone is ignored."""
