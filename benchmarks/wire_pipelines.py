"""Two pipelines of no use: one that makes nothing, one that notes how long its steps take.

`wire_scene` installs them for the daemon under test, as somebody's package would be installed.
"""

import time
from array import array
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.real_size import sd15
from understudyd.pipelines import CustomPipeline, Request

LATENT_PX = 16
TOKENS = 77


class Nothing(CustomPipeline):
    """A grey image that was there before."""

    @classmethod
    def components(cls, config: dict[str, Any]) -> Mapping[str, Callable[[], nn.Module]]:
        return {"gate": partial(nn.Linear, 8, 8)}

    def __call__(self, request: Request) -> list[Image.Image]:
        self.modules["gate"](_eight())  # on stage, as every pipeline must be
        return [_grey(request.width or 8, request.height or 8)]


class Steps(CustomPipeline):
    """A narrow UNet of Stable Diffusion 1.5: as many modules as the real one, little arithmetic.

    So most of a step is the interpreter's, as it is where a GPU computes: what disturbs it shows. The picture
    is the moments at which steps ended, `time.perf_counter()`: a line of grey pixels, eight to a float64.
    """

    @classmethod
    def components(cls, config: dict[str, Any]) -> Mapping[str, Callable[[], nn.Module]]:
        return {"unet": sd15(narrow=True).builders["unet"]}

    def __call__(self, request: Request) -> list[Image.Image]:
        steps = request.steps or 10
        latents = torch.randn(1, 4, LATENT_PX, LATENT_PX, generator=request.generator())
        text = torch.zeros(1, TOKENS, 64)
        at_s = array("d")
        for done in range(steps):
            latents = self.modules["unet"](latents, 500, text).sample
            request.step(done + 1, steps)
            at_s.append(time.perf_counter())
        return [Image.frombytes("L", (8 * steps, 1), at_s.tobytes())]


@cache
def _eight() -> Tensor:
    return torch.zeros(8)


@cache
def _grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))
