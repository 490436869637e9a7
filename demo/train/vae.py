"""Trains the family's autoencoder: 64 x 64 pictures in every style to 16 x 16 x 4 latents and back."""

import random
import time
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from train.norms import quicken
from train.runs import Checkpoint, lowest_priority
from understudy_demo.styles import BASE, STYLES, draw_wish
from understudy_demo.wishes import sample_wish

_KL_WEIGHT = 3e-4
_EDGE_WEIGHT = 0.7
_SQUARE_WEIGHT = 2.0


def new_vae() -> AutoencoderKL:
    """Three levels, one latent per 4 x 4 pixels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        mid_block_add_attention=False,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def pictures(count: int, first_seed: int) -> Tensor:
    """N x 3 x 64 x 64 of drawn pictures, -1 to 1; every fourth or so in the plain style."""
    rng = random.Random(first_seed)
    styles = [*STYLES, *[BASE] * (len(STYLES) // 4)]
    drawn = [draw_wish(sample_wish(rng), rng.choice(styles), first_seed + i) for i in range(count)]
    return to_tensor(np.stack(drawn))


def to_tensor(drawn: np.ndarray) -> Tensor:
    """N x 64 x 64 x 3 of 0 to 255 as n x 3 x 64 x 64 of -1 to 1."""
    return torch.from_numpy(drawn.astype(np.float32)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def loss_of(vae: AutoencoderKL, batch: Tensor, frozen_encoder: bool) -> Tensor:
    """Absolute error of pixels and of their differences (edges), and a little of the latents' divergence."""
    with torch.set_grad_enabled(not frozen_encoder):
        posterior = vae.encode(batch).latent_dist
    made = vae.decode(posterior.sample()).sample.float()
    loss = _difference(made, batch)
    for axis in (2, 3):
        loss = loss + _EDGE_WEIGHT * _difference(made.diff(dim=axis), batch.diff(dim=axis))
    if not frozen_encoder:
        loss = loss + _KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
    return loss


def _difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute for sharp edges, and squared: a median, which absolute error asks for, has no thin lines."""
    return functional.l1_loss(made, wanted) + _SQUARE_WEIGHT * functional.mse_loss(made, wanted)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True)
@click.option("--minutes", type=float, default=120.0, show_default=True, help="Of this run.")
@click.option("--steps", type=int, default=2000, show_default=True, help="The learning rate falls to 0 here.")
@click.option("--batch", type=int, default=16, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--name", default="vae", show_default=True, help="Of the checkpoint.")
@click.option("--start", default=None, help="The name of a checkpoint to start from.")
@click.option("--seed", type=int, default=1_000_000, show_default=True, help="Of the first picture.")
@click.option("--decoder-only", is_flag=True, help="Go on with the decoder; latents stay what they are.")
def main(
    work: Path, minutes: float, steps: int, batch: int, threads: int, name: str, start: str | None, seed: int,
    decoder_only: bool,
) -> None:  # fmt: skip
    """Train, or go on from the last checkpoint."""
    lowest_priority(threads)
    torch.manual_seed(0)
    vae = new_vae().to(memory_format=torch.channels_last)
    quicken(vae)
    checkpoint = Checkpoint(work / f"{name}.safetensors", vae, rate=2e-3, steps=steps, smooth=0.99,
                            matrices_apart=True)  # fmt: skip
    if start is not None and checkpoint.step == 0:
        vae.load_state_dict(Checkpoint.smoothed(work / f"{start}.safetensors"))
        checkpoint.restart()
    started_s = time.monotonic()
    while checkpoint.step < steps and time.monotonic() - started_s < 60 * minutes:
        data = pictures(batch, seed + checkpoint.step * batch)
        data = data.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(vae, data, decoder_only)
        checkpoint.learn(loss)
        if checkpoint.step % 50 == 0:
            checkpoint.save()
            checkpoint.report(name, time.monotonic() - started_s)
    checkpoint.save()


if __name__ == "__main__":
    main()
