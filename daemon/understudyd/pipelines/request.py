"""What a custom pipeline is asked for, and how it reports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Refused(ValueError):
    """The caller asked for what the pipeline cannot do; the message, which the caller reads, says what to do.

    Any other exception is the pipeline's own failure.
    """


def _tell_nobody(done: int, total: int) -> None:
    pass


def _cpu() -> "torch.device":
    import torch  # here, so that this module can be imported without torch

    return torch.device("cpu")


def _float32() -> "torch.dtype":
    import torch

    return torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. None means that the client left it to the pipeline.

    `width` and `height` are pixels, positive multiples of 8; `images` is how many are wanted. `options` has
    every name that the class declares, `inputs` every name with its images in order (RGB, masks "L"), an
    empty tuple where the client sent none. `device` is where the components are, `dtype` the floating
    dtype of the first one's first parameter. The defaults make it easy to try a class without a daemon.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    images: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: "Mapping[str, tuple[Image.Image, ...]]" = field(default_factory=dict)
    device: "torch.device" = field(default_factory=_cpu)
    dtype: "torch.dtype" = field(default_factory=_float32)
    on_step: Callable[[int, int], None] = _tell_nobody

    def generator(self) -> "torch.Generator":
        """A new generator with the request's seed, on the CPU: the same noise whatever the device."""
        import torch

        return torch.Generator("cpu").manual_seed(self.seed)

    def step(self, done: int, total: int) -> None:
        """Report that `done` of `total` steps are done. A cancelled request ends here.

        It does so by an exception that is no `Exception`: let it pass.
        """
        self.on_step(done, total)
