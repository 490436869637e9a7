"""Turns for work beside a run: on the CPU a fold gets them between two operations of who computes.

Side by side both wait for each other at every call of torch, of which a small model makes one every few
microseconds: a fold of 4 ms cost the image beside it 9 (`benchmarks.lora_serve`). One after the other it
costs what it takes. Where an operation takes long the two meet seldom, and nobody waits for its end.
"""

import threading
import time
from collections.abc import Callable

TURN_S = 0.004
"""So much longer may a step take for it."""

PATIENCE_S = 0.03
_GRACE_S = 0.1


class Slices:
    """One thread at a time asks for turns, those that compute give them."""

    def __init__(
        self,
        is_busy: Callable[[], bool],
        turn_s: float = TURN_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """While nothing `is_busy`, no turn is needed."""
        self._is_busy = is_busy
        self._turn_s = turn_s
        self._patience_s = patience_s
        self._clock = clock
        self._changed = threading.Condition()
        self._is_wanted = False
        self._is_given = False
        self._until_s = 0.0

    def give(self) -> None:
        """Between two operations of a run: who wants a turn has it now. Costs nothing when nobody does."""
        if not self._is_wanted:
            return
        with self._changed:
            if self._is_wanted:
                self._is_wanted, self._is_given = False, True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._is_given, self._turn_s + _GRACE_S)
                self._is_given = False

    def take(self) -> None:
        """Between two steps of the work: block until they may go on.

        Who waits in vain goes on beside what computes, for as long as it waited.
        """
        now_s = self._clock()
        if now_s < self._until_s:
            return
        self.end()
        if not self._is_busy():
            return
        with self._changed:
            self._is_wanted = True
            self._changed.wait_for(lambda: self._is_given or not self._is_busy(), self._patience_s)
            self._is_wanted = False
            began_s = self._clock()
            self._until_s = began_s + (self._turn_s if self._is_given else began_s - now_s)

    def end(self) -> None:
        """The turn is over; so it must be when the work is done."""
        self._until_s = 0.0
        if self._is_given:
            with self._changed:
                self._is_given = False
                self._changed.notify_all()
