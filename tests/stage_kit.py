"""Shared by the stage's tests: a store of tiny models, a plain arena, a stage, and its events in order."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from understudy.trace import Span
from understudy_demo import tiny
from understudyd.core.events import Event, ImagesEncoded, LeaseEnded, ModelPrepared, RunEnded, ViewsBuilt
from understudyd.core.types import ErrorCode
from understudyd.stage.run import RunParams, RunResult
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.stage import Stage
from understudyd.store.ingest import ingest
from understudyd.store.records import BlobRecord, SignatureRecord
from understudyd.store.signature import Component
from understudyd.store.store import Store

torch.set_num_threads(1)

DEADLINE_S = 60.0
ALIGN_BYTES = 4096


class Family:
    """Source folders and the store they were ingested into."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "sources"
        self.store = Store.open(folder / "store", writable=True)
        self._dtypes: dict[str, str] = {}
        self._images: dict[tuple[Any, ...], list[bytes]] = {}

    def add(self, name: str, pipeline: Any, dtype: str = "fp32") -> str:
        source = tiny.save(pipeline, self.sources / name)
        ingest(self.store, name, source, dtype=dtype)
        self._dtypes[name] = dtype
        return name

    def plain_images(self, name: str, **params: Any) -> list[bytes]:
        """RGB bytes of what plain diffusers makes: `from_pretrained`, nothing of ours."""
        key = (name, *sorted(params.items()))
        if key not in self._images:
            self._images[key] = plain_images(self._plain(name), **params)
        return self._images[key]

    def _plain(self, name: str) -> Any:
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[self._dtypes[name]]
        pipeline = DiffusionPipeline.from_pretrained(self.sources / name, dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def two_models(folder: Path) -> Family:
    """Fine-tunes "a" and "b" of one architecture."""
    family = Family(folder)
    family.add("a", tiny.stable_diffusion(1))
    family.add("b", tiny.stable_diffusion(2))
    return family


@contextmanager
def rig_over(family: Family, *served: str) -> Iterator["Rig"]:
    """A stage over the family's store with these models at hand, closed at the end."""
    rig = Rig(family.store)
    try:
        rig.serve(*served)
        yield rig
    finally:
        rig.close()


class Rig:
    """A stage over a plain tensor as arena; every event in the order it was emitted."""

    def __init__(self, store: Store, arena_bytes: int = 32 << 20, compile_backend: Any = None) -> None:
        self.store = store
        self.arena = torch.empty(arena_bytes, dtype=torch.uint8)
        self.events: list[Event] = []
        self.progress: list[tuple[str, int, int]] = []
        self.spans: list[Span] = []
        self.on_progress: Callable[[str, int, int], None] = lambda request_id, step, steps: None
        self._changed = threading.Condition()
        self._free_at = 0
        self.offsets: dict[str, int] = {}
        self._requests = 0
        self.stage = Stage(
            self.arena,
            store,
            emit=self._emit,
            on_progress=self._on_progress,
            record=self.spans.append,
            compile_backend=compile_backend,
        )

    # -- what the core and the loaders would do ------------------------------------------------------

    def serve(self, *names: str) -> None:
        """Prepare the models and put all their blobs into the arena."""
        for name in names:
            self.stage.prepare_model(name)
            self.wait_until(lambda name=name: self.is_prepared(name), f"{name} prepared")
            for component in self.store.model(name).components:
                self.load(component.blob)

    def is_prepared(self, name: str) -> bool:
        return any(isinstance(e, ModelPrepared) and e.key == name for e in self.events)

    def load(self, blob: BlobRecord, generation: int = 1) -> None:
        if blob.sha256 in self.offsets:
            return
        self.offsets[blob.sha256] = self.fill(blob)
        self.stage.build_views(blob.sha256, self.offsets[blob.sha256], generation)
        self.wait_for(ViewsBuilt(blob.sha256, generation))

    def fill(self, blob: BlobRecord) -> int:
        """Read the blob's data to the next free offset."""
        offset = self._free_at
        data = self.store.blob_path(blob.sha256).read_bytes()[blob.data_start_bytes :]
        self.arena[offset : offset + blob.size_bytes] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._free_at += -(-blob.size_bytes // ALIGN_BYTES) * ALIGN_BYTES
        return offset

    # -- requests ------------------------------------------------------------------------------------

    def submit(self, model: str, **params: Any) -> str:
        self._requests += 1
        request_id = f"r{self._requests}"
        self.stage.put_on_deck(request_id, model, asked(**params))
        return request_id

    def run(self, model: str, **params: Any) -> RunResult:
        request_id = self.submit(model, **params)
        self.wait_for(ImagesEncoded(request_id))
        self.wait_for(LeaseEnded(request_id))
        return self.stage.take_result(request_id)

    def fail(self, model: str, **params: Any) -> RunEnded:
        return self.ended(self.submit(model, **params))

    def ended(self, request_id: str) -> RunEnded:
        """How the request ended, once its lease has ended too."""
        self.wait_for(LeaseEnded(request_id))
        return next(e for e in self.events if isinstance(e, RunEnded) and e.request_id == request_id)

    def cancel_at_step(self, request_id: str, step: int) -> None:
        """Cancel the request when it reports this step."""

        def cancel(reported_id: str, reported: int, steps: int) -> None:
            if (reported_id, reported) == (request_id, step):
                self.stage.cancel_run(request_id, ErrorCode.CANCELLED)

        self.on_progress = cancel

    def of(self, request_id: str) -> list[Event]:
        return [event for event in self.events if getattr(event, "request_id", None) == request_id]

    # -- looking -------------------------------------------------------------------------------------

    def skeleton(self, class_name: str) -> Skeleton:
        return next(s for s in self.stage.skeletons() if s.signature.class_name == class_name)

    def strays(self) -> list[str]:
        """Tensors that do not lie in the arena."""
        start = self.arena.data_ptr()
        addresses = range(start, start + self.arena.numel())
        return [path for skeleton in self.stage.skeletons() for path in skeleton.strays(addresses)]

    def wait_for(self, event: Event) -> None:
        self.wait_until(lambda: event in self.events, f"{event} in {self.events}")

    def wait_until(self, is_so: Callable[[], bool], what: str = "condition") -> None:
        with self._changed:
            assert self._changed.wait_for(is_so, DEADLINE_S), f"never came: {what}"

    def wait_until_waiting(self) -> None:
        """A request on deck has done all it can without the baton."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.stage.someone_waits():
            assert time.monotonic() < deadline_s, "nobody waits for the baton"
            threading.Event().wait(0.001)

    def close(self) -> None:
        self.stage.close()

    def _emit(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def _on_progress(self, request_id: str, step: int, steps: int) -> None:
        with self._changed:
            self.progress.append((request_id, step, steps))
            self._changed.notify_all()
        self.on_progress(request_id, step, steps)


def asked(**params: Any) -> RunParams:
    return RunParams(**{"prompt": "a red circle", "seed": 7, "steps": 2} | params)


def plain_images(pipeline: Any, **params: Any) -> list[bytes]:
    request = asked(**params)
    optional = {
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
    }
    images = pipeline(
        request.prompt,
        num_images_per_prompt=request.images,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        **{name: value for name, value in optional.items() if value is not None},
    ).images
    return [image.tobytes() for image in images]


def pixels(result: RunResult) -> list[bytes]:
    return [Image.open(BytesIO(data)).tobytes() for data in result.images]


def signature_of(module: torch.nn.Module) -> SignatureRecord:
    return Component("component", module).signature
