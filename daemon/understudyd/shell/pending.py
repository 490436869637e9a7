"""A request that has no answer yet, and which answers without images are worth another try."""

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from understudy.wire import Generate
from understudyd.core.types import ErrorCode, RequestInfo, Tier
from understudyd.recorded import work_of
from understudyd.shell.adapter_keeper import Wish
from understudyd.shell.batch_key import batch_key
from understudyd.shell.ports import RunResult

RETRYABLE = frozenset(
    {
        ErrorCode.QUEUE_FULL,
        ErrorCode.DRAINING,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.LOAD_FAILED,
        ErrorCode.INTERNAL,
    }
)


class Step(NamedTuple):
    """The run of a request has made a step, of so many."""

    request_id: str
    step: int
    steps: int


class RunFailed(Exception):
    """A request of the daemon's own (warm-up) was not served."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code


@dataclass(slots=True)
class Pending:
    """A request that has no answer yet. `done` is set for the daemon's own requests."""

    client: str
    request: Generate
    wish: Wish
    received_at_s: float
    payload: tuple[bytes, ...] = ()
    tier: Tier = Tier.DISK
    step: int = 0
    steps: int = 0
    done: asyncio.Future[RunResult] | None = None

    def info(self, request_id: str) -> RequestInfo:
        """As the core takes it."""
        request = self.request
        deadline_at_s = None if request.deadline_s is None else self.received_at_s + request.deadline_s
        return RequestInfo(
            request_id=request_id,
            client=self.client,
            model=self.wish.model,
            priority=request.priority,
            deadline_at_s=deadline_at_s,
            cost=work_of(request.images, request.steps),
            batch_key=batch_key(request),
            images=request.images,
        )
