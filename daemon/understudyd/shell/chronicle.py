"""What the event loop tells the timeline: how many requests wait, and each from its receipt to its answer."""

from understudy.trace import QUEUE, REQUESTS, SWITCH, Record, Span
from understudy.wire import Timings
from understudyd.core.machine import Machine
from understudyd.shell.pending import Pending


class Chronicle:
    """Only the event loop's thread calls this."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._waiting = 0

    def follow(self, machine: Machine, now_s: float) -> None:
        """An event was handled."""
        waiting = len(machine.queue)
        if waiting != self._waiting:
            self._waiting = waiting
            self._record(Span(QUEUE, "waiting", now_s, now_s, value=waiting))

    def answered(self, request_id: str, pending: Pending, outcome: str, now_s: float) -> None:
        """A request has its answer, an error's code or "" for images."""
        model, tier = pending.wish.model, pending.tier.value
        self._record(
            Span(
                REQUESTS,
                model,
                pending.received_at_s,
                now_s,
                outcome=outcome,
                request=request_id,
                tier=tier,
            )
        )

    def switched(self, request_id: str, pending: Pending, timings: Timings) -> None:
        """For this request other weights were bound, and the stage did nothing for `gap_s` before it."""
        if timings.gap_s is not None:
            first_op_at_s = pending.received_at_s + timings.queued_s + timings.switch_s
            began_at_s = first_op_at_s - timings.gap_s
            tier = pending.tier.value
            self._record(
                Span(SWITCH, pending.wish.model, began_at_s, first_op_at_s, request=request_id, tier=tier)
            )
