"""Gives tiny random-weight pipelines something to paint, in a fraction of a second and without training.

A network with random weights turns noise into noise. Two changes make its pictures worth looking at:

* `lay_paths` writes pass-through kernels into a few channels and quietens the residual branches, so that
  the latents reach the last layer beside the random features (the sign pairs +z, -z survive SiLU:
  silu(z) - silu(-z) = z).
* `fit_decoder` and `fit_brush` then solve ridge regressions for the last convolution alone: latents to
  colours in the decoder, noisy latents to their noise in the UNet. The pictures a UNet is fitted to are
  smooth random fields; their two colours and their grain are the model's own, so a model is
  recognised by its palette and its brush.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_PAIRS = 8  # four latent channels, each with both signs
_QUIET = ("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")


@dataclass(frozen=True, slots=True)
class Brush:
    """How a model paints: hue in turns (0 to 1), grain length in latent pixels along x and y."""

    hue: float
    grain_x: float
    grain_y: float


def lay_paths(vae: Any, unet: Any, quiet: float = 0.1) -> None:
    """Let the latents through to the last layers of a `tiny.vae` and a `tiny.unet`."""
    with torch.no_grad():
        for module in (vae.decoder, unet):
            for name, parameter in module.named_parameters():
                if name.endswith(_QUIET):
                    parameter.mul_(quiet)
        _lay_decoder_path(vae)
        _lay_unet_path(unet)


def _lay_decoder_path(vae: Any) -> None:
    vae.post_quant_conv.weight.copy_(torch.eye(4)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()
    _split_signs(vae.decoder.conv_in)
    _pass(vae.decoder.up_blocks[0].upsamplers[0].conv, _BLUR)
    _pass(vae.decoder.up_blocks[1].resnets[0].conv_shortcut)


def _lay_unet_path(unet: Any) -> None:
    _split_signs(unet.conv_in)
    _pass(unet.down_blocks[0].downsamplers[0].conv, _BLUR)
    _pass(unet.down_blocks[1].resnets[0].conv_shortcut)
    for resnet in unet.up_blocks[0].resnets:
        _pass(resnet.conv_shortcut)
    _pass(unet.up_blocks[0].upsamplers[0].conv, _BLUR)
    first, last = unet.up_blocks[1].resnets
    _pass(first.conv_shortcut)  # what came up through the lower level: the coarse picture
    skip_start = first.conv_shortcut.in_channels - unet.config.block_out_channels[0]
    _pass(first.conv_shortcut, at_out=_PAIRS, at_in=skip_start)  # what was kept aside: the fine one
    _pass(last.conv_shortcut)
    _pass(last.conv_shortcut, at_out=_PAIRS, at_in=_PAIRS)


_BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
_DELTA = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])


def _split_signs(conv: nn.Conv2d) -> None:
    """Make the first channels +z0, -z0, +z1, -z1, ..."""
    conv.weight[:_PAIRS] = 0
    conv.bias[:_PAIRS] = 0
    for channel in range(_PAIRS // 2):
        conv.weight[2 * channel, channel] = _DELTA
        conv.weight[2 * channel + 1, channel] = -_DELTA


def _pass(conv: nn.Conv2d, kernel: Tensor = _DELTA, *, at_out: int = 0, at_in: int = 0) -> None:
    """Let `_PAIRS` channels through unchanged (or blurred)."""
    if conv.kernel_size == (1, 1):
        kernel = torch.ones(1, 1)
    conv.weight[at_out : at_out + _PAIRS] = 0
    conv.bias[at_out : at_out + _PAIRS] = 0
    for channel in range(_PAIRS):
        conv.weight[at_out + channel, at_in + channel] = kernel


def fit_decoder(vae: Any, seed: int, *, samples: int = 16, size: int = 16) -> float:
    """Fit the decoder's last layer to a soft map from latents to colours; returns the unexplained share."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        latents = torch.cat([smooth_field(samples, size, 1.5, 1.5, generator) for _ in range(4)], 1)
        latents = latents + 0.7 * torch.randn(samples, 4, 1, 1, generator=generator)
        mix = torch.tensor([[0.6, 0.1, 0.1, 0.15], [0.1, 0.6, 0.1, -0.15], [0.1, 0.1, 0.6, 0.15]])
        enlarged = functional.interpolate(latents, scale_factor=2, mode="bilinear")
        colours = torch.einsum("oc,nchw->nohw", mix, enlarged).tanh()
        z = vae.post_quant_conv(latents / vae.config.scaling_factor)
        return _fit_last(vae.decoder.conv_out, lambda: vae.decoder(z), colours)


