"""What stands before the core: host pool, loaders, arena, made beside one another as far as they may be.

On a GPU the loaders' contexts come first: the arena may be as large as what they leave. On the CPU device
nobody waits for anybody. The host pool's pages come last: nothing is loaded before the arena stands.
"""

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from understudy.trace import START_UP
from understudyd.shell.host_pool import HostPool
from understudyd.shell.kept_pool import KeptPool
from understudyd.shell.memory import Arena
from understudyd.shell.parts import Parts
from understudyd.shell.supervisor import LoaderPool
from understudyd.shell.timeline import Timeline

log = logging.getLogger(__name__)


class Groundwork:
    """`lay` makes everything, `close` lets go of the memory once no loader is left."""

    def __init__(self, parts: Parts, kept: KeptPool, timeline: Timeline) -> None:
        self.host_pool: HostPool | None = None
        self._parts = parts
        self._kept = kept
        self._timeline = timeline
        self._arena: Arena | None = None

    async def lay(self, leaving: AsyncExitStack) -> tuple[LoaderPool, Arena]:
        """The loaders, attached, and the arena; what must be undone goes on the stack `leaving`.

        Raises `ArenaError`. An arena that is being made is waited for on the way out.
        """
        loop = asyncio.get_running_loop()
        self.host_pool = self._parts.host_pool(self._kept)
        leaving.callback(self._kept.close)
        loaders = self._parts.loader_pool(loop, self._timeline, self.host_pool)
        leaving.push_async_callback(loaders.stop)
        attaching = loop.create_task(self._attach(loaders))
        making = loop.create_task(self._make_arena(attaching if self._parts.device == "cuda" else None))
        leaving.push_async_callback(_ended, attaching, making)
        await attaching
        arena = await asyncio.shield(making)
        if self.host_pool is not None:
            self.host_pool.allocate()
        return loaders, arena

    def close(self) -> None:
        """Let go of the memory."""
        for memory in (self._arena, self.host_pool):
            if memory is not None:
                memory.close()

    async def _attach(self, loaders: LoaderPool) -> None:
        with self._timeline.phase(START_UP, "loaders"):
            loaders.start()
            await loaders.attached()

    async def _make_arena(self, after: "asyncio.Task[None] | None") -> Arena:
        if after is not None:
            await after
        with self._timeline.phase(START_UP, "arena"):
            loop = asyncio.get_running_loop()
            arena = self._arena = await loop.run_in_executor(None, self._parts.arena)
        log.info("arena: %.2f GiB on %s", arena.size_bytes / 2**30, self._parts.device)
        return arena


async def _ended(*tasks: "asyncio.Task[Any]") -> None:
    """However they end: who waited for one has raised its error, or left."""
    await asyncio.gather(*tasks, return_exceptions=True)
