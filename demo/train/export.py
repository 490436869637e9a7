"""Writes what was trained where the package finds it: half precision, one folder a component."""

import shutil
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict

from train.base import load_pair, new_pair, trained_vae
from train.loras import lora_config
from train.networks import new_tokenizer, new_unet, painting_scheduler
from train.runs import Checkpoint
from understudy_demo.styles import BASE, FINE_TUNES, LORAS
from understudy_demo.trained import FOLDER


def base_pipeline(work: Path) -> StableDiffusionPipeline:
    """The base as a pipeline in full precision, with the averaged weights of the checkpoints."""
    pair = load_pair(new_pair(), work)
    unet = new_unet()
    unet.load_state_dict(pair["unet"].state_dict())
    return StableDiffusionPipeline(
        vae=best_vae(work),
        text_encoder=pair["text_encoder"].eval(),
        tokenizer=new_tokenizer(),
        unet=unet.eval(),
        scheduler=painting_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def best_vae(work: Path) -> Any:
    """The autoencoder, with the decoder that was trained further if there is one."""
    vae = trained_vae(work)
    further = work / "vae-decoder.safetensors"
    if further.exists():
        vae.load_state_dict(Checkpoint.smoothed(further))
    return vae


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("train-out"), show_default=True)
@click.option("--to", "folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
def main(work: Path, folder: Path) -> None:
    """Export the base, and every fine-tune and LoRA that is there."""
    pipeline = base_pipeline(work).to(torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    shutil.rmtree(folder / BASE, ignore_errors=True)
    pipeline.save_pretrained(folder / BASE)
    for style in FINE_TUNES:
        source = work / f"unet-{style}.safetensors"
        if source.exists():
            unet = new_unet()
            unet.load_state_dict(Checkpoint.smoothed(source))
            unet.to(torch.float16).save_pretrained(folder / style)
    for style in LORAS:
        source = work / f"lora-{style}.safetensors"
        if source.exists():
            _export_lora(source, folder / f"{style}.lora")


def _export_lora(source: Path, folder: Path) -> None:
    unet = new_unet()
    unet.add_adapter(lora_config())
    unet.load_state_dict(Checkpoint.smoothed(source))
    layers = get_peft_model_state_dict(unet)
    halves = {name: value.to(torch.float16).contiguous() for name, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=halves)


if __name__ == "__main__":
    main()
