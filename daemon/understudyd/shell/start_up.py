"""What is done before clients come: every architecture runs once, and what `[startup]` wants is made ready.

Each part has its time limit, after which the daemon serves without the rest and says what that is.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from msgspec.structs import replace

from understudy.wire import Generate
from understudyd.config import Config
from understudyd.core import events as ev
from understudyd.core.types import ErrorCode
from understudyd.names import unknown_model
from understudyd.shell.adapter_book import AdapterRefused
from understudyd.shell.families import family, representatives
from understudyd.shell.pending import RunFailed
from understudyd.shell.runtime import Runtime
from understudyd.shell.threads import in_daemon_thread
from understudyd.stage.compile_report import CompileReport
from understudyd.store.records import ModelRecord

log = logging.getLogger(__name__)

_WARM_UP_FRAMES = 9


class Compiling(Protocol):
    """The stage, as far as it compiles."""

    def compile_report(self) -> CompileReport | None:
        """What there is so far; None where nothing is compiled."""

    def wait_compiled(self) -> None:
        """Block until nothing is to be compiled."""


class StartUp:
    """`missing` are models of `[startup]` that are not ready, and why; complete when `warm_up` returns."""

    def __init__(self, runtime: Runtime, config: Config, say: Callable[[str], None]) -> None:
        self.missing: dict[str, str] = {}
        self._runtime = runtime
        self._chosen = config.startup
        self._stage = config.stage
        self._say = say
        self._names: list[str] = []
        self._families: set[tuple[str, ...]] = set()  # of the chosen models

    def load_ahead(self) -> set[str]:
        """Have what will be needed on its way while torch is imported; the models' names."""
        records = self._runtime.records
        for name in dict.fromkeys(self._chosen.models):
            try:
                wish = self._runtime.keeper.adapters.wish(name)
            except AdapterRefused as error:
                self.missing[name] = error.code
                log.warning("startup.models: %s", error)
                continue
            if wish.base in records:
                self._names.append(wish.model)
                self._families.add(family(records[wish.base]))
            else:
                self.missing[name] = "unknown"
                log.warning("startup.models: %s", unknown_model(name, records, "add it first"))
        if self._chosen.forecast:
            self._names += self._expected()
        names = [*self._names, *(record.name for record in self._architectures())]
        for name in dict.fromkeys(names):
            self._runtime.handle(ev.LoadWanted(name))
        return set(names)

    def _expected(self) -> list[str]:
        """What the forecast makes likeliest, beside what is chosen, as far as there is room."""
        residency, forecast = self._runtime.machine.residency, self._runtime.machine.forecast
        blobs = {blob for name in self._names for blob in residency.models[name].blobs}
        names = []
        for name in forecast.ranked():
            needed = blobs.union(residency.models[name].blobs)
            if sum(residency.arena.rounded(b.info.size_bytes) for b in needed) > residency.arena.size_bytes:
                break
            if name not in self._names:
                names.append(name)
            blobs = needed
        return names

    async def warm_up(self) -> None:
        """Run each architecture, then the chosen models; returns when all is done or its time is over."""
        await self._warm_architectures()
        self.missing |= dict.fromkeys(self._names, "not reached in time")
        try:
            async with asyncio.timeout(self._chosen.limit_s):
                for request in self._requests():
                    self._say(f"start-up: running {request.model}")
                    await self._run(request, _without_prompt(request))
                await self._load()
        except TimeoutError:
            log.warning(
                "startup.models took longer than %g s: serving without the rest", self._chosen.limit_s
            )
        self._look_what_is_missing()

    async def compile(self, compiling: "Compiling | None") -> None:
        """Wait for what the runs have had compiled. What takes too long goes on beside requests."""
        report = None if compiling is None else compiling.compile_report()
        if compiling is None or report is None or not report.pending:
            return
        self._say(f"compiling {report.pending} components")
        try:
            async with asyncio.timeout(self._stage.warm_up_limit_s):
                await in_daemon_thread(compiling.wait_compiled)
        except TimeoutError:
            log.warning(
                "compiling takes longer than %g s: serving without until it is done",
                self._stage.warm_up_limit_s,
            )

    # -- architectures ------------------------------------------------------------------------------

    def _architectures(self) -> list[ModelRecord]:
        """One model of each, but for those that a chosen model will have run."""
        if not self._stage.warm_up:
            return []
        chosen = self._families if self._chosen.prompts else set()
        models = representatives(self._runtime.records.values())
        return [record for record in models if family(record) not in chosen]

    async def _warm_architectures(self) -> None:
        """First-use kernels and autotuning must not meet a client."""
        architectures = self._architectures()
        try:
            async with asyncio.timeout(self._stage.warm_up_limit_s):
                for i, record in enumerate(architectures, 1):
                    self._say(f"warming up {i} of {len(architectures)}: {record.pipeline_class}")
                    request = Generate(
                        id=f"warm-up-{i}",
                        model=record.name,
                        prompt="warm up",
                        seed=0,
                        steps=1,
                        progress=False,
                    )
                    await self._run(_as_short_video(request), request, _without_prompt(request))
        except TimeoutError:
            log.warning("warm-up took longer than %g s: serving without it", self._stage.warm_up_limit_s)

    # -- chosen models ------------------------------------------------------------------------------

    def _requests(self) -> Iterator[Generate]:
        width, height = self._chosen.width_and_height()
        for name in self._names:
            for i, prompt in enumerate(self._chosen.prompts, 1):
                yield Generate(
                    id=f"start-up-{name}-{i}",
                    model=name,
                    prompt=prompt,
                    seed=0,
                    width=width,
                    height=height,
                    steps=self._chosen.steps,
                    progress=False,
                )

    async def _load(self) -> None:
        """What the runs have evicted again, or never needed, is loaded and prepared."""
        machine = self._runtime.machine
        for name in self._names:
            if name in machine.residency.models and name not in machine.residency.ready:
                self._runtime.handle(ev.LoadWanted(name))
        await self._runtime.until(lambda: machine.wanted.keys().isdisjoint(self._names))

    def _look_what_is_missing(self) -> None:
        models, ready = self._runtime.machine.residency.models, self._runtime.machine.residency.ready
        for name in self._names:
            if name in ready:
                del self.missing[name]
            elif name not in self._runtime.machine.wanted:
                is_fit = name in models and not models[name].is_unfit
                self.missing[name] = "no room beside the others" if is_fit else "cannot be used"
        if self.missing:
            log.warning("not ready at start-up: %s", self.describe_missing())

    def describe_missing(self) -> str:
        """For people: each missing model and why."""
        return ", ".join(f"{name} ({why})" for name, why in self.missing.items())

    async def _run(self, *attempts: Generate) -> None:
        """The first attempt that the pipeline takes: what does not fit is refused before it costs time."""
        for attempt in attempts:
            try:
                await self._runtime.run(attempt)
                return
            except RunFailed as error:
                if error.code is ErrorCode.BAD_REQUEST and attempt is not attempts[-1]:
                    continue
                log.warning("warm-up with %s failed (%s); it is served all the same", attempt.model, error)
                return


def _without_prompt(request: Generate) -> Generate:
    return replace(request, id=f"{request.id}-bare", prompt="")


def _as_short_video(request: Generate) -> Generate:
    """One of default length and size would take minutes; 9 frames suit every temporal compression."""
    return replace(
        request, id=f"{request.id}-video", width=256, height=256, options={"num_frames": _WARM_UP_FRAMES}
    )
