"""Trains the LoRAs on the frozen base, by PEFT, as diffusers' own training scripts do."""

from pathlib import Path

import click
import torch
from peft import LoraConfig

from train.base import load_pair, new_pair, trained_vae
from train.diffusion import Diffusion, train
from train.latents import lesson
from train.networks import new_scheduler, new_tokenizer
from train.options import style_options
from train.runs import Checkpoint, lowest_priority
from understudy_demo.styles import LORAS

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
           "conv_in", "conv1", "conv2", "conv_shortcut", "conv_out")  # fmt: skip


def lora_config(seed: int = 2) -> LoraConfig:
    """Rank 4 on attention and convolutions: a look lies in kernels more than in what attends to what."""
    torch.manual_seed(seed)
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights=True)


@click.command()
@style_options(LORAS, steps=400, batch=32, pictures=2000, rate=8e-3)
def main(
    work: Path, steps: int, batch: int, count: int, rate: float, threads: int, styles: tuple[str, ...]
) -> None:
    """Train the named STYLES, or all; one that is done is left as it is."""
    lowest_priority(threads)
    tokenizer, vae = new_tokenizer(), trained_vae(work)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids
    for style in styles or LORAS:
        data = lesson(work / f"latents-{style}.safetensors", style, count, vae, tokenizer)
        pair = load_pair(new_pair(), work)
        pair.requires_grad_(False)
        unet = pair["unet"]
        unet.add_adapter(lora_config())
        unet.train()
        checkpoint = Checkpoint(work / f"lora-{style}.safetensors", unet, rate=rate, steps=steps, smooth=0.98)
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
