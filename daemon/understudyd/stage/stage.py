"""The stage: what the event loop says to the computing threads, and the threads.

The methods are called from the event loop's thread and never block; answers come through `emit`, from other
threads. Lifetimes are the core's business: it puts a request on deck only when its model is prepared
and all its blobs have views, and drops views only when no lease is left.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from understudy.trace import CANCELLED, FAILED, FOLD, MOVE, PREPARE, VIEWS, Record, Span
from understudyd.core.events import (
    Event,
    ExtentMoved,
    FoldCancelled,
    FoldFailed,
    FoldFinished,
    ModelPreparationFailed,
    ModelPrepared,
    MoveFailed,
    ViewsBuilt,
    ViewsFailed,
)
from understudyd.core.types import ErrorCode
from understudyd.stage.baton import Baton
from understudyd.stage.compile_report import CompileReport
from understudyd.stage.compiling import Compiler
from understudyd.stage.device import open_device
from understudyd.stage.errors import told_of_preparation
from understudyd.stage.fold_crew import FoldCrew
from understudyd.stage.fold_job import FoldJob
from understudyd.stage.performer import Announcer, Performer
from understudyd.stage.repertoire import ModelStore, Prepared, Repertoire
from understudyd.stage.run import Member, Run, RunParams, RunResult
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.slices import Slices
from understudyd.stage.views import ResidentBlobs, WeightArena
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan

_log = logging.getLogger(__name__)

WORKERS = 4
"""One computes, one is on deck, the others encode."""

_BREATH_S = 0.0005
_SLICE_S = 0.001
_JOIN_S = 30.0
_SHOWN = 12  # characters of a blob's name

_ENDINGS = {FoldFinished: "", FoldFailed: FAILED, FoldCancelled: CANCELLED}

NOBODY: Mapping[str, RunParams] = MappingProxyType({})

Emit = Callable[[Event], None]
"""Give the core an event; callable from any thread."""

OnProgress = Callable[[str, int, int], None]
"""`on_progress(request_id, step, steps)`; called from the computing thread, so it must be quick."""


class Stage:
    """Runs pipelines over weights in the arena. `close` ends its threads."""

    def __init__(
        self,
        arena: Tensor,
        store: ModelStore,
        *,
        device: str = "cpu",
        threads: int = 1,
        compile_backend: str | Callable[..., Any] | None = None,
        emit: Emit,
        on_progress: OnProgress = lambda request_id, step, steps: None,
        record: Record = lambda span: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`arena` is all of it, shape [bytes], uint8, on `device`; `threads` are torch's, on the CPU.

        With a `compile_backend` of torch.compile's what denoises is compiled by it, beside the first runs.
        """
        self._threads = threads
        self._clock = clock
        self._record = record
        self._device = open_device(device)
        self._announcer = Announcer(emit)
        self._arena = WeightArena(arena)
        self._resident = ResidentBlobs(self._arena)
        self._slices = Slices(is_busy=lambda: bool(self._runs))
        self._performer = Performer(
            self._resident, self._device, self._announcer, on_progress, record, clock, self._slices.give
        )
        self._compiler = None
        if compile_backend is not None:
            self._compiler = Compiler(self._device.device, compile_backend, record, clock)
        self._repertoire = Repertoire(store, self._device.device, self._performer.touch, self._compiler)
        self._baton = Baton()
        self._runs: dict[str, Run] = {}
        self._results: dict[str, RunResult] = {}
        self._deck: SimpleQueue[Run | None] = SimpleQueue()
        self._chores: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._view_jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._folds: dict[tuple[str, int], FoldJob] = {}
        self._fold_jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        helpers = threads - 1 if self._device.device.type == "cpu" else 0
        self._crew = FoldCrew(threads, helpers, is_busy=lambda: bool(self._runs))
        self._is_closed = False
        self._workers = [self._start(f"stage-{i}", self._work) for i in range(WORKERS)]
        self._workers.append(self._start("stage-prepare", lambda: _drain(self._chores)))
        self._workers.append(self._start("stage-views", lambda: _drain(self._view_jobs)))
        self._workers.append(self._start("stage-fold", self._work_on_folds))
        if self._compiler is not None:
            self._workers.append(self._start("stage-compile", self._work_on_compiling))

    # -- models ------------------------------------------------------------------------------------

    def start_custom_classes(self) -> None:
        """Import the installed classes that models of the store are of, and start them. Blocks.

        One that fails is logged; its models fail when they are prepared.
        """
        is_done = threading.Event()
        self._chores.put(self._repertoire.start_custom_classes)
        self._chores.put(is_done.set)
        is_done.wait()

    def prepare_model(self, name: str) -> None:
        """Build what requests need besides weights. Ends in `ModelPrepared` or `ModelPreparationFailed`."""
        self._chores.put(lambda: self._prepare(name, lambda: self._repertoire.prepare(name)))

    def prepare_derived(self, key: str, base_key: str, overlays: Mapping[str, OverlaidComponent]) -> None:
        """The same for a model that is another one with overlays over components, by name.

        The base is prepared first if it is not; what is told is about `key` alone.
        """
        self._chores.put(lambda: self._prepare(key, lambda: self._repertoire.derive(key, base_key, overlays)))

    def forget_model(self, name: str) -> None:
        """Drop the model's parts, and its skeletons if no other model uses them."""
        self._chores.put(lambda: self._repertoire.forget(name))

    def skeletons(self) -> list[Skeleton]:
        """Every skeleton alive: for tests, checks and measurements."""
        return self._repertoire.skeletons()

    def tasks(self, name: str) -> list[str]:
        """What a request may name as the task of a prepared model; none for a custom pipeline."""
        return self._repertoire.tasks(name)

    def compile_report(self) -> CompileReport | None:
        """What has been compiled so far; None where nothing is to be."""
        return None if self._compiler is None else self._compiler.report()

    def wait_compiled(self) -> None:
        """Block until what the runs so far have used is compiled, or cannot be."""
        if self._compiler is not None:
            self._compiler.wait()

    def strays(self) -> list[str]:
        """Tensors of bound components outside the arena: none, unless a run moved them just now."""
        addresses = self._resident.address_range
        return [
            f"{skeleton.signature.class_name}.{path}"
            for skeleton in self.skeletons()
            if skeleton.is_bound
            for path in skeleton.strays(addresses)
        ]

    # -- blobs -------------------------------------------------------------------------------------

    def build_views(self, blob: str, offset: int, generation: int) -> None:
        """The blob lies at `offset` of the arena, complete: `ViewsBuilt` or `ViewsFailed`."""
        self._resident.expect(blob, offset, generation)
        self._view_jobs.put(lambda: self._build_views(blob, generation))

    def drop_views(self, blob: str, generation: int) -> None:
        """Forget the blob's views at once, in skeletons too. Takes well under a millisecond."""
        for views in self._resident.drop(blob, generation):
            for skeleton in self.skeletons():
                skeleton.unbind(views)
            self._resident.keep(views)

    def fold(
        self,
        overlay: str,
        generation: int,
        offset: int,
        plan: OverlayPlan,
        sources: Sequence[tuple[str, int]],
    ) -> None:
        """Make an overlay at `offset` of the arena, beside what runs; see `core.actions.Fold`.

        Ends in `FoldFinished`, `FoldFailed` or `FoldCancelled`.
        """
        job = FoldJob(overlay, generation, offset, plan, sources)
        self._folds[overlay, generation] = job
        self._fold_jobs.put(lambda: self._fold(job))

    def cancel_fold(self, overlay: str, generation: int) -> None:
        """Stop a fold between two steps; too late or unknown is no error."""
        job = self._folds.get((overlay, generation))
        if job is not None:
            job.cancel()

    def move_extent(self, blob: str, offset: int, to_offset: int, size_bytes: int, generation: int) -> None:
        """Move a blob without views to a lower, perhaps overlapping place: `ExtentMoved` or `MoveFailed`."""
        self._view_jobs.put(lambda: self._move(blob, offset, to_offset, size_bytes, generation))

    # -- requests ----------------------------------------------------------------------------------

    def put_on_deck(
        self, request_id: str, model: str, params: RunParams, companions: Mapping[str, RunParams] = NOBODY
    ) -> None:
        """Run the request when those before it are done; `core.actions.PutOnDeck` names its events.

        `companions` are requests by id that share its run.
        """
        members = [Member(request_id, params), *(Member(*other) for other in companions.items())]
        run = Run(model, members, self._baton.draw(), self._clock())
        self._runs |= {member.request_id: run for member in members}
        self._deck.put(run)

    def cancel_run(self, request_id: str, code: ErrorCode) -> None:
        """End the run at its next checkpoint; too late or unknown is no error."""
        run = self._runs.get(request_id)
        if run is not None:
            run.cancel(request_id, code)

    def take_result(self, request_id: str) -> RunResult:
        """The images after `ImagesEncoded`, once. Raises `KeyError` if there are none."""
        return self._results.pop(request_id)

    def someone_waits(self) -> bool:
        """A request has everything ready and waits for the stage only: for measurements."""
        return self._baton.someone_waits()

    def close(self) -> None:
        """Cancel what runs and end the threads. Blocks; call it last, when the loop has nothing to serve."""
        if self._is_closed:
            return
        self._is_closed = True
        for request_id, run in list(self._runs.items()):
            run.cancel(request_id, ErrorCode.DRAINING)
        for job in list(self._folds.values()):
            job.cancel()
        if self._compiler is not None:
            self._compiler.close()
        for _ in range(WORKERS):
            self._deck.put(None)
        for jobs in (self._chores, self._view_jobs, self._fold_jobs):
            jobs.put(None)
        for thread in self._workers:
            thread.join(_JOIN_S)
        self._crew.close()

    # -- the threads -------------------------------------------------------------------------------

    def _start(self, name: str, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._in_torch, args=(target,), name=name, daemon=True)
        thread.start()
        return thread

    def _in_torch(self, target: Callable[[], None]) -> None:
        """Torch keeps these settings by thread."""
        torch.set_num_threads(self._threads)
        self._device.enter_thread()
        with torch.no_grad():
            target()

    def _work(self) -> None:
        while (run := self._deck.get()) is not None:
            self._performer.perform(run, self._repertoire.find, self._keep)
            for member in run.members:
                self._runs.pop(member.request_id, None)
            del run, member  # an idle thread keeps nothing alive

    def _keep(self, request_id: str, result: RunResult) -> None:
        self._runs.pop(request_id, None)
        self._results[request_id] = result

    def _prepare(self, name: str, build: Callable[[], Prepared]) -> None:
        started_at_s = self._clock()
        try:
            prepared = build()
        except Exception as error:  # noqa: BLE001  a task's boundary: libraries raise anything about bad files
            _log.exception("preparing model %s failed", name)
            self._note(PREPARE, name, started_at_s, FAILED)
            self._announcer.announce(ModelPreparationFailed(name, told_of_preparation(error)))
        else:
            self._note(PREPARE, name, started_at_s)
            self._announcer.announce(ModelPrepared(name, prepared.can_batch))

    def _note(
        self, lane: str, name: str, started_at_s: float, outcome: str = "", size_bytes: int = 0
    ) -> None:
        """For the timeline: what ends now."""
        self._record(Span(lane, name, started_at_s, self._clock(), size_bytes, outcome=outcome))

    def _build_views(self, blob: str, generation: int) -> None:
        started_at_s = self._clock()
        try:
            self._resident.build(blob, generation, self._repertoire.layouts(blob), self._breathe)
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("building the views of blob %s failed", blob)
            self._note(VIEWS, blob[:_SHOWN], started_at_s, FAILED)
            self._announcer.announce(ViewsFailed(blob, generation, f"{type(error).__name__}: {error}"))
        else:
            self._note(VIEWS, blob[:_SHOWN], started_at_s)
            self._announcer.announce(ViewsBuilt(blob, generation))

    def _work_on_folds(self) -> None:
        self._device.stand_back()
        torch.set_num_threads(1)
        _drain(self._fold_jobs)

    def _work_on_compiling(self) -> None:
        assert self._compiler is not None
        self._device.stand_back()
        self._compiler.work()

    def _fold(self, job: FoldJob) -> None:
        self._repertoire.learn(job.overlay, job.plan)
        started_at_s = self._clock()
        breathe = self._slices.take if self._device.device.type == "cpu" else self._breathing()
        outcome = job.run(self._arena, self._device, breathe, self._crew)
        self._slices.end()
        self._note(FOLD, job.label, started_at_s, _ENDINGS[type(outcome)], job.plan.size_bytes)
        del self._folds[job.overlay, job.generation]
        self._announcer.announce(outcome)

    def _move(self, blob: str, offset: int, to_offset: int, size_bytes: int, generation: int) -> None:
        started_at_s = self._clock()
        try:
            self._arena.move_down(offset, to_offset, size_bytes)
            self._device.wait(self._device.mark_last_use())
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("moving blob %s failed", blob)
            self._note(MOVE, blob[:_SHOWN], started_at_s, FAILED, size_bytes)
            self._announcer.announce(MoveFailed(blob, generation, f"{type(error).__name__}: {error}"))
        else:
            self._note(MOVE, blob[:_SHOWN], started_at_s, size_bytes=size_bytes)
            self._announcer.announce(ExtentMoved(blob, generation))

    def _breathe(self) -> None:
        """Let a computing thread have the interpreter; longer while there is one."""
        time.sleep(_BREATH_S if self._runs else 0)

    def _breathing(self) -> Callable[[], None]:
        """To be called more often than is worth a breath: takes one after every slice of work."""
        due_at_s = time.monotonic() + _SLICE_S

        def breathe_when_due() -> None:
            nonlocal due_at_s
            if time.monotonic() >= due_at_s:
                self._breathe()
                due_at_s = time.monotonic() + _SLICE_S

        return breathe_when_due


def _drain(jobs: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
