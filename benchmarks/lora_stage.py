"""Changes of adapters on the real stage: part of `python -m benchmarks.lora` and of the GPU check.

One model of real size and two models derived from it, adapters of rank 16 and 64 folded
beside it by the stage. Requests alternate between the two; each is stopped at its first stage operation, with
everything bound, as in `benchmarks.switch`.

* `visible_switch_ms_*`: from the end of one request's last stage operation to the first one of the next.
* `stage_fold_ms_*`: a fold asked of the idle stage, until the event comes; `views_ms_*`: its overlay's views.
* `step_ms`, `step_beside_fold_ms`: a call of the UNet inside a run, for two images of the model's size, alone
  and with a whole fold beside it; `fold_beside_step_ms`: how long that took.

After each change every tensor is looked up: it must lie in the overlay where there is one, else in the base.
"""

import gc
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit import percentile
from benchmarks.real_size import Architecture, RealSizeStore
from understudy.trace import Span
from understudyd.core.events import Event, FoldFinished, LeaseEnded, ModelPrepared, RunStarted, ViewsBuilt
from understudyd.core.types import ErrorCode
from understudyd.stage.run import RunParams
from understudyd.stage.stage import Stage
from understudyd.store.adapters.overlays import AppliedAdapter, OverlaidComponent, plan_overlays
from understudyd.store.adapters.records import AdapterRecord

SETTLE_S = 0.002
TIMEOUT_S = 900.0
BASE = "base"


class WrongBind(Exception):
    """A slot holds another tensor than it should."""


class LoraTheatre:
    """The base, adapters and their overlays in an arena, and a stage over them."""

    def __init__(
        self,
        architecture: Architecture,
        adapters: Sequence[tuple[AdapterRecord, Path]],
        folder: Path,
        *,
        threads: int = 1,
        device: str = "cpu",
        make_arena: Callable[[int], Tensor] = lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8),
    ) -> None:
        """`adapters` and the files that hold their factors. `make_arena` is on `device`."""
        self._store = RealSizeStore(architecture, (BASE,), folder)
        signature = architecture.signatures["unet"]
        record = self._store.model(BASE)
        base_blob = next(c.blob.sha256 for c in record.components if c.name == "unet")
        plans = [plan_overlays({"unet": signature}, [AppliedAdapter(a, 1.0)])[0] for a, _ in adapters]
        self._overlays = {
            a.name: OverlaidComponent(plan.key(base_blob), plan, base_blob)
            for (a, _), plan in zip(adapters, plans, strict=True)
        }
        self.names = list(self._overlays)
        self.arena = make_arena(arena_bytes(architecture, adapters))
        self._changed = threading.Condition()
        self._seen: set[Event] = set()
        self._generations = itertools.count(2)
        self._requests = itertools.count()
        self.spans: list[Span] = []
        self.stage = Stage(
            self.arena,
            self._store,
            device=device,
            threads=threads,
            emit=self._emit,
            record=self.spans.append,
        )
        self._offsets: dict[str, int] = {}
        self._fill(architecture.dtype, adapters)
        self.stage.prepare_model(BASE)
        self._wait(ModelPrepared(BASE, True))
        for name, overlay in self._overlays.items():
            self.stage.prepare_derived(name, BASE, {"unet": overlay})
            self._wait(ModelPrepared(name, True))

    def _fill(self, dtype: torch.dtype, adapters: Sequence[tuple[AdapterRecord, Path]]) -> None:
        block = (0.02 * torch.randn(1 << 20)).to(dtype).view(torch.uint8)
        offset = 0
        for component in self._store.model(BASE).components:
            size_bytes = component.blob.size_bytes
            for piece in self.arena[offset : offset + size_bytes].split(block.numel()):
                piece.copy_(block[: piece.numel()])
            self._offsets[component.blob.sha256] = offset
            self.stage.build_views(component.blob.sha256, offset, 1)
            self._wait(ViewsBuilt(component.blob.sha256, 1))
            offset += size_bytes
        for adapter, path in adapters:
            data = path.read_bytes()[adapter.blob.data_start_bytes :]
            extent = self.arena[offset : offset + adapter.blob.size_bytes]
            extent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self._offsets[adapter.blob.sha256] = offset
            offset += adapter.blob.size_bytes
        for overlay in self._overlays.values():
            self._offsets[overlay.key] = offset
            offset += overlay.plan.size_bytes
        synchronise(self.arena.device)

    # -- folds -------------------------------------------------------------------------------------

    def fold(self, name: str) -> float:
        """Ask for a fold and wait for it; milliseconds."""
        overlay = self._overlays[name]
        key, generation = overlay.key, next(self._generations)
        sources = [overlay.base_blob, *(a.record.blob.sha256 for a in overlay.plan.adapters)]
        started_s = time.perf_counter()
        offsets = [(source, self._offsets[source]) for source in sources]
        self.stage.fold(key, generation, self._offsets[key], overlay.plan, offsets)
        self._wait(FoldFinished(key, generation))
        return (time.perf_counter() - started_s) * 1e3

    def show(self, name: str) -> float:
        """Build the views of a folded overlay; milliseconds until they are there."""
        key, generation = self._overlays[name].key, next(self._generations)
        started_s = time.perf_counter()
        self.stage.build_views(key, self._offsets[key], generation)
        self._wait(ViewsBuilt(key, generation))
        return (time.perf_counter() - started_s) * 1e3

    # -- requests ----------------------------------------------------------------------------------

    def switch(self, models: Sequence[str]) -> list[float]:
        """Request the models in turn, back to back; the visible switches between them in milliseconds."""
        self.spans.clear()
        last = len(models) - 1
        playing = enumerate(models)

        def look_and_stop(request_id: str) -> None:
            number, model = next(playing)
            self._check(model)
            while number != last and not self.stage.someone_waits():
                time.sleep(SETTLE_S / 10)
            time.sleep(SETTLE_S)

        self._run(models, look_and_stop)
        runs = [(span.start_s, span.end_s) for span in self.spans if span.lane == "stage"]
        return [(after[0] - before[1]) * 1e3 for before, after in itertools.pairwise(runs)]

    def on_stage(self, act: Callable[[Any], None]) -> None:
        """Run one request of the base whose first operation is `act(unet)`."""
        unet = next(s for s in self.stage.skeletons() if s.signature.class_name.startswith("UNet"))
        self._run([BASE], lambda request_id: act(unet.module))

    def _run(self, models: Sequence[str], act: Callable[[str], None]) -> None:
        order = [f"r{next(self._requests)}" for _ in models]
        playing = iter(order)

        def stop_here(_module: Any, _args: Any) -> None:
            request_id = next(playing)
            act(request_id)
            self.stage.cancel_run(request_id, ErrorCode.CANCELLED)  # the next checkpoint is a call away

        encoder = next(s for s in self.stage.skeletons() if s.signature.class_name.startswith("CLIP"))
        hook = encoder.module.register_forward_pre_hook(stop_here)
        try:
            for request_id, model in zip(order, models, strict=True):
                self.stage.put_on_deck(request_id, model, RunParams(prompt="a red circle", seed=1))
                self._wait(RunStarted(request_id))
            self._wait(LeaseEnded(order[-1]))
        finally:
            hook.remove()

    def _check(self, model: str) -> None:
        """Every tensor of the UNet is where this model has it."""
        unet = next(s for s in self.stage.skeletons() if s.signature.class_name.startswith("UNet"))
        start = self.arena.data_ptr()
        overlay = self._overlays.get(model)
        base_offset = self._offsets[next(iter(self._overlays.values())).base_blob]
        places = {record.path: base_offset + record.offset for record in unet.signature.tensors}
        if overlay is not None:
            offset = self._offsets[overlay.key]
            places |= {w.base.path: offset + w.folded.offset for w in overlay.plan.weights}
        for record, tensor in unet.tensors():
            if tensor.data_ptr() - start != places[record.path]:
                raise WrongBind(f"{model}: {record.path} is bound to another place")

    def _emit(self, event: Event) -> None:
        with self._changed:
            self._seen.add(event)
            self._changed.notify_all()

    def _wait(self, event: Event) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: event in self._seen, TIMEOUT_S):
                raise TimeoutError(f"never came: {event}")


