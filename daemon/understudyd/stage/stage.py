"""The stage: what the event loop says to the computing threads, and the threads.

The methods are called from the event loop's thread and never block; answers come through `emit`, from other
threads. Lifetimes are the core's business: it puts a request on deck only when its model is prepared
and all its blobs have views, and drops views only when no lease is left.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from understudyd.core.events import (
    Event,
    ExtentMoved,
    ModelPreparationFailed,
    ModelPrepared,
    MoveFailed,
    ViewsBuilt,
    ViewsFailed,
)
from understudyd.core.types import ErrorCode
from understudyd.pipelines.installed import PipelineUnavailable
from understudyd.stage.baton import Baton
from understudyd.stage.custom import blaming, prepare_custom
from understudyd.stage.custom_classes import CustomClasses, is_custom
from understudyd.stage.device import open_device
from understudyd.stage.errors import NotPrepared, StageError
from understudyd.stage.parts import PartShelf
from understudyd.stage.performer import Announcer, Performer, Prepared
from understudyd.stage.run import Member, Run, RunParams, RunResult
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import ResidentBlobs, WeightArena
from understudyd.stage.wrapper import PreparedModel, prepare
from understudyd.store.records import ModelRecord, SignatureRecord

_log = logging.getLogger(__name__)

WORKERS = 4
"""One computes, one is on deck, the others encode."""

_BREATH_S = 0.0005
_JOIN_S = 30.0

NOBODY: Mapping[str, RunParams] = MappingProxyType({})

Emit = Callable[[Event], None]
"""Give the core an event; callable from any thread."""

RecordSpan = Callable[[str, str, float, float], None]
"""`record(lane, name, started_at_s, ended_at_s)`; callable from any thread."""

OnProgress = Callable[[str, int, int], None]
"""`on_progress(request_id, step, steps)`; called from the computing thread, so it must be quick."""


class ModelStore(Protocol):
    """What the stage reads of the store, from threads of its own."""

    def model(self, name: str) -> ModelRecord:
        """One model's record."""

    def models(self) -> dict[str, ModelRecord]:
        """Every model that is served; must be cheap."""

    def signature(self, signature_id: str) -> SignatureRecord:
        """A component's shape."""

    def model_folder(self, name: str) -> Path:
        """Where the small files are."""


