"""One admitted request, and the two orders in which requests stand."""

from dataclasses import dataclass

from understudyd.core.entities import Model
from understudyd.core.states import Lifecycle, RequestState
from understudyd.core.types import ErrorCode, RequestInfo, Tier


@dataclass(eq=False, slots=True)
class Request:
    """One admitted request. `seq` is its arrival number, `tag` its virtual time (`fairness.py`).

    `skips` is how often it had been overtaken when it left the queue (`queueing.skips_of`). Its turn came
    at `turn_at_s` (`queueing.py`). `lease` is the edition of its model whose blobs stay in place for it.
    `expected_wait_s` is what was ahead of it when it came (`outlook.py`).
    `cancel_message` is what the answer says once a run that `cancel_code` ends has ended.
    """

    info: RequestInfo
    seq: int
    tag: float
    received_at_s: float
    tier: Tier
    life: Lifecycle[RequestState]
    skips: int = 0
    turn_at_s: float | None = None
    lease: Model | None = None
    cancel_code: ErrorCode | None = None
    cancel_message: str = ""
    expected_wait_s: float = 0.0

    @property
    def id(self) -> str:
        """The request's id, unique in the machine."""
        return self.info.request_id

    @property
    def deadline_message(self) -> str:
        """What the answer says when the deadline has passed."""
        deadline_at_s = self.info.deadline_at_s
        given_s = 0.0 if deadline_at_s is None else max(0.0, deadline_at_s - self.received_at_s)
        return (
            f"the deadline of {round(given_s, 3):g} s has passed; "
            "allow more time (deadline_s, --deadline) or ask for fewer steps"
        )

    @property
    def model(self) -> str:
        """The model it asks for."""
        return self.info.model

    @property
    def state(self) -> RequestState:
        """Where it is in its life."""
        return self.life.state

    @property
    def holds_lease(self) -> bool:
        """From the deck until the device has finished the last use."""
        return self.lease is not None

    @property
    def turn(self) -> "Turn":
        """Where it stands in the fair order: by tag, then by arrival."""
        return (self.tag, self.seq, self)

    @property
    def place(self) -> "Place":
        """Where it stands when priorities count: by priority, then in the fair order."""
        return (-self.info.priority, self.tag, self.seq, self)


Turn = tuple[float, int, Request]
Place = tuple[int, float, int, Request]
"""Both sort in C, and never look at the request: no two have the same arrival number."""
