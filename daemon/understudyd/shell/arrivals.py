"""What other threads tell the event loop: one wake-up for all that comes in a row.

Each wake-up has the loop ask for the interpreter, which a computing thread then has to wait for again.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Arrivals(Generic[T]):
    """`take` gets, on the loop's thread, all that was put since it was last called, in order; or nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[list[T]], None]) -> None:
        self._loop = loop
        self._take = take
        self._items: deque[T] = deque()
        self._is_called = False

    def put(self, item: T) -> None:
        """From any thread; never blocks."""
        self._items.append(item)
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._is_called = False  # before anything is taken: who puts something later calls again
        items = self._items
        self._take([items.popleft() for _ in range(len(items))])
