"""Who waits until something holds that only events change."""

import asyncio
from collections.abc import Callable


class Watches:
    """Conditions, and who waits for them. Only the event loop's thread uses this."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; it is asked now and whenever somebody calls `look`."""
        if not condition():
            watch: asyncio.Future[None] = self._loop.create_future()
            self._open.append((condition, watch))
            await watch

    def look(self) -> None:
        """Something may have changed."""
        for condition, watch in self._open:
            if not watch.done() and condition():
                watch.set_result(None)
        if self._open:
            self._open = [(condition, watch) for condition, watch in self._open if not watch.done()]
