"""The loss of a velocity-predicting UNet, and the loop that base, fine-tunes and LoRAs are trained by."""

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional

from train.latents import Lesson
from train.runs import Checkpoint

_WITHOUT_CAPTION = 0.12  # of the training pictures: what guidance compares with
_KNEE = 12.0  # signal-to-noise ratio from which on an error counts for less: layout and shape lie below


class Diffusion:
    """Noise on latents, and how far the UNet is from telling it.

    An error of velocity counts fully where noise prevails, less and less where little is left to decide
    (after min-SNR weighting, Hang et al. 2023, arXiv 2303.09556, which turns down both ends); noisy steps,
    where what and how many is decided, are drawn more often.
    """

    def __init__(self, scheduler: DDIMScheduler, empty_caption: Tensor, generator: torch.Generator) -> None:
        self._alphas = scheduler.alphas_cumprod
        self._empty, self._generator = empty_caption, generator

    def loss(self, unet: Any, text_encoder: Any, latents: Tensor, tokens: Tensor) -> Tensor:
        """Of one batch: latents n x 4 x 16 x 16, tokens n x LONGEST_CAPTION."""
        n = len(latents)
        uniform = torch.rand(n, generator=self._generator)
        steps = (1000 * uniform**0.8).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=self._generator)
        alpha = self._alphas[steps]
        signal, spread = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        dropped = torch.rand(n, 1, generator=self._generator) < _WITHOUT_CAPTION
        tokens = torch.where(dropped, self._empty, tokens)
        noisy = (signal * latents + spread * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(tokens).last_hidden_state
            told = unet(noisy, steps, text).sample
        errors = functional.mse_loss(told.float(), signal * noise - spread * latents, reduction="none")
        snr = alpha / (1 - alpha)
        weights = _KNEE / (snr + _KNEE)
        return (weights * errors.mean((1, 2, 3))).mean()

    def loss_of(self, unet: Any, text_encoder: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for a pair, as `train` wants it."""
        return lambda latents, tokens: self.loss(unet, text_encoder, latents, tokens)


def train(
    checkpoint: Checkpoint, name: str, steps: int, minutes: float, batch: int, lesson: Lesson,
    loss_of: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator, save_every: int = 100,
) -> None:  # fmt: skip
    """Go on from the checkpoint until `steps`, or until the time is over."""
    started_s = time.monotonic()
    while checkpoint.step < steps and time.monotonic() - started_s < 60 * minutes:
        latents, tokens = lesson.batch(batch, generator.manual_seed(1_000_003 * (checkpoint.step + 1)))
        checkpoint.learn(loss_of(latents, tokens))
        if checkpoint.step % save_every == 0:
            checkpoint.save()
            checkpoint.report(name, time.monotonic() - started_s)
    checkpoint.save()
