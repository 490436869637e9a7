"""The daemon's parts as the configuration wants them, each made without knowing the others' order."""

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector

from understudy.paths import CLIENT_SOCKET, METRICS_SOCKET
from understudy.wire import MAX_FRAME_BYTES, MAX_HEADER_BYTES
from understudyd.config import AUTO, Config, PolicyConfig, ServerConfig
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.shell.adapters import StageAdapter
from understudyd.shell.curve import ServerKeys, load_keys
from understudyd.shell.device import gpu_of, gpu_uuid, kind_of
from understudyd.shell.endpoints import check_endpoint, tcp_address
from understudyd.shell.frontend import Frontend
from understudyd.shell.gpu_metrics import GpuCollector, open_nvml
from understudyd.shell.health import Health
from understudyd.shell.host_pool import HostPool
from understudyd.shell.input_limits import InputLimits
from understudyd.shell.kept_pool import KeptPool
from understudyd.shell.limits import Limits
from understudyd.shell.memory import Arena, CpuArena, check_available, memory_available_bytes
from understudyd.shell.meter import Meter
from understudyd.shell.metrics import DaemonReader, Metrics
from understudyd.shell.observatory import Observatory
from understudyd.shell.read_through import ReadThrough
from understudyd.shell.request_log import RequestLog
from understudyd.shell.runtime import Runtime
from understudyd.shell.socket_access import SocketAccess
from understudyd.shell.supervisor import LoaderPool, LoaderSettings
from understudyd.shell.timeline import Timeline
from understudyd.shell.work_room import Work
from understudyd.stage.compile_report import CompileReport
from understudyd.store.store import Store
from understudyd.store.union import StoreUnion

CPU_ARENA_SHARE = 0.5
HOST_POOL_SHARE = 0.5
FRAME_FLOOR_BYTES = 16 * MAX_HEADER_BYTES
"""A header that is somewhat too long gets an answer; a longer frame costs the connection."""
FLOOD_BYTES = {"cuda": 512 * 1024 * 1024, "cpu": 4 * 1024 * 1024 * 1024}
"""What memory may grow by while clients send: on the CPU device activations are part of it."""
SWITCH_INTERVAL_S = 0.001
_GRAIN_BYTES = 2 * 1024 * 1024
_log = logging.getLogger(__name__)


class Observed(Protocol):
    """The daemon, as far as others watch it."""

    state: str

    @property
    def config(self) -> Config:
        """What is in force."""

    @property
    def compiled(self) -> CompileReport | None:
        """What the stage has compiled; None where it compiles nothing."""