class Stage:
    """Runs pipelines over weights in the arena. `close` ends its threads."""

    def __init__(
        self,
        arena: Tensor,
        store: ModelStore,
        *,
        device: str = "cpu",
        threads: int = 1,
        emit: Emit,
        on_progress: OnProgress = lambda request_id, step, steps: None,
        record: RecordSpan = lambda lane, name, started_at_s, ended_at_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`arena` is all of it, shape [bytes], uint8, on `device`; `threads` are torch's, on the CPU."""
        self._store = store
        self._threads = threads
        self._clock = clock
        self._device = open_device(device)
        self._announcer = Announcer(emit)
        self._arena = WeightArena(arena)
        self._resident = ResidentBlobs(self._arena)
        self._performer = Performer(self._resident, self._device, self._announcer, on_progress, record, clock)
        self._baton = Baton()
        self._shelf = PartShelf()
        self._skeletons: WeakValueDictionary[tuple[str, int], Skeleton] = WeakValueDictionary()
        self._custom = CustomClasses()
        self._prepared: dict[str, Prepared] = {}
        self._signatures_of: dict[str, dict[str, SignatureRecord]] = {}  # by blob, then by id
        self._runs: dict[str, Run] = {}
        self._results: dict[str, RunResult] = {}
        self._deck: SimpleQueue[Run | None] = SimpleQueue()
        self._chores: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._view_jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._is_closed = False
        self._workers = [self._start(f"stage-{i}", self._work) for i in range(WORKERS)]
        self._workers.append(self._start("stage-prepare", lambda: _drain(self._chores)))
        self._workers.append(self._start("stage-views", lambda: _drain(self._view_jobs)))

    # -- models ------------------------------------------------------------------------------------

    def start_custom_classes(self) -> None:
        """Import the installed classes that models of the store are of, and start them. Blocks.

        One that fails is logged; its models fail when they are prepared.
        """
        names = {model.pipeline_class for model in self._store.models().values() if is_custom(model)}
        is_done = threading.Event()
        self._chores.put(lambda: self._start_custom(sorted(names), is_done))
        is_done.wait()

    def prepare_model(self, name: str) -> None:
        """Build what requests need besides weights. Ends in `ModelPrepared` or `ModelPreparationFailed`."""
        self._chores.put(lambda: self._prepare(name))

    def forget_model(self, name: str) -> None:
        """Drop the model's parts, and its skeletons if no other model uses them."""
        self._chores.put(lambda: self._forget(name))

    def skeletons(self) -> list[Skeleton]:
        """Every skeleton alive: for tests, checks and measurements."""
        return list(self._skeletons.values())

    def tasks(self, name: str) -> list[str]:
        """What a request may name as the task of a prepared model; none for a custom pipeline."""
        prepared = self._prepared.get(name)
        return list(prepared.tasks) if isinstance(prepared, PreparedModel) else []

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
        for _ in range(WORKERS):
            self._deck.put(None)
        self._chores.put(None)
        self._view_jobs.put(None)
        for thread in self._workers:
            thread.join(_JOIN_S)

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
            self._performer.perform(run, self._find, self._keep)
            for member in run.members:
                self._runs.pop(member.request_id, None)
            del run, member  # an idle thread keeps nothing alive

    def _keep(self, request_id: str, result: RunResult) -> None:
        self._runs.pop(request_id, None)
        self._results[request_id] = result

    def _find(self, name: str) -> Prepared:
        try:
            return self._prepared[name]
        except KeyError as error:
            raise NotPrepared(f"model {name} is not prepared") from error

    def _prepare(self, name: str) -> None:
        try:
            model = self._store.model(name)
            self._remember_signatures(model)
            self._prepared[name] = self._assemble(model, self._store.model_folder(name))
        except Exception as error:  # noqa: BLE001  a task's boundary: libraries raise anything about bad files
            _log.exception("preparing model %s failed", name)
            self._announcer.announce(ModelPreparationFailed(name, f"{type(error).__name__}: {error}"))
        else:
            self._announcer.announce(ModelPrepared(name, self._prepared[name].can_batch))

    def _assemble(self, model: ModelRecord, folder: Path) -> Prepared:
        device = self._device.device
        if not is_custom(model):
            return prepare(model, folder, self._skeletons_of(model), self._shelf, device)
        pipeline_class = self._custom.start(model.pipeline_class)
        with blaming(model.pipeline_class):
            return prepare_custom(model, folder, pipeline_class, self._skeletons_of(model), device)

    def _start_custom(self, names: Sequence[str], is_done: threading.Event) -> None:
        for name in names:
            try:
                self._custom.start(name)
            except PipelineUnavailable as error:
                _log.error("no model of the pipeline %s can be served: %s", name, error)
        is_done.set()

    def _forget(self, name: str) -> None:
        prepared = self._prepared.pop(name, None)
        for component in prepared.components if prepared is not None else ():
            self._signatures_of.pop(component.blob, None)  # found again, if another model has the blob

    def _skeletons_of(self, model: ModelRecord) -> dict[str, Skeleton]:
        """By component. Two components of one signature need a skeleton each."""
        uses: Counter[str] = Counter()
        skeletons: dict[str, Skeleton] = {}
        for component in model.components:
            uses[component.signature] += 1
            skeletons[component.name] = self._skeleton(component.signature, uses[component.signature])
        return skeletons

    def _skeleton(self, signature_id: str, use: int) -> Skeleton:
        skeleton = self._skeletons.get((signature_id, use))
        if skeleton is None:
            signature = self._store.signature(signature_id)
            skeleton = Skeleton(signature, self._performer.touch, self._device.device)
            self._skeletons[signature_id, use] = skeleton
        return skeleton

    def _build_views(self, blob: str, generation: int) -> None:
        try:
            self._resident.build(blob, generation, self._signatures(blob), self._breathe)
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("building the views of blob %s failed", blob)
            self._announcer.announce(ViewsFailed(blob, generation, f"{type(error).__name__}: {error}"))
        else:
            self._announcer.announce(ViewsBuilt(blob, generation))

    def _move(self, blob: str, offset: int, to_offset: int, size_bytes: int, generation: int) -> None:
        try:
            self._arena.move_down(offset, to_offset, size_bytes)
            self._device.wait(self._device.mark_last_use())
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("moving blob %s failed", blob)
            self._announcer.announce(MoveFailed(blob, generation, f"{type(error).__name__}: {error}"))
        else:
            self._announcer.announce(ExtentMoved(blob, generation))

    def _breathe(self) -> None:
        """Let a computing thread have the interpreter; longer while there is one."""
        time.sleep(_BREATH_S if self._runs else 0)

    def _signatures(self, blob: str) -> list[SignatureRecord]:
        """What the blob is used as; a load may finish before its model is prepared."""
        if blob not in self._signatures_of:
            for model in self._store.models().values():
                self._remember_signatures(model)
        if blob not in self._signatures_of:
            raise StageError(f"no model of the store uses blob {blob[:12]}")
        return list(self._signatures_of[blob].values())

    def _remember_signatures(self, model: ModelRecord) -> None:
        for component in model.components:
            known = self._signatures_of.setdefault(component.blob.sha256, {})
            known[component.signature] = self._store.signature(component.signature)


def _drain(jobs: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
