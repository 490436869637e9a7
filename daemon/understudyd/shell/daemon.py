"""One life of the daemon: put the parts together, get ready, serve, drain, leave nothing behind.

Order matters: the arena stands and the loaders read before torch is imported; the front end listens only
when every architecture has run once. Clients that are early wait in ZeroMQ's connect.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from understudy.paths import ADMIN_SOCKET, CLIENT_SOCKET
from understudy.wire import Generate
from understudyd.config import AUTO, Config
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.shell.adapters import PoolAdapter, ServedModels, StageAdapter
from understudyd.shell.admin import AdminServer
from understudyd.shell.commands import Commands
from understudyd.shell.families import representatives
from understudyd.shell.frontend import Frontend
from understudyd.shell.limits import Limits
from understudyd.shell.lock import DaemonLock
from understudyd.shell.memory import Arena, CpuArena, auto_size_bytes
from understudyd.shell.notify import notify
from understudyd.shell.runtime import RunFailed, Runtime
from understudyd.shell.supervisor import LoaderPool, LoaderSettings
from understudyd.shell.timeline import Timeline
from understudyd.store.store import Store

log = logging.getLogger(__name__)

CPU_ARENA_SHARE = 0.5
SWITCH_INTERVAL_S = 0.001
EXIT_DEFECT = 70


class Daemon:
    """Everything one daemon is made of. `serve` returns the exit status."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.state = "starting"
        self.daemon_id = uuid.uuid4().hex
        self.started_at_s = time.monotonic()
        self.device: str = config.device.kind
        if self.device == "auto":
            self.device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
        self._stop = asyncio.Event()
        self._drain_s = config.server.drain_s
        self._exit_status = 0

    async def serve(self) -> int:
        """Serve until told to stop."""
        runtime_dir = self.config.server.runtime_dir
        runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = DaemonLock(runtime_dir / "understudyd.lock")
        try:
            return await self._serve_locked(runtime_dir)
        finally:
            lock.close()

    async def _serve_locked(self, runtime_dir: Path) -> int:
        loop = asyncio.get_running_loop()
        self._listen_to_signals(loop)
        store = Store.open(self.config.store.path, writable=True)
        arena = await loop.run_in_executor(None, self._make_arena)
        log.info("arena: %.2f GiB on %s", arena.size_bytes / 2**30, self.device)
        machine = self._make_machine(arena)
        runtime = Runtime(machine, store, loop, on_defect=self._defect)
        timeline = Timeline()
        pool = self._make_pool(loop, arena, runtime, timeline)
        runtime.attach_pool(PoolAdapter(pool))
        commands = Commands(runtime, pool, timeline, store, self, time.monotonic)
        admin = AdminServer(runtime_dir / ADMIN_SOCKET, commands.execute)
        frontend = self._make_frontend(loop, runtime, runtime_dir)
        stage: StageAdapter | None = None
        try:
            await admin.start()
            for record in store.models().values():
                runtime.add_model(record)
            pool.start()
            self._say("importing torch")
            stage = await self._make_stage(loop, arena, store, runtime, timeline)
            runtime.attach_stage(stage)
            await self._until_stopped(self._warm_up(runtime))
            if not self._stop.is_set():
                runtime.attach_replies(frontend)
                endpoints = frontend.start()
                self._ready(endpoints)
                await self._stop.wait()
            await self._drain(runtime)
        finally:
            self.state = "stopping"
            frontend.close(linger_s=1.0)
            await admin.stop()
            await pool.stop()
            runtime.close()
            if stage is not None:
                await loop.run_in_executor(None, stage.close)
            arena.close()
        return self._exit_status

    # -- parts --------------------------------------------------------------------------------------

    def _make_arena(self) -> Arena:
        wanted = int(self.config.device.arena)
        if self.device == "cuda":
            from understudyd.shell import memory_cuda  # cuda-bindings are not installed everywhere

            gpu, reserve = self.config.device.gpu, int(self.config.device.reserve)
            size = memory_cuda.auto_size_bytes(reserve, gpu) if wanted == AUTO else wanted
            return memory_cuda.CudaArena(size, gpu)
        return CpuArena(auto_size_bytes(CPU_ARENA_SHARE) if wanted == AUTO else wanted)

    def _make_machine(self, arena: Arena) -> Machine:
        chosen = self.config.policy
        policy = PolicySettings(
            order=chosen.order,
            lookahead=chosen.lookahead,
            max_wait_s=chosen.max_wait_s,
            max_skips=chosen.max_skips,
            prefetch=chosen.prefetch,
        )
        return Machine(arena.size_bytes, policy=policy, max_waiting=self.config.queue.max_waiting)

    def _make_pool(
        self, loop: asyncio.AbstractEventLoop, arena: Arena, runtime: Runtime, timeline: Timeline
    ) -> LoaderPool:
        chosen = self.config.loader
        settings = LoaderSettings(
            chunk_bytes=int(chosen.chunk),
            reader_threads=chosen.threads,
            rate_limit_bytes_per_s=float(chosen.rate_limit),
            dead_after_s=chosen.dead_after_s,
        )
        return LoaderPool(
            loop, arena, count=chosen.count, settings=settings, emit=runtime.emit, record=timeline.record
        )

    def _make_frontend(
        self, loop: asyncio.AbstractEventLoop, runtime: Runtime, runtime_dir: Path
    ) -> Frontend:
        chosen = self.config.server
        limits = Limits(
            max_pixels=chosen.max_pixels,
            max_steps=chosen.max_steps,
            max_images=chosen.max_images,
            max_prompt_chars=chosen.max_prompt_chars,
            max_open_per_client=chosen.max_open_per_client,
            outbox_bytes=int(chosen.outbox_bytes),
            answer_ttl_s=chosen.answer_ttl_s,
            client_timeout_s=chosen.client_timeout_s,
        )
        endpoints = [f"ipc://{runtime_dir / CLIENT_SOCKET}", *chosen.endpoints]
        return Frontend(loop, endpoints, runtime, limits=limits, daemon_id=self.daemon_id)

    async def _make_stage(
        self,
        loop: asyncio.AbstractEventLoop,
        arena: Arena,
        store: Store,
        runtime: Runtime,
        timeline: Timeline,
    ) -> StageAdapter:
        def make() -> StageAdapter:
            from understudyd.stage.stage import Stage  # seconds: torch and diffusers

            # Threads that wait for the interpreter get it within a millisecond: the stage changes over
            # between threads, and the event loop's share is small.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            return StageAdapter(
                Stage(
                    arena.tensor(),
                    ServedModels(store, runtime.records),
                    device=self.device,
                    threads=self.config.stage.threads,
                    emit=runtime.emit,
                    on_progress=runtime.progress,
                    record=timeline.record,
                )
            )

        return await loop.run_in_executor(None, make)

    # -- getting ready ------------------------------------------------------------------------------

    async def _warm_up(self, runtime: Runtime) -> None:
        """Run each architecture once: first-use kernels and autotuning must not meet a client."""
        if not self.config.stage.warm_up:
            return
        families = representatives(runtime.records.values())
        try:
            async with asyncio.timeout(self.config.stage.warm_up_limit_s):
                for i, record in enumerate(families, 1):
                    self._say(f"warming up {i} of {len(families)}: {record.pipeline_class}")
                    request = Generate(
                        id=f"warm-up-{i}",
                        model=record.name,
                        prompt="warm up",
                        seed=0,
                        steps=1,
                        progress=False,
                    )
                    await self._warm_up_one(runtime, request)
        except TimeoutError:
            log.warning(
                "warm-up took longer than %g s: serving without it", self.config.stage.warm_up_limit_s
            )

    async def _warm_up_one(self, runtime: Runtime, request: Generate) -> None:
        try:
            await runtime.run(request)
        except RunFailed as error:
            log.warning("warm-up with %s failed (%s); it is served all the same", request.model, error)

    def _ready(self, endpoints: list[str]) -> None:
        # What start-up made lives as long as the daemon: the collector need not walk it again.
        gc.collect()
        gc.freeze()
        self.state = "ready"
        notify("READY=1")
        self._say(f"ready after {time.monotonic() - self.started_at_s:.1f} s on {', '.join(endpoints)}")

    def _say(self, status: str) -> None:
        log.info("%s", status)
        notify(f"STATUS={status}")

    # -- leaving ------------------------------------------------------------------------------------

    def request_shutdown(self, drain_s: float) -> None:
        """Stop admitting; finish or fail what is open within `drain_s`; exit."""
        self._drain_s = drain_s
        self._stop.set()

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, unless the daemon is to stop meanwhile."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def _drain(self, runtime: Runtime) -> None:
        self.state = "draining"
        notify("STOPPING=1")
        self._say(f"draining {len(runtime.pending)} requests")
        runtime.handle(ev.AdmissionChanged(is_open=False))
        try:
            async with asyncio.timeout(self._drain_s):
                await runtime.until(lambda: not runtime.pending)
        except TimeoutError:
            for request_id in list(runtime.pending):
                runtime.handle(ev.RequestCancelled(request_id))
            try:
                async with asyncio.timeout(5.0):
                    await runtime.until(lambda: not runtime.pending)
            except TimeoutError:
                log.error("%d requests could not be ended", len(runtime.pending))

    def _listen_to_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

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
