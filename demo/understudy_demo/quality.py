"""How many of a model's pictures show what was asked for, and in the style that it paints in."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from understudy_demo.checker import check
from understudy_demo.drawing import Pixels
from understudy_demo.style_checker import style_of
from understudy_demo.wishes import Wish, sample_wish

STEPS = 20
GUIDANCE = 3.0
_AT_ONCE = 25


@dataclass(frozen=True, slots=True)
class Judged:
    """One picture: what it does not show of its wish, and the style it looks like."""

    wish: Wish
    faults: tuple[str, ...]
    looks_like: str


def sample_wishes(count: int, seed: int) -> list[Wish]:
    """Wishes as the models were trained on, in an order of their own."""
    rng = random.Random(f"quality {seed}")
    return [sample_wish(rng) for _ in range(count)]


def paint(pipeline: Any, wishes: Sequence[Wish], first_seed: int, steps: int = STEPS) -> list[Pixels]:
    """One picture a wish, each from the seed `first_seed` + its number; pixels 0 to 255."""
    pictures: list[Pixels] = []
    for start in range(0, len(wishes), _AT_ONCE):
        some = wishes[start : start + _AT_ONCE]
        seeds = range(first_seed + start, first_seed + start + len(some))
        made = pipeline(
            prompt=[wish.caption for wish in some],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        pictures += [255 * picture for picture in np.asarray(made, np.float32)]
    return pictures


def judge(pictures: Sequence[Pixels], wishes: Sequence[Wish], style: str) -> list[Judged]:
    """What the two checkers say of a model that paints in `style`."""
    return [
        Judged(wish, check(picture, wish, style), style_of(picture))
        for picture, wish in zip(pictures, wishes, strict=True)
    ]


def passed_percent(judged: Sequence[Judged]) -> float:
    """Of the pictures, those that show all of what was asked for."""
    return 100 * sum(not each.faults for each in judged) / len(judged)


def kinds_of_faults(judged: Sequence[Judged]) -> Counter[str]:
    """How often which kind of fault was found; a picture may have several."""
    return Counter(fault.split()[-1 if fault[0].isdigit() else 0] for each in judged for fault in each.faults)