def synchronise(device: torch.device) -> None:
    """The device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arena_bytes(architecture: Architecture, adapters: Sequence[tuple[AdapterRecord, Path]]) -> int:
    """What a theatre takes."""
    signature = architecture.signatures["unet"]
    plans = (plan_overlays({"unet": signature}, [AppliedAdapter(a, 1.0)])[0] for a, _ in adapters)
    overlays = sum(plan.size_bytes for plan in plans)
    return architecture.size_bytes + sum(a.blob.size_bytes for a, _ in adapters) + overlays


def measure_stage(theatre: LoraTheatre, switches: int, calls: int) -> dict[str, float]:
    """Medians in milliseconds, of changes between the two adapters; see the module. No `calls`, no steps."""
    names = theatre.names
    folds: dict[str, float] = {}
    for name in names:
        theatre.fold(name)  # first touch of the overlay's pages
        folds[f"stage_fold_ms_{name}"] = statistics.median(theatre.fold(name) for _ in range(7))
        folds[f"views_ms_{name}"] = statistics.median(theatre.show(name) for _ in range(7))
    gc.collect()
    gc.freeze()  # as the daemon does once it has started
    try:
        theatre.switch([names[i % 2] for i in range(6)])
        hot = theatre.switch([names[i % 2] for i in range(switches + 1)])
        back = theatre.switch([(names[0], BASE)[i % 2] for i in range(switches // 2 + 1)])
    finally:
        gc.unfreeze()
    return {
        "visible_switch_ms_p50": statistics.median(hot),
        "visible_switch_ms_p99": percentile(hot, 99),
        "visible_to_base_ms_p50": statistics.median(back),
        **folds,
        **(_steps(theatre, names[-1], calls) if calls else {}),
    }


def _steps(theatre: LoraTheatre, name: str, calls: int) -> dict[str, float]:
    """Steps alone and with one fold each in turn, so that a busy machine tells on both."""
    alone: list[float] = []
    beside: list[float] = []
    folds: list[float] = []

    def call(unet: Any) -> float:
        given = _inputs(unet)
        started_s = time.perf_counter()
        unet(**given)
        if unet.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not the fold's
        return (time.perf_counter() - started_s) * 1e3

    def act(unet: Any) -> None:
        call(unet)
        for _ in range(calls):
            alone.append(call(unet))
            folder = threading.Thread(target=lambda: folds.append(theatre.fold(name)))
            folder.start()
            beside.append(call(unet))
            folder.join()

    theatre.on_stage(act)
    return {
        "step_ms": statistics.median(alone),
        "step_beside_fold_ms": statistics.median(beside),
        "fold_beside_step_ms": statistics.median(folds),
    }


def _inputs(unet: Any) -> dict[str, Any]:
    """What a step gives a UNet of either architecture, for two images."""
    config, like = unet.config, {"dtype": unet.dtype, "device": unet.device}
    given: dict[str, Any] = {
        "sample": torch.zeros(2, 4, config.sample_size, config.sample_size, **like),
        "timestep": 1,
        "encoder_hidden_states": torch.zeros(2, 77, config.cross_attention_dim, **like),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        times, text = torch.zeros(2, 6, **like), torch.zeros(2, width, **like)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": times}
    return given