Predict = Callable[[Tensor, Tensor], Any]
"""Run the UNet on noisy latents (n, 4, h, w) at timesteps (n,)."""


def fit_brush(
    unet: Any, brush: Brush, predict: Predict, alphas_cumprod: Tensor, generator: torch.Generator,
    *, samples: int = 20, size: int = 16,
) -> float:  # fmt: skip
    """Fit the UNet's last layer to remove noise from pictures of this brush; returns the unexplained share.

    Half of the samples sit at the timesteps that few-step schedules use.
    """
    with torch.no_grad():
        clean = _paintings(brush, samples, size, generator)
        timesteps = torch.randint(0, 1000, (samples,), generator=generator)
        often = torch.tensor([999, 999, 666, 333, 0]).repeat(samples // 10)
        timesteps[: len(often)] = often
        kept = alphas_cumprod[timesteps][:, None, None, None]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        return _fit_last(unet.conv_out, lambda: predict(noisy, timesteps), noise)


def _paintings(brush: Brush, samples: int, size: int, generator: torch.Generator) -> Tensor:
    """Latents (n, 4, size, size): the brush's ground colour, its second colour in strokes, some light."""
    strokes = smooth_field(samples, size, brush.grain_x, brush.grain_y, generator)
    light = smooth_field(samples, size, brush.grain_x, brush.grain_y, generator)
    return _colour(brush.hue) + 0.9 * _colour(brush.hue + 0.14) * strokes + 0.5 * light


def _colour(hue: float) -> Tensor:
    """A hue as a latent (1, 4, 1, 1): the decoder reads the first three channels as red, green, blue."""
    turn = 2 * math.pi
    rgb = [math.cos(turn * (hue - third / 3)) for third in range(3)]
    return torch.tensor([*rgb, 0.0])[None, :, None, None]


def smooth_field(n: int, size: int, length_x: float, length_y: float, generator: torch.Generator) -> Tensor:
    """Gaussian random fields (n, 1, size, size) of unit variance with these correlation lengths."""
    frequency = torch.fft.fftfreq(size)
    squared = (frequency[None, :] * length_x) ** 2 + (frequency[:, None] * length_y) ** 2
    spectrum = torch.fft.fft2(torch.randn(n, 1, size, size, generator=generator))
    field = torch.fft.ifft2(spectrum * torch.exp(-2 * math.pi**2 * squared)).real
    return field / field.std((2, 3), keepdim=True)


def _fit_last(conv: nn.Conv2d, run: Callable[[], Any], target: Tensor, penalty: float = 1e-5) -> float:
    """Ridge regression of `conv` (3 x 3, padded) from the features it sees in `run` to `target`."""
    seen: list[Tensor] = []
    hook = conv.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        run()
    finally:
        hook.remove()
    patches = functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    x = torch.cat([patches, torch.ones(len(patches), 1, dtype=patches.dtype)], 1)
    y = target.flatten(2).transpose(1, 2).flatten(0, 1).double()
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, x.T @ y)
    conv.weight.copy_(solution[:-1].T.reshape(conv.weight.shape))
    conv.bias.copy_(solution[-1])
    return float((x @ solution - y).square().mean() / y.var())
