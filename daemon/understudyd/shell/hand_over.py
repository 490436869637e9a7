"""How weights get from the loaders into the arena: processes that share it, or threads that own it too."""

import logging
from dataclasses import replace

from understudyd.shell.loader_end import LoaderEnd
from understudyd.shell.loader_process import LoaderProcess
from understudyd.shell.loader_thread import LoaderThread
from understudyd.shell.loading import LoaderSettings
from understudyd.shell.memory import Arena, ArenaError, OpenFields

_log = logging.getLogger(__name__)


class HandOver:
    """Makes loaders of the right kind. `kind` is "processes" or "threads"; `reason` says why threads."""

    def __init__(self, settings: LoaderSettings) -> None:
        self._settings = settings
        self.kind = "threads" if settings.transport == "thread" else "processes"
        self.reason = "as configured" if self.kind == "threads" else ""

    @property
    def by_threads(self) -> bool:
        """Loaders are threads from now on."""
        return self.kind == "threads"

    def spawn(self) -> LoaderEnd:
        """The next loader. Raises `OSError`."""
        return LoaderThread() if self.by_threads else LoaderProcess(self._settings.command)

    def refused(self, reason: str) -> None:
        """The arena is not shared between processes here: threads from now on, where that is allowed."""
        if self.by_threads or self._settings.transport == "process":
            return
        self.kind, self.reason = "threads", reason
        _log.warning(
            "loaders are threads of the daemon from now on, because the arena cannot be shared with other "
            "processes (%s); a loader that hangs can then not be killed",
            reason,
        )

    def look_at(self, arena: Arena) -> None:
        """Threads for an arena that only this process can reach. Raises `ArenaError` if ruled out."""
        if (refusal := arena.ipc_refusal) is None:
            return
        self.refused(refusal)
        if not self.by_threads:
            raise ArenaError(f"no process can share the arena ({refusal}); allow loader.transport = auto")

    def open_fields(self, arena: Arena) -> OpenFields:
        """How the next loader reaches the arena: a thread by its address where a process needs a handle."""
        fields = arena.open_fields()
        if self.by_threads and fields.transport == "cuda_ipc":
            return replace(fields, transport="cuda_local", ipc_handle=b"")
        return fields
