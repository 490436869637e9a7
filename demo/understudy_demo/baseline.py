"""The same requests without Understudy: one process that calls `from_pretrained` for every switch.

It is what an honest small server does: it keeps the pipeline while the model does not change, drops it before
the next one is read, and computes with as many threads as the daemon's stage. Its images are also what
the daemon's must equal, bit for bit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from transformers.utils import logging as transformers_logging

from understudy.trace import Span
from understudy_demo.measure import Served
from understudy_demo.workload import Request

OnServed = Callable[[Served], None]


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """`images[i]` is the picture of the request with index i; `spans` has lanes "stage" and "load"."""

    served: list[Served]
    images: dict[int, Image]
    spans: list[Span]


def quiet() -> None:
    """No progress bars from the libraries: the demo has its own."""
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()


def load(folder: Path, **options: Any) -> Any:
    """A pipeline as diffusers makes it; `options` are those of `from_pretrained`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, request: Request) -> Image:
    """The one image of a request, with every option that is not asked for at the pipeline's default."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    guidance = {} if request.guidance is None else {"guidance_scale": request.guidance}
    image: Image = pipeline(
        prompt=request.prompt,
        num_inference_steps=request.steps,
        width=request.width,
        height=request.height,
        generator=generator,
        **guidance,
    ).images[0]
    return image


def image_time_s(folder: Path, request: Request, repeats: int = 7) -> float:
    """The time of an image on a warm pipeline when nothing disturbs it."""
    pipeline = load(folder)
    paint(pipeline, request)
    times_s = []
    for _ in range(repeats):
        started_s = time.monotonic()
        paint(pipeline, request)
        times_s.append(time.monotonic() - started_s)
    return min(times_s)


class Baseline:
    """Serves requests first come, first served. `folders` are diffusers folders by model name."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self._model = ""
        self._pipeline: Any = None

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Serve these without counting them, as the daemon warms each architecture before it is ready."""
        for request in requests:
            self._bring(request.model)
            paint(self._pipeline, request)

    def run(self, requests: Sequence[Request], on_served: OnServed = lambda served: None) -> BaselineRun:
        """Serve requests at their times of arrival, or as soon after as it can."""
        run = BaselineRun([], {}, [])
        origin_s = time.monotonic()
        for request in requests:
            arrived_s = origin_s + request.at_s
            if (early_s := arrived_s - time.monotonic()) > 0:
                time.sleep(early_s)
            run.served.append(self._serve(request, arrived_s, run))
            on_served(run.served[-1])
        return run

    def _serve(self, request: Request, arrived_s: float, run: BaselineRun) -> Served:
        found_s = time.monotonic()
        switched = self._bring(request.model)
        started_s = time.monotonic()
        run.images[request.index] = paint(self._pipeline, request)
        ended_s = time.monotonic()
        if switched:
            run.spans.append(Span("load", request.model, found_s, started_s))
        run.spans.append(Span("stage", request.model, started_s, ended_s))
        tier = "disk" if switched else "bound"
        return Served(request.index, request.model, tier, sent_s=arrived_s, ended_s=ended_s)

    def _bring(self, model: str) -> bool:
        if model == self._model:
            return False
        self._pipeline = None  # an honest program does not hold two
        self._pipeline, self._model = load(self._folders[model]), model
        return True
