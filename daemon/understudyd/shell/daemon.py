"""One life of the daemon: put the parts together, get ready, serve, drain, leave nothing behind.

Loaders and memory come first (`groundwork.py`). All the while torch is imported, by a thread that nobody
waits for who leaves early (`main.py`). The front end listens only when every architecture has run once.
Clients that are early wait in ZeroMQ's connect.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from understudy.keys import KeyFileError
from understudy.paths import ADMIN_SOCKET
from understudy.trace import START_UP
from understudyd import logs
from understudyd.config import Config, ConfigError
from understudyd.core import events as ev
from understudyd.core.types import ErrorCode
from understudyd.shell.adapters import PoolAdapter, StageAdapter
from understudyd.shell.admin import AdminServer
from understudyd.shell.commands import Commands
from understudyd.shell.forecast_file import ForecastFile
from understudyd.shell.frontend import Frontend
from understudyd.shell.groundwork import Groundwork
from understudyd.shell.kept_pool import KeptPool
from understudyd.shell.lock import locked
from understudyd.shell.memory import Arena
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.notify import ServiceManager
from understudyd.shell.parts import Parts, limits_of, policy_of
from understudyd.shell.pulse import Pulse
from understudyd.shell.reload import Reload, Reloaded
from understudyd.shell.runtime import Runtime
from understudyd.shell.start_up import StartUp
from understudyd.shell.supervisor import LoaderPool
from understudyd.shell.threads import in_daemon_thread
from understudyd.shell.timeline import Timeline
from understudyd.stage.compile_report import CompileReport

log = logging.getLogger(__name__)

EXIT_DEFECT = 70
_CANCEL_S, _LEAVING_S = 5.0, 15.0
T = TypeVar("T")


class _Stopped(Exception):
    """The daemon was told to stop before it was ready."""


class Daemon:
    """Everything one daemon is made of. `serve` returns the exit status.

    `manager` is the service manager, if one started this; `read` reads the configuration again.
    """

    def __init__(
        self, config: Config, manager: ServiceManager | None = None, read: Callable[[], Config] | None = None
    ) -> None:
        self._manager = manager or ServiceManager()
        self._kept = KeptPool(self._manager)
        self._reload = Reload(config, read or (lambda: config), self._apply)
        self.state = "starting"
        self.daemon_id = uuid.uuid4().hex
        self.started_at_s = time.monotonic()
        self._parts = Parts(config)
        self.device = self._parts.device
        self._timeline = Timeline()
        self._groundwork = Groundwork(self._parts, self._kept, self._timeline)
        self._stage: StageAdapter | None = None
        self._start_up: StartUp | None = None
        self._runtime: Runtime | None = None
        self._frontend: Frontend | None = None
        self._pulse: Pulse | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._drain_s = config.server.drain_s
        self._exit_status = 0

    @property
    def config(self) -> Config:
        """What is in force; what waits for a restart is as it was."""
        return self._reload.config

    @property
    def compiled(self) -> CompileReport | None:
        """What the stage has compiled so far; None where it compiles nothing."""
        return self._stage.compile_report() if self._stage is not None else None

    @property
    def missing(self) -> dict[str, str]:
        """Models of `[startup]` that were not ready when the daemon was, and why."""
        return self._start_up.missing if self._start_up is not None else {}

    async def serve(self) -> int:
        """Serve until told to stop."""
        server = self.config.server
        self._parts.check()
        server.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        async with locked(server.runtime_dir, server.endpoints):
            self._listen_to_signals(asyncio.get_running_loop())
            async with AsyncExitStack() as leaving:
                with contextlib.suppress(_Stopped):
                    await self._live(leaving)
            return self._exit_status

    async def _live(self, leaving: AsyncExitStack) -> None:
        """Get ready and serve; what must be undone at the end goes on the stack `leaving`.

        Raises `_Stopped`, and whatever keeps the daemon from getting ready.
        """
        loop = asyncio.get_running_loop()
        self._parts.check_room()
        stores = self._parts.stores()
        stores.own.usage.begin()
        leaving.callback(stores.own.usage.end)
        leaving.push_async_callback(self._let_go)
        importing = loop.create_task(self._import())
        importing.add_done_callback(lambda done: done.cancelled() or done.exception())  # or nobody looks
        pool, arena = await self._unless_stopped(self._groundwork.lay(leaving))
        cache = await self._parts.open_cache(leaving)
        request_log = self._parts.request_log()
        if request_log is not None:
            leaving.push_async_callback(request_log.close)
        settings = ModelSettings(stores.own.path)
        await settings.read()
        runtime = Runtime(
            self._parts.machine(arena, self._groundwork.host_pool),
            stores,
            loop,
            cache=cache,
            request_log=request_log,
            settings=settings,
            record=self._timeline.record,
            meter=self._parts.meter(),
            on_defect=self._defect,
            on_change=self._kept.note,
        )
        self._runtime = runtime
        leaving.callback(runtime.close)
        frontend = await self._make_doors(loop, runtime, pool, leaving)
        revive = runtime.keeper.adapters.revive
        forecast_file = ForecastFile(stores.own.path, runtime.machine, revive=revive)
        leaving.push_async_callback(forecast_file.close)
        self._pulse = Pulse(
            self._manager, runtime, self._kept, stalled_after_s=self.config.stage.stalled_after_s
        )
        leaving.callback(self._pulse.stop)
        leaving.push_async_callback(self._drain, runtime)
        runtime.attach_pool(PoolAdapter(pool))
        await self._unless_stopped(self._look_at_stores(runtime))
        await self._unless_stopped(forecast_file.read())
        forecast_file.start()
        self._kept.tell(runtime.handle)
        pool.open(arena, runtime.emit)
        self._start_up = StartUp(runtime, self.config, self._say)
        self._watch_loads(runtime, self._start_up.load_ahead(), leaving)
        await self._make_stage(loop, importing, arena, runtime)
        with self._phase("warm-up"):
            await self._unless_stopped(self._start_up.warm_up())
            await self._unless_stopped(self._start_up.compile(self._stage))
        runtime.attach_replies(frontend)
        self._ready(frontend.start())
        await self._stop.wait()

    # -- getting ready ------------------------------------------------------------------------------

    async def _make_doors(
        self,
        loop: asyncio.AbstractEventLoop,
        runtime: Runtime,
        pool: LoaderPool,
        leaving: AsyncExitStack,
    ) -> Frontend:
        """The operators' door, open, and the clients', still shut."""
        commands = Commands(runtime, pool, self._timeline, self, time.monotonic)
        access = self._parts.admin_access()
        path = self.config.server.runtime_dir / ADMIN_SOCKET
        admin = AdminServer(path, commands.execute, access=access)
        leaving.push_async_callback(admin.stop)
        await admin.start()
        self._frontend = frontend = self._parts.frontend(loop, runtime, self.daemon_id)
        leaving.callback(frontend.close, linger_s=1.0)
        observatory = self._parts.observatory(runtime, pool, frontend, self)
        if observatory is not None:
            leaving.push_async_callback(observatory.stop)
            await observatory.start()
        return frontend

    async def _look_at_stores(self, runtime: Runtime) -> None:
        """Serve what they hold. A read-only store that cannot be reached may come later."""
        report = await runtime.keeper.rescan()
        for name, why in report.damaged.items():
            log.warning("%s is left out: %s", name, why)
        for path, why in report.away.items():
            log.warning("the store %s cannot be read (%s): its models are found by a rescan", path, why)

    def _watch_loads(self, runtime: Runtime, names: set[str], leaving: AsyncExitStack) -> None:
        if names:
            watching = asyncio.create_task(self._watch_weights(runtime, names))
            leaving.callback(watching.cancel)

    async def _watch_weights(self, runtime: Runtime, names: set[str]) -> None:
        """Note when the first of these models' loads begins and when none is under way any more."""
        loads = runtime.machine.residency.loads

        def is_loading() -> bool:
            return any(not names.isdisjoint(load.blob.models) for load in loads.values())

        await runtime.until(is_loading)
        with self._phase("weights"):
            await runtime.until(lambda: not is_loading())

    async def _import(self) -> None:
        with self._phase("import"):
            await in_daemon_thread(self._parts.import_stage)

    async def _make_stage(
        self,
        loop: asyncio.AbstractEventLoop,
        importing: Awaitable[None],
        arena: Arena,
        runtime: Runtime,
    ) -> None:
        self._say("importing torch")
        await importing
        gc.freeze()  # half a second to walk all that was imported, which `_ready` would spend
        with self._phase("stage"):
            self._stage = await loop.run_in_executor(None, self._parts.stage, arena, runtime, self._timeline)
        self._check_not_stopped()
        runtime.attach_stage(self._stage)

    def _ready(self, endpoints: list[str]) -> None:
        start_up = self._start_up
        # What start-up made stays, too: the collector, off until now, need not walk it again.
        gc.collect()
        gc.freeze()
        gc.enable()
        self.state = "ready"
        self._manager.notify("READY=1")
        lacks = f"; not loaded: {start_up.describe_missing()}" if start_up and start_up.missing else ""
        took_s = time.monotonic() - self.started_at_s
        self._say(
            f"ready after {took_s:.1f} s on {', '.join(endpoints)}, store {self.config.store.path}{lacks}"
        )
        if self._pulse is not None:
            self._pulse.start()

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return self._timeline.phase(START_UP, name)

    def _say(self, status: str) -> None:
        log.info("%s", status)
        self._manager.notify(f"STATUS={status}")

    @property
    def is_stopping(self) -> bool:
        """It was told to end."""
        return self._stop.is_set()

    # -- a new configuration ------------------------------------------------------------------------

    async def reload(self) -> Reloaded:
        """Read the configuration and the clients' keys again and put into force what can be.

        Raises `ConfigError`; nothing has changed then.
        """
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._manager.notify("RELOADING=1", f"MONOTONIC_USEC={now_us}")
        try:
            keys = await in_daemon_thread(self._parts.keys)
            reloaded = await self._reload()
            if keys is not None and self._frontend is not None:
                self._frontend.admit(keys.clients)
            return reloaded
        except KeyFileError as error:
            raise ConfigError(str(error)) from error
        finally:
            if self.state != "starting":
                self._manager.notify("READY=1")

    def _apply(self, config: Config) -> None:
        logs.set_level(config.log.level)
        self._drain_s = config.server.drain_s
        if self._runtime is not None:
            settings = policy_of(config.policy)
            self._runtime.handle(ev.SettingsChanged(settings, config.queue.max_waiting))
        if self._frontend is not None:
            self._frontend.change_limits(limits_of(config.server))
        if self._pulse is not None:
            self._pulse.stalled_after_s = config.stage.stalled_after_s

    async def _reload_or_say_why_not(self) -> None:
        try:
            await self.reload()
        except ConfigError as error:
            log.error("the configuration stays as it is: %s", error)

    # -- leaving ------------------------------------------------------------------------------------

    def request_shutdown(self, drain_s: float) -> None:
        """Stop admitting; finish or fail what is open within `drain_s`; exit."""
        self._drain_s = drain_s
        self._stop.set()

    def _check_not_stopped(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work`; its result. Raises `_Stopped` when the daemon is to stop meanwhile."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        self._check_not_stopped()
        return task.result()

    async def _drain(self, runtime: Runtime) -> None:
        self.state = "draining"
        patience_us = int((self._drain_s + _CANCEL_S + _LEAVING_S) * 1e6)
        self._manager.notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={patience_us}")
        self._say(f"draining {len(runtime.pending)} requests")
        runtime.handle(ev.AdmissionChanged(is_open=False))
        try:
            async with asyncio.timeout(self._drain_s):
                await runtime.until(lambda: not runtime.pending)
        except TimeoutError:
            message = (
                f"the daemon stops, and the request did not end within {self._drain_s:g} s; send it again"
            )
            for request_id in list(runtime.pending):
                runtime.handle(ev.RequestCancelled(request_id, ErrorCode.DRAINING, message))
            try:
                async with asyncio.timeout(_CANCEL_S):
                    await runtime.until(lambda: not runtime.pending)
            except TimeoutError:
                log.error("%d requests could not be ended", len(runtime.pending))
        self.state = "stopping"

    async def _let_go(self) -> None:
        """The last step: nobody loads any more."""
        if self._stage is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._stage.close)
        self._groundwork.close()

    def _listen_to_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)

    def _hung_up(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload_or_say_why_not())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            log.warning("second signal %d: leaving at once", number)
            os._exit(128 + number)  # the loaders die with us (PDEATHSIG)
        log.info("signal %d: stopping", number)
        self._stop.set()

    def _defect(self, error: BaseException) -> None:
        """The core contradicted itself: nothing it says can be trusted; the service manager restarts us."""
        log.critical("defect in the core, stopping", exc_info=error)
        self._exit_status = EXIT_DEFECT
        self.request_shutdown(0.0)