class Parts:
    """Makes parts for `device`, "cpu" or "cuda"."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = kind_of(config.device)
        self._gpu = gpu_of(config.device)
        # Asked before the host pool takes its share, which it does in the background.
        self._available_bytes = memory_available_bytes()
        self._pool_to_come_bytes = 0

    def check(self) -> None:
        """Find out what would end the start later on, before anything is made.

        Raises `ArenaError`, `EndpointError` and `KeyFileError`.
        """
        gpu_uuid(self.config.device)
        has_keys = self.keys() is not None
        for endpoint in self.config.server.endpoints:
            check_endpoint(endpoint, has_keys=has_keys)
        metrics = self.config.metrics
        for endpoint in metrics.endpoints if metrics.enabled else ():
            tcp_address(endpoint, allow_remote=metrics.allow_remote)

    def check_room(self) -> None:
        """Look at memory again, now that nobody else serves here. Raises `ArenaError` when it is too little.

        A host pool is left out: a dead daemon's may be taken over.
        """
        self._available_bytes = memory_available_bytes()
        wanted = int(self.config.device.arena)
        if self.device == "cpu" and wanted != AUTO:
            check_available("an arena", wanted, self._available_bytes)

    def stores(self) -> StoreUnion:
        """The writable store, made where there is none, and the read-only ones. Raises `StoreError`."""
        chosen = self.config.store
        own = Store.open(chosen.path, writable=True)
        return StoreUnion(own, [Store(path) for path in chosen.read_only if path != chosen.path])

    async def open_cache(self, leaving: AsyncExitStack) -> ReadThrough | None:
        """Local copies of what read-only stores hold, in the writable store's folder; None without.

        They are closed when `leaving` is.
        """
        chosen = self.config.store
        if not (chosen.cache and chosen.read_only):
            return None
        cache = ReadThrough(chosen.path / "cache", int(chosen.cache), float(chosen.cache_rate))
        await asyncio.get_running_loop().run_in_executor(None, cache.open)
        leaving.push_async_callback(cache.close)
        return cache

    def host_pool(self, kept: KeptPool | None = None) -> HostPool | None:
        """The one that the last life left, else a new one; None without bytes. Raises `ArenaError`."""
        wanted = int(self.config.host.pool)
        if wanted == AUTO and self.device != "cuda":
            wanted = 0

        def make() -> HostPool | None:
            size = _whole_grains(self._available_bytes * HOST_POOL_SHARE) if wanted == AUTO else wanted
            self._pool_to_come_bytes = size
            return HostPool(size) if size else None

        return make() if kept is None else kept.host_pool(wanted, make)

    def loader_pool(
        self, loop: asyncio.AbstractEventLoop, timeline: Timeline, host_pool: HostPool | None
    ) -> LoaderPool:
        """The loaders, not started yet. Raises `ArenaError` when there is no such GPU."""
        chosen = self.config.loader
        settings = LoaderSettings(
            chunk_bytes=int(chosen.chunk),
            reader_threads=chosen.threads,
            copies_in_flight=chosen.copies_in_flight,
            rate_limit_bytes_per_s=float(chosen.rate_limit),
            dead_after_s=chosen.dead_after_s,
            stalled_after_s=chosen.stalled_after_s,
            transport=chosen.transport,
        )
        return LoaderPool(
            loop,
            count=chosen.count,
            settings=settings,
            record=timeline.record,
            host_pool=host_pool,
            gpu_uuid=gpu_uuid(self.config.device),
        )

    def arena(self) -> Arena:
        """The arena; blocks until all of its memory is there. Raises `ArenaError`."""
        wanted = int(self.config.device.arena)
        if self.device == "cuda":
            from understudyd.shell import memory_cuda  # cuda-bindings are not installed everywhere

            reserve = int(self.config.device.reserve)
            size = wanted
            if wanted == AUTO:
                size = memory_cuda.auto_size_bytes(reserve, self._gpu)
            elif (left_bytes := memory_cuda.free_bytes(self._gpu) - size) < reserve:
                _log.warning(
                    "an arena of %.2f GiB leaves %.2f GiB of GPU memory for activations, less than the %.2f "
                    "GiB of device.reserve: large images may fail with out_of_memory; make device.arena "
                    "smaller",
                    *(size / 2**30, left_bytes / 2**30, reserve / 2**30),
                )
            return memory_cuda.CudaArena(size, self._gpu, share=self.config.loader.transport != "thread")
        left_bytes = self._available_bytes - self._pool_to_come_bytes
        size = _whole_grains(left_bytes * CPU_ARENA_SHARE) if wanted == AUTO else wanted
        # Every page is made now: about half a second a GiB in which nothing else would be said.
        _log.info("making an arena of %.2f GiB", size / 2**30)
        return CpuArena(size)

    def machine(self, arena: Arena, host_pool: HostPool | None) -> Machine:
        """The core."""
        return Machine(
            arena.size_bytes,
            pool_bytes=0 if host_pool is None else host_pool.size_bytes,
            policy=policy_of(self.config.policy),
            max_waiting=self.config.queue.max_waiting,
            decisions=self.config.policy.decisions,
        )

    def request_log(self) -> RequestLog | None:
        """Where finished requests are written down, if anywhere."""
        chosen = self.config.log
        return None if chosen.requests is None else RequestLog(chosen.requests, chosen.requests_size)

    def frontend(self, loop: asyncio.AbstractEventLoop, runtime: Runtime, daemon_id: str) -> Frontend:
        """The clients' door, still shut. Raises `EndpointError` and `KeyFileError`."""
        chosen = self.config.server
        return Frontend(
            loop,
            [f"ipc://{chosen.runtime_dir / CLIENT_SOCKET}", *chosen.endpoints],
            runtime,
            limits=limits_of(chosen),
            daemon_id=daemon_id,
            access=SocketAccess(int(chosen.socket_mode), chosen.socket_group),
            keys=self.keys(),
            flood_bytes=FLOOD_BYTES[self.device],
        )

    def meter(self) -> Meter:
        """What counts requests for the metrics."""
        return Meter(self.config.metrics.most_models)

    def observatory(
        self, runtime: Runtime, pool: LoaderPool, frontend: Frontend, daemon: Observed
    ) -> Observatory | None:
        """The door for metrics and probes, still shut; None where none is wanted. Raises `EndpointError`."""
        chosen = self.config.metrics
        if not chosen.enabled:
            return None
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        if self.device == "cuda" and (nvml := open_nvml()) is not None:
            registry.register(GpuCollector(nvml, gpu_uuid(self.config.device)))
        reader = DaemonReader(
            runtime.machine,
            runtime.meter,
            pool,
            frontend,
            lambda: daemon.state,
            self.device,
            lambda: daemon.compiled,
        )
        return Observatory(
            Metrics(registry, reader.read),
            Health(runtime, lambda: daemon.state, lambda: daemon.config.stage.stalled_after_s),
            self.config.server.runtime_dir / METRICS_SOCKET,
            chosen.endpoints,
            SocketAccess(int(chosen.socket_mode), chosen.socket_group),
            allow_remote=chosen.allow_remote,
        )

    def keys(self) -> ServerKeys | None:
        """The daemon's and its clients', read afresh; None without. Raises `KeyFileError`."""
        return load_keys(self.config.curve)

    def admin_access(self) -> SocketAccess:
        """Who may use the operators' socket."""
        chosen = self.config.admin
        return SocketAccess(int(chosen.socket_mode), chosen.socket_group)

    def import_stage(self) -> None:
        """Import torch, diffusers and all that the stage needs: takes seconds, beside all else."""
        import understudyd.stage.stage  # noqa: F401

    def stage(self, arena: Arena, runtime: Runtime, timeline: Timeline) -> StageAdapter:
        """The stage; blocks for seconds unless `import_stage` was called before."""
        from understudyd.stage.stage import Stage

        # Threads that wait for the interpreter get it within a millisecond: the stage changes over
        # between threads, and the event loop's share is small.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        stage = Stage(
            arena.tensor(),
            runtime.keeper.served,
            device=self.device,
            threads=self.config.stage.threads,
            compile_backend="inductor" if self.config.stage.compile == "on" else None,
            emit=runtime.emit,
            on_progress=runtime.progress,
            record=timeline.record,
        )
        stage.start_custom_classes()
        return StageAdapter(stage)


