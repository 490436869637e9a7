"""The baton: whoever holds it computes.

Turns are served in the order they were drawn. The hand-over goes from thread to thread, without a trip
through the event loop: leaving wakes the next turn's thread, which then needs the interpreter lock at
once, so the leaving thread stays out of the way until its successor has begun.
"""

import threading
from collections import deque
from queue import SimpleQueue


class Baton:
    """Draws turns and grants them one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: deque[Turn] = deque()  # the first one holds the baton

    def draw(self) -> "Turn":
        """A place at the end of the line; granted at once when there is no line. Never blocks for long."""
        turn = Turn(self)
        with self._lock:
            self._turns.append(turn)
            turn.is_granted = self._turns[0] is turn
        return turn

    def leave(self, turn: "Turn") -> "Turn | None":
        """Take the turn out; returns its successor if that one was granted the baton while it waited."""
        with self._lock:
            self._turns.remove(turn)
            if not turn.is_granted or not self._turns:
                return None
            successor = self._turns[0]
            successor.is_granted = True
            successor.is_awaited = successor.is_waiting
            successor.wake()
            return successor if successor.is_awaited else None

    def someone_waits(self) -> bool:
        """A thread has everything ready and blocks for the baton."""
        with self._lock:
            return any(turn.is_waiting for turn in self._turns)


class Turn:
    """One request's place in the line."""

    def __init__(self, baton: Baton) -> None:
        self._baton = baton
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._begun = threading.Event()
        self.is_granted = False
        self.is_waiting = False
        self.is_awaited = False
        """The predecessor's thread blocks in `wait_begun`."""

    def take(self) -> bool:
        """Block until the baton is ours; False when `wake` came first."""
        with self._baton._lock:
            if self.is_granted:
                return True
            self.is_waiting = True
        self._wakes.get()
        self.is_waiting = False
        return self.is_granted

    def wake(self) -> None:
        """End `take`. Any thread; never blocks."""
        self._wakes.put(None)

    def begin(self) -> None:
        """The first operation starts now: the predecessor may use the interpreter again."""
        self._begun.set()

    def wait_begun(self) -> None:
        """Block until `begin` or `leave`."""
        self._begun.wait()

    def leave(self) -> "Turn | None":
        """Give up the baton or the place; returns the successor to wait for, if any."""
        successor = self._baton.leave(self)
        self._begun.set()
        return successor
