"""What a pipeline returned, told apart: images, clips of frames, or latents."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from understudyd.stage.errors import StageError
from understudyd.stage.video import DEFAULT_FPS

_OUTPUT_NAMES = ("frames", "video", "videos", "images", "image")
_MODES = ("L", "RGB", "RGBA")


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a pipeline's call.

    `value` is a tensor or array, or lists of these or of PIL images. Pictures have the shape
    [N, channels, height, width] as tensors and [N, height, width, channels] as arrays, 0 to 1, videos one
    dimension more in front. Latents are whatever the pipeline computes with, the batch first. `fps` are the
    frames per second at which a video should be shown.
    """

    value: Any
    is_video: bool
    fps: float = DEFAULT_FPS

    def on_host(self, copy: Callable[[Any], Any]) -> "Made":
        """The same with every tensor copied by `copy`."""
        return replace(self, value=_each_tensor(self.value, copy))


def find_made(output: Any, fps: float = DEFAULT_FPS) -> Made:
    """The images or frames in a pipeline's output object. Raises `StageError` when there are none."""
    for name in _OUTPUT_NAMES:
        value = getattr(output, name, None)
        if value is not None:
            return Made(value, name in ("frames", "video", "videos"), fps)
    raise StageError(f"the pipeline gave {type(output).__name__}, which holds neither images nor frames")


def clips(made: Made) -> list[list[Image.Image]]:
    """Pictures by clip; those of an image pipeline are one clip, unless it gave a list of lists.

    The conversion is diffusers' own: equal to its PIL output, bit for bit.
    """
    return [[_plain(picture) for picture in clip] for clip in _clips(made.value)]


def latents(made: Made) -> Iterator[NDArray[Any]]:
    """One C-contiguous array for each image or clip; bfloat16, which numpy lacks, becomes float32."""
    if not isinstance(made.value, Tensor | np.ndarray | list | tuple):
        raise StageError(f"the pipeline gave {type(made.value).__name__}, not latents")
    for item in made.value:
        tensor = torch.as_tensor(item).detach().cpu()
        yield (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _clips(value: Any) -> list[list[Image.Image]]:
    if isinstance(value, Image.Image):
        return [[value]]
    if isinstance(value, Tensor | np.ndarray):
        return _clips(list(value)) if value.ndim == 5 else [_from_array(value)]
    if not isinstance(value, list | tuple):
        raise StageError(f"the pipeline gave {type(value).__name__}, not pictures")
    if all(_is_picture(item) for item in value):
        return [[picture for item in value for clip in _clips(item) for picture in clip]]
    return [[picture for clip in _clips(item) for picture in clip] for item in value]


def _is_picture(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 3)


def _from_array(value: Any) -> list[Image.Image]:
    if value.ndim not in (3, 4):
        raise StageError(f"the pipeline gave an array of shape {tuple(value.shape)}, not pictures")
    if isinstance(value, Tensor):
        value = VaeImageProcessor.pt_to_numpy(value if value.ndim == 4 else value[None])
    if value.dtype == np.uint8:
        return [Image.fromarray(rows) for rows in (value if value.ndim == 4 else value[None])]
    return list(VaeImageProcessor.numpy_to_pil(value))


def _plain(picture: Image.Image) -> Image.Image:
    return picture if picture.mode in _MODES else picture.convert("RGB")


def _each_tensor(value: Any, copy: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return copy(value)
    return [_each_tensor(item, copy) for item in value] if isinstance(value, list | tuple) else value