def policy_of(chosen: PolicyConfig) -> PolicySettings:
    """What the core is told about it."""
    return PolicySettings(
        order=chosen.order,
        lookahead=chosen.lookahead,
        max_wait_s=chosen.max_wait_s,
        max_skips=chosen.max_skips,
        prefetch=chosen.prefetch,
        pause_priority=chosen.pause_priority,
    )


def limits_of(chosen: ServerConfig) -> Limits:
    """What the front end holds clients to."""
    return Limits(
        max_pixels=chosen.max_pixels,
        max_steps=chosen.max_steps,
        max_images=chosen.max_images,
        max_prompt_chars=chosen.max_prompt_chars,
        max_open_per_client=chosen.max_open_per_client,
        max_open_per_user=chosen.max_open_per_user,
        max_connections=chosen.max_connections,
        max_open_work=Work(chosen.max_open_pixels, chosen.max_open_steps),
        max_frame_bytes=max(FRAME_FLOOR_BYTES, int(min(chosen.max_input_bytes, MAX_FRAME_BYTES))),
        max_open_input_bytes=int(chosen.max_open_input_bytes),
        max_all_input_bytes=int(chosen.max_all_input_bytes),
        inputs=InputLimits(
            max_pixels=chosen.max_input_pixels,
            # A request that no waiting makes room for must not be told to try again.
            max_total_bytes=int(
                min(chosen.max_input_bytes, chosen.max_open_input_bytes, chosen.max_all_input_bytes)
            ),
            max_option_items=chosen.max_steps,  # a list may be timesteps
            max_option_chars=chosen.max_prompt_chars,
        ),
        outbox_bytes=int(chosen.outbox_bytes),
        answer_ttl_s=chosen.answer_ttl_s,
        client_timeout_s=chosen.client_timeout_s,
    )


def _whole_grains(size_bytes: float) -> int:
    return int(size_bytes) // _GRAIN_BYTES * _GRAIN_BYTES
