"""What the front end knows of its clients, and of the users behind them."""

from collections import Counter
from dataclasses import dataclass, field

from understudy.wire import Accepted
from understudyd.shell.outbox import Outbox


@dataclass(slots=True)
class Counters:
    """What happened since the start, for status and metrics."""

    received: int = 0
    unreadable: int = 0
    refused: int = 0
    repeated: int = 0
    submitted: int = 0
    answered: int = 0
    clients_gone: int = 0
    answers_lost: int = 0


@dataclass(slots=True)
class Client:
    """One routing id. `user` is who connected as it, `open` are its requests without an answer."""

    name: str
    identity: bytes
    user: str
    heard_at_s: float
    outbox: Outbox
    open: dict[str, Accepted | None] = field(default_factory=dict)


class UserBook:
    """How many requests each user has open, over all of his connections."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def open_requests(self, user: str) -> int:
        """Those that are not answered."""
        return self._open[user]

    def opened(self, user: str) -> None:
        """One more."""
        self._open[user] += 1

    def closed(self, user: str, requests: int = 1) -> None:
        """They were answered, or their client is gone."""
        self._open[user] -= requests
        if self._open[user] <= 0:
            del self._open[user]

    def __len__(self) -> int:
        """Users with open requests."""
        return len(self._open)
