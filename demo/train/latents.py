"""Captions and latents of drawn pictures, made once by the trained autoencoder and kept in a file."""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from train.vae import to_tensor
from understudy_demo.styles import STYLES, draw_wish
from understudy_demo.wishes import sample_wish

_FIRST_SEEDS = {style: 20_000_000 + 1_000_000 * number for number, style in enumerate(STYLES)}


@dataclass(frozen=True, slots=True)
class Lesson:
    """`latents`: n x 4 x 16 x 16, of unit variance. `tokens`: n x LONGEST_CAPTION."""

    latents: Tensor
    tokens: Tensor

    def __add__(self, other: "Lesson") -> "Lesson":
        """Both."""
        return Lesson(torch.cat([self.latents, other.latents]), torch.cat([self.tokens, other.tokens]))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random sample."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        return self.latents[chosen].float(), self.tokens[chosen]


def lesson(
    path: Path, style: str, count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer, *, placed: bool = False
) -> Lesson:
    """`count` pictures of a style, all of wishes with a place if `placed`; from the file if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        latents, captions = _drawn(style, count, vae, placed)
        padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        save_file({"latents": latents, "tokens": padded.input_ids}, path)
    made = load_file(path)
    return Lesson(made["latents"], made["tokens"])


@torch.no_grad()
def _drawn(style: str, count: int, vae: AutoencoderKL, placed: bool) -> tuple[Tensor, list[str]]:
    seed = _FIRST_SEEDS[style] + (500_000 if placed else 0)
    rng = random.Random(seed)
    endless = iter(lambda: sample_wish(rng), None)
    wishes = list(islice((wish for wish in endless if not placed or wish.place), count))
    parts = []
    for start in range(0, count, 64):
        drawn = [
            draw_wish(wish, style, seed + start + i) for i, wish in enumerate(wishes[start : start + 64])
        ]
        batch = to_tensor(np.stack(drawn)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(batch).latent_dist.mode()
        parts.append((mean.float() * vae.config.scaling_factor).to(torch.float16).contiguous())
    return torch.cat(parts), [wish.caption for wish in wishes]
