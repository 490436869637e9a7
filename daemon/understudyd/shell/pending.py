"""A request that has no answer yet, and which answers without images are worth another try."""

import asyncio
from dataclasses import dataclass

from understudy.wire import Generate
from understudyd.core.types import ErrorCode, Tier
from understudyd.shell.adapter_keeper import Wish
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
