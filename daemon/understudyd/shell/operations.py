"""What an operator does to the daemon as a whole: drain it, have it read, forget, or say more."""

import asyncio
import dataclasses
import logging
from typing import Any, Protocol, assert_never

from understudy import admin as proto
from understudy.admin import AdminError
from understudyd.config import ConfigError
from understudyd.core import events as ev
from understudyd.names import near
from understudyd.shell.admin import audit
from understudyd.shell.kept_pool import drop_cache
from understudyd.shell.reload import Reloaded
from understudyd.shell.runtime import Runtime
from understudyd.stage.compile_report import CompileReport

log = logging.getLogger(__name__)

Operation = proto.Drain | proto.Resume | proto.Reload | proto.DropCache | proto.LogLevel


class Service(Protocol):
    """The daemon, as far as these commands change it."""

    state: str

    @property
    def compiled(self) -> CompileReport | None:
        """What the stage has compiled; None where it compiles nothing."""

    @property
    def is_stopping(self) -> bool:
        """It was told to end."""

    async def reload(self) -> Reloaded:
        """Read the configuration again. Raises `ConfigError`."""


class Operations:
    """Carries these commands out."""

    def __init__(self, runtime: Runtime, service: Service) -> None:
        self._runtime = runtime
        self._service = service

    async def execute(self, command: Operation) -> Any:
        """The command's result document. Raises `AdminError`."""
        match command:
            case proto.Drain(wait_s=wait_s):
                return await self._drain(wait_s)
            case proto.Resume():
                return self._resume()
            case proto.Reload():
                return await self._reload()
            case proto.DropCache():
                return dataclasses.asdict(drop_cache(self._runtime))
            case proto.LogLevel(level=level, logger=logger):
                return set_log_level(level, logger)
            case _:
                assert_never(command)

    def compiled(self) -> dict[str, Any] | None:
        """For `status`."""
        report = self._service.compiled
        return None if report is None else dataclasses.asdict(report)

    # -- admission ----------------------------------------------------------------------------------

    async def _drain(self, wait_s: float | None) -> dict[str, Any]:
        self._check_serving()
        self._admit(is_open=False)
        if wait_s is not None:
            await self._idle(wait_s)
        return {"state": self._service.state, "open_requests": len(self._runtime.pending)}

    async def _idle(self, wait_s: float) -> None:
        """Return when nothing is open. Raises `AdminError` when that takes too long, or is called off."""
        pending, machine = self._runtime.pending, self._runtime.machine
        try:
            async with asyncio.timeout(wait_s):
                await self._runtime.until(lambda: not pending or machine.is_open)
        except TimeoutError as error:
            message = (
                f"{len(pending)} requests are still open after {wait_s:g} s; wait again, or `cancel` them"
            )
            raise AdminError("not_idle", message) from error
        if pending:
            raise AdminError("not_idle", f"resumed while {len(pending)} requests were still open")

    def _resume(self) -> dict[str, Any]:
        self._check_serving()
        self._admit(is_open=True)
        return {"state": self._service.state, "open_requests": len(self._runtime.pending)}

    def _admit(self, *, is_open: bool) -> None:
        self._service.state = "ready" if is_open else "draining"
        self._runtime.handle(ev.AdmissionChanged(is_open=is_open))
        log.info(
            "requests are %s", "taken again" if is_open else "no longer taken; `resume` takes them again"
        )

    def _check_serving(self) -> None:
        if self._service.is_stopping:
            raise AdminError("stopping", "the daemon is stopping; start it again")
        if self._service.state == "starting":
            raise AdminError("starting", "the daemon takes no requests yet; `status` says when it is ready")

    async def _reload(self) -> dict[str, Any]:
        try:
            return dataclasses.asdict(await self._service.reload())
        except ConfigError as error:
            raise AdminError("bad_config", f"the configuration stays as it is: {error}") from error


def set_log_level(level: str, name: str) -> dict[str, str]:
    """Of all loggers, or of the one of this name and those below it. Raises `AdminError`."""
    known = logging.root.manager.loggerDict
    if name == audit.name:
        raise AdminError("forbidden", "changes are always written down; choose another logger")
    if name and name not in known:
        meant = near(name, known)
        hint = "" if meant is None else f"; did you mean {meant!r}?"
        raise AdminError("not_found", f"there is no logger {name!r:.80} in this daemon{hint}")
    logger = logging.getLogger(name or None)
    before = logging.getLevelName(logger.getEffectiveLevel()).lower()
    logger.setLevel(level.upper())
    return {"logger": name or "all", "level": level, "before": before}
