"""Compiling blocks beside the stage, with weights and inputs that are nobody's.

A thread of its own compiles what runs have noted: on a second skeleton of the signature whose tensors all
lie over one small piece of memory, called with zeros of the noted forms. What dynamo makes of that serves
every fine-tune and overlay, as its guards ask for dtypes and layouts and not for identities or addresses. It
computes under the stage's own settings (no gradients, number of threads), which guards ask for, too.

Sizes are dynamic, each by itself: two that happen to be equal (square images) must not be tied together.
Dynamo makes code of its own for sizes of 1, so each form is compiled for batches of one and of more.

`torch._dynamo` and `torch._inductor` are imported when something is compiled, not before.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from queue import SimpleQueue
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from understudy.trace import COMPILE, FAILED, Record, Span
from understudyd.stage.compile_report import CompileReport
from understudyd.stage.regions import CompiledBlocks, Form, Region, example, is_denoiser
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import BlobViews, WeightArena
from understudyd.store.records import SignatureRecord, TensorRecord

_log = logging.getLogger(__name__)

INDUCTOR = "inductor"
_BATCHES = (2, 1)
_REASON_CHARS = 300
_OPTIONS = {"freezing": False, "triton.cudagraphs": False}
"""Both bake addresses of weights into what they make, whatever the environment says."""


class CompileFailure(StrEnum):
    """Why a component is served uncompiled."""

    NO_COMPILER = "no_compiler"
    UNSUPPORTED = "unsupported"
    BACKEND = "backend"
    OUT_OF_MEMORY = "out_of_memory"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class _Job:
    signature: SignatureRecord
    blocks: CompiledBlocks
    noted: list[tuple[Region, Form]]


class Compiler:
    """Compiles for one stage. `work` is for its thread, `close` ends it, all else is for any thread."""

    def __init__(
        self,
        device: torch.device,
        backend: str | Callable[..., Any] = INDUCTOR,
        record: Record = lambda span: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`backend` is torch.compile's."""
        self._device = device
        self._backend = backend
        self._record = record
        self._clock = clock
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._pending = 0
        self._is_closed = False
        self._graphs = 0
        self._compile_s = 0.0
        self._recompiles = 0
        self._failures: dict[str, str] = {}

    def open(self, signature: SignatureRecord, module: nn.Module) -> CompiledBlocks | None:
        """What the skeleton of this signature calls its blocks through; None for what is not compiled."""
        if not is_denoiser(module):
            return None
        blocks = CompiledBlocks(module, lambda blocks, noted: self._submit(_Job(signature, blocks, noted)))
        return blocks if blocks.regions else None

    def report(self) -> CompileReport:
        """What there is so far."""
        with self._changed:
            return CompileReport(
                self._graphs, self._compile_s, self._recompiles, self._pending, dict(self._failures)
            )

    def wait(self) -> None:
        """Block until everything that was noted is compiled, or the compiler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not self._pending)

    def close(self) -> None:
        """Begin nothing any more; `work` returns after the graph in hand."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._jobs.put(None)

    def work(self) -> None:
        """Compile what comes, until `close`."""
        while (job := self._jobs.get()) is not None:
            if not self._is_closed:
                self._compile(job)
            with self._changed:
                self._pending -= 1
                self._changed.notify_all()
            del job

    def _submit(self, job: _Job) -> None:
        with self._changed:
            self._pending += 1
        self._jobs.put(job)

    def _compile(self, job: _Job) -> None:
        started_at_s = self._clock()
        name, blocks = job.signature.class_name, job.blocks
        outcome, made = "", 0
        try:
            module = _stencil(job.signature, self._device)
            for region, form in job.noted:
                if self._is_closed:
                    return
                made += self._compile_form(job, module, region, form)
        except Exception as error:  # noqa: BLE001  a task's boundary: compilers raise anything
            outcome = FAILED
            self._fail(name, blocks, error)
        else:
            blocks.is_ready = True
        seconds = self._clock() - started_at_s
        self._record(Span(COMPILE, name, started_at_s, self._clock(), outcome=outcome))
        with self._changed:
            self._graphs += made
            self._compile_s += seconds
        if made and not outcome:
            _log.info("compiled %d graphs of %s in %.1f s", made, name, seconds)

    def _compile_form(self, job: _Job, module: nn.Module, region: Region, form: Form) -> int:
        """Graphs made. The first is made for other batches, too; any after the first job is one too many."""
        block = module.get_submodule(form.path)
        is_first = not region.has_code
        before = _graphs_of(region)
        self._call(region, block, *example(form, self._device))
        if is_first:
            for batch in _BATCHES:
                self._try_batch(region, block, form, batch)
        made = _graphs_of(region) - before
        if job.blocks.is_ready and made and not is_first:
            self._tell_recompile(job.signature.class_name, region)
        region.has_code = True
        return made

    def _call(self, region: Region, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Dynamo compiles what is called; the numbers that come out are nobody's."""
        import torch.fx.experimental._config as symbols

        options = _OPTIONS if self._backend == INDUCTOR else None
        compiled = torch.compile(
            region.function, fullgraph=True, dynamic=True, backend=self._backend, options=options
        )
        with symbols.patch(use_duck_shape=False):
            compiled(block, *args, **kwargs)

    def _try_batch(self, region: Region, block: nn.Module, form: Form, batch: int) -> None:
        """Another batch is a guess: what takes its axis 0 for something else is left as it is."""
        try:
            self._call(region, block, *example(form, self._device, batch))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            _log.debug("%s is not compiled for batches of %d: %s", region.label, batch, error)

    def _tell_recompile(self, name: str, region: Region) -> None:
        with self._changed:
            self._recompiles += 1
        _log.warning("%s.%s was compiled again: %s", name, region.label, _last_reason())

    def _fail(self, name: str, blocks: CompiledBlocks, error: Exception) -> None:
        why = reason_of(error)
        text = str(error).strip()[:_REASON_CHARS]
        if blocks.is_ready:
            _log.warning("%s is not compiled for one more form (%s): %s", name, why, text)
            return
        blocks.has_failed = True
        with self._changed:
            self._failures[name] = str(why)
        _log.error("%s cannot be compiled (%s); it is served without: %s", name, why, text)
        _log.debug("compiling %s", name, exc_info=error)


def reason_of(error: BaseException) -> CompileFailure:
    """The kind of the first cause that has one."""
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported, UserError
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    kinds: Counter[CompileFailure] = Counter()
    seen: BaseException | None = error
    while seen is not None:
        match seen:
            case InvalidCxxCompiler() | CppCompileError() | FileNotFoundError():
                return CompileFailure.NO_COMPILER
            case torch.OutOfMemoryError() | MemoryError():
                return CompileFailure.OUT_OF_MEMORY
            case Unsupported() | UserError():
                kinds[CompileFailure.UNSUPPORTED] += 1
            case BackendCompilerFailed() | InductorError():
                kinds[CompileFailure.BACKEND] += 1
        seen = getattr(seen, "inner_exception", None) or seen.__cause__ or seen.__context__
    return next(iter(kinds), CompileFailure.UNKNOWN)


class _OneTensorsRoom(WeightArena):
    """Every tensor at the same place: no room for weights is needed to compile."""

    def __init__(self, signature: SignatureRecord, device: torch.device) -> None:
        largest = max((record.size_bytes for record in signature.tensors), default=0)
        super().__init__(torch.zeros(-(-max(largest, 1) // 16) * 16, dtype=torch.uint8, device=device))

    def tensor(self, record: TensorRecord, extent_offset: int) -> Tensor:
        """The record's shape and dtype."""
        return super().tensor(replace(record, offset=0), 0)


def _stencil(signature: SignatureRecord, device: torch.device) -> nn.Module:
    """A module that is built and bound as the served one is."""
    skeleton = Skeleton(signature, device=device)
    room = _OneTensorsRoom(signature, device)
    skeleton.bind(BlobViews.build(room, signature, 0, lambda: None))
    return skeleton.module


def _graphs_of(region: Region) -> int:
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    return len(_debug_get_cache_entry_list(region.function.__code__))


def _last_reason() -> str:
    """Why dynamo compiled what it compiled last, in its words."""
    from torch._dynamo.utils import get_compilation_metrics

    reasons = [m.recompile_reason for m in get_compilation_metrics() if m.recompile_reason]
    return reasons[-1][:_REASON_CHARS] if reasons else "dynamo does not say why"
