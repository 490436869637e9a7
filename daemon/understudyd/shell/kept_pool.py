"""Warm restart: the host pool and its index are kept by the service manager, whatever becomes of the daemon.

The index is written before any load may touch what it no longer names, so it is true whenever the process
dies. The next life takes both over, believes nothing of it unseen (`core/adoption.py`), and has each copy
checked by its first load.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from understudyd.config import AUTO
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.legacy import legacy
from understudyd.core.machine import Machine
from understudyd.shell.host_pool import HostPool
from understudyd.shell.memory import ArenaError
from understudyd.shell.notify import ServiceManager
from understudyd.shell.pool_index import PoolIndex, PoolRecord, StaleIndex

if TYPE_CHECKING:
    from understudyd.shell.runtime import Runtime

log = logging.getLogger(__name__)

POOL = "understudy-pool"
INDEX = "understudy-index"


class KeptPool:
    """The host pool beyond this life. Everything but `adopt` is for the event loop's thread."""

    def __init__(self, manager: ServiceManager) -> None:
        self.found: ev.CopiesFound | None = None
        self._manager = manager
        self._pool: HostPool | None = None
        self._index: PoolIndex | None = None
        self._is_settled = False
        self._written: object = None

    def host_pool(self, wanted_bytes: int, make: Callable[[], HostPool | None]) -> HostPool | None:
        """The last life's pool if it is of the wanted size (AUTO: of any), else the one that `make` makes.

        Raises what `make` does.
        """
        self._pool = self._adopt(wanted_bytes) or self._begin(make())
        return self._pool

    def tell(self, handle: Callable[[ev.Event], None]) -> None:
        """Hand over to the machine what was found; from now on `note` keeps the index."""
        if self.found is not None:
            handle(self.found)
        self._is_settled = True

    def note(self, machine: Machine) -> None:
        """Write down which copies there are if that has changed; before any load that it allows begins."""
        if self._is_settled and self._written != machine.residency.copies.changes:
            self.write(machine)

    def write(self, machine: Machine) -> None:
        """Write down copies and models as of now."""
        if self._index is None or self._pool is None or not self._is_settled:
            return
        self._written = machine.residency.copies.changes
        try:
            self._index.write(_record(self._pool, legacy(machine)))
        except (OSError, StaleIndex) as error:
            log.warning("the host pool's index cannot be written, a restart will be cold: %s", error)
            self._close()

    def close(self) -> None:
        """Let go of the index; the pool is its owner's."""
        if self._index is not None:
            os.close(self._index.fd)
            self._index = None

    # -- inside -------------------------------------------------------------------------------------

    def _adopt(self, wanted_bytes: int) -> HostPool | None:
        fds = [self._manager.take(name) for name in (POOL, INDEX)]
        pool_fd, index_fd = fds
        try:
            if pool_fd is None or index_fd is None:
                if pool_fd is not index_fd:
                    raise StaleIndex("it was kept without its index")
                return None
            index = PoolIndex(index_fd)
            record = index.read()
            _check(record, pool_fd, wanted_bytes)
            pool = HostPool(record.pool_bytes, found_fd=pool_fd)
        except (StaleIndex, ArenaError, OSError) as error:
            log.warning("the host pool of the last daemon is dropped: %s", error)
            for fd in fds:
                if fd is not None:
                    os.close(fd)
            self._manager.forget(POOL, INDEX)
            return None
        self._index, self.found = index, record.found
        kept_bytes = sum(copy.size_bytes for copy in record.found.copies)
        log.info(
            "the host pool of the last daemon is taken over: %d blobs, %.2f of %.2f GiB",
            *(len(record.found.copies), kept_bytes / 2**30, record.pool_bytes / 2**30),
        )
        return pool

    def _begin(self, pool: HostPool | None) -> HostPool | None:
        """Have a new pool kept."""
        if pool is None:
            return None
        (pool_fd,) = pool.fds()
        index = PoolIndex(os.memfd_create(INDEX, os.MFD_CLOEXEC))
        try:
            index.write(_record(pool, ev.CopiesFound(())))
        except OSError as error:
            log.warning("no restart will be warm: %s", error)
        if self._manager.keep(POOL, pool_fd) and self._manager.keep(INDEX, index.fd):
            self._index = index
        else:
            os.close(index.fd)
        return pool

    def _close(self) -> None:
        self._manager.forget(POOL, INDEX)
        self.close()


def _record(pool: HostPool, found: ev.CopiesFound) -> PoolRecord:
    return PoolRecord(pool_id=os.fstat(pool.fds()[0]).st_ino, pool_bytes=pool.size_bytes, found=found)


def _check(record: PoolRecord, pool_fd: int, wanted_bytes: int) -> None:
    status = os.fstat(pool_fd)
    if (record.pool_id, record.pool_bytes) != (status.st_ino, status.st_size):
        raise StaleIndex("its index speaks about another pool")
    if wanted_bytes not in (AUTO, record.pool_bytes):
        raise StaleIndex(
            f"it has {record.pool_bytes / 2**30:.2f} GiB and host.pool is {wanted_bytes / 2**30:.2f} GiB"
        )


@dataclass(frozen=True, slots=True)
class DroppedCache:
    """What `drop_cache` did."""

    copies: int
    freed_bytes: int


def drop_cache(runtime: "Runtime") -> DroppedCache:
    """Forget every host copy that no load uses, here and for the next life; they are read from disk again."""
    before = snapshot.host_pool(runtime.machine)
    runtime.handle(ev.CopiesDropWanted())
    after = snapshot.host_pool(runtime.machine)
    return DroppedCache(before.copies - after.copies, before.ready_bytes - after.ready_bytes)
