"""Trains the base model: UNet and text encoder together, on pictures in the plain style."""

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from train.diffusion import Diffusion, train
from train.latents import lesson
from train.networks import new_scheduler, new_text_encoder, new_tokenizer, new_unet
from train.norms import quicken
from train.runs import Checkpoint, lowest_priority
from train.vae import new_vae
from understudy_demo.styles import BASE

SCALING_FACTOR = 0.4506
"""One over the latents' standard deviation (Rombach et al. 2022), measured once on pictures of all styles.

It stays, also when a style changes: what was trained on scaled latents depends on it.
"""


def trained_vae(work: Path) -> AutoencoderKL:
    """The autoencoder as trained so far."""
    vae = new_vae()
    vae.load_state_dict(Checkpoint.smoothed(work / "vae.safetensors"))
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=SCALING_FACTOR)
    return vae


def new_pair() -> nn.ModuleDict:
    """Text encoder and UNet, untrained, the same each time."""
    torch.manual_seed(1)
    pair = nn.ModuleDict({"text_encoder": new_text_encoder(new_tokenizer()), "unet": new_unet()})
    quicken(pair)
    pair["unet"].set_attn_processor(AttnProcessor())  # torch's fused one took a third of a step on a CPU
    return pair.to(memory_format=torch.channels_last)


def load_pair(pair: nn.ModuleDict, work: Path) -> nn.ModuleDict:
    """Give the pair the trained base's averaged weights."""
    pair.load_state_dict(Checkpoint.smoothed(work / "base.safetensors"))
    return pair


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True)
@click.option("--minutes", type=float, default=240.0, show_default=True, help="Of this run.")
@click.option("--steps", type=int, default=6500, show_default=True, help="The learning rate falls to 0 here.")
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--pictures", "count", type=int, default=14_000, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--name", default="base", show_default=True)
@click.option("--muon/--adam", default=True, show_default=True)
def main(
    work: Path, minutes: float, steps: int, batch: int, count: int, rate: float, threads: int, name: str,
    muon: bool,
) -> None:  # fmt: skip
    """Train, or go on from the last checkpoint."""
    lowest_priority(threads)
    tokenizer = new_tokenizer()
    vae = trained_vae(work)
    data = lesson(work / f"latents-{BASE}.safetensors", BASE, count, vae, tokenizer)
    data += lesson(work / "latents-placed.safetensors", BASE, count // 4, vae, tokenizer, placed=True)
    pair = new_pair()
    pair.train()
    checkpoint = Checkpoint(work / f"{name}.safetensors", pair, rate=rate, steps=steps, smooth=0.995,
                            matrices_apart=muon)  # fmt: skip
    generator = torch.Generator()
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    diffusion = Diffusion(new_scheduler(), empty, generator)
    loss_of = diffusion.loss_of(pair["unet"], pair["text_encoder"])
    train(checkpoint, name, steps, minutes, batch, data, loss_of, generator)


if __name__ == "__main__":
    main()
