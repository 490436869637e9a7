"""Trains the fine-tunes: the base UNet goes on, each on pictures in a style of its own."""

from pathlib import Path

import click
import torch

from train.base import load_pair, new_pair, trained_vae
from train.diffusion import Diffusion, train
from train.latents import lesson
from train.networks import new_scheduler, new_tokenizer
from train.options import style_options
from train.runs import Checkpoint, lowest_priority
from understudy_demo.styles import FINE_TUNES


@click.command()
@style_options(FINE_TUNES, steps=900, batch=48, pictures=3000, rate=2.5e-3)
def main(
    work: Path, steps: int, batch: int, count: int, rate: float, threads: int, styles: tuple[str, ...]
) -> None:
    """Train the named STYLES, or all; one that is done is left as it is."""
    lowest_priority(threads)
    tokenizer, vae = new_tokenizer(), trained_vae(work)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    for style in styles or FINE_TUNES:
        data = lesson(work / f"latents-{style}.safetensors", style, count, vae, tokenizer)
        pair = load_pair(new_pair(), work)
        pair["text_encoder"].requires_grad_(False).eval()
        unet = pair["unet"].train()
        checkpoint = Checkpoint(work / f"unet-{style}.safetensors", unet, rate=rate, steps=steps, smooth=0.98,
                                matrices_apart=True)  # fmt: skip
        generator = torch.Generator()
        diffusion = Diffusion(new_scheduler(), empty, generator)
        train(
            checkpoint,
            style,
            steps,
            60,
            batch,
            data,
            diffusion.loss_of(unet, pair["text_encoder"]),
            generator,
        )


if __name__ == "__main__":
    main()
