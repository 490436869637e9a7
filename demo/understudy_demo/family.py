"""The demo's family: trained models that draw what they are asked for, each in a style of its own.

What was trained lies in `models/` in half precision: the base as a whole pipeline, the UNets of the
fine-tunes, the LoRAs. A family folder holds complete diffusers pipelines in full precision. All share a text
encoder and a VAE, as hard links; the UNets are made by `recipes`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from understudy_demo.members import Member, OnMember, clear, finish, link_tree, made_before
from understudy_demo.recipes import Recipe, recipes
from understudy_demo.styles import BASE
from understudy_demo.trained import FOLDER

_KIND = "trained-1"
_BASE_FOLDER = ".base"
_UNET_FILE = "diffusion_pytorch_model.safetensors"
_LORA_FILE = "pytorch_lora_weights.safetensors"


def family_key(models: int, seed: int) -> str:
    """Names a family's folder: the same key, the same weights."""
    return f"{models}-{seed}-{_KIND}"


def make_family(
    folder: Path, models: int = 24, seed: int = 0, on_member: OnMember = lambda member: None
) -> tuple[Member, ...]:
    """Write `models` pipelines under `folder` and return them; a finished folder of the same kind is reused.

    The same `models` gives the same weights; `seed` only moves the hues of charts. A folder of another family
    is emptied first; one that holds anything else is refused with `FileExistsError`. More models than there
    are recipes: `ValueError`.
    """
    chosen = recipes(models)
    if made := made_before(folder, _KIND, models, seed):
        for member in made:
            on_member(member)
        return made
    clear(folder, _BASE_FOLDER)
    transformers_logging.disable_progress_bar()
    kitchen = Kitchen(FOLDER)
    kitchen.base().save_pretrained(folder / _BASE_FOLDER)
    members = []
    for index, recipe in enumerate(chosen):
        name = f"{recipe.name}-{index:0{max(2, len(str(models - 1)))}d}"
        members.append(_write(folder / name, recipe, (0.381966 * (index + seed)) % 1.0, kitchen))
        on_member(members[-1])
    return finish(folder, _KIND, models, seed, tuple(members))


def _write(path: Path, recipe: Recipe, hue: float, kitchen: "Kitchen") -> Member:
    link_tree(path.parent / _BASE_FOLDER, path, leave_out={"unet"})
    kitchen.unet(recipe).save_pretrained(path / "unet")
    return Member(
        name=path.name,
        folder=str(path),
        architecture="sd",
        own_text_encoder=False,
        hue=hue,
        styles=recipe.styles,
    )


class Kitchen:
    """Makes pipelines and UNets from the trained weights in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unet = UNet2DConditionModel.from_pretrained(folder / BASE / "unet", torch_dtype=torch.float32)
        self._weights: dict[str, dict[str, Tensor]] = {}

    def base(self) -> Any:
        """The base as a pipeline in full precision."""
        return StableDiffusionPipeline.from_pretrained(
            self._folder / BASE, local_files_only=True, torch_dtype=torch.float32
        )

    def unet(self, recipe: Recipe) -> UNet2DConditionModel:
        """The recipe's UNet in full precision. It is the same object each time, with other weights."""
        names = list(self._trained(BASE))
        mixed = {
            name: sum(share * self._trained(part)[name] for part, share in recipe.shares) for name in names
        }
        if recipe.lora is not None:
            for name, change in self._products(recipe.lora).items():
                mixed[name] = mixed[name] + recipe.strength * change.reshape(mixed[name].shape)
        self._unet.load_state_dict(mixed)
        return self._unet

    def _trained(self, part: str) -> dict[str, Tensor]:
        if part not in self._weights:
            path = self._folder / part / ("unet" if part == BASE else "") / _UNET_FILE
            self._weights[part] = {name: value.float() for name, value in load_file(path).items()}
        return self._weights[part]

    def _products(self, lora: str) -> dict[str, Tensor]:
        """What the LoRA adds to each weight at strength 1: B A, its scale being one (alpha = rank).

        A kernel's A is a convolution to `rank` channels, its B a 1 x 1 convolution from there (as in PEFT).
        """
        file = load_file(self._folder / f"{lora}.lora" / _LORA_FILE)
        products = {}
        for name, down in file.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                up = file[f"{stem}.lora_B.weight"].float().flatten(1)
                products[stem.removeprefix("unet.") + ".weight"] = up @ down.float().flatten(1)
        return products


def weights_bytes() -> int:
    """All weights that the package carries."""
    return sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors"))


def lora_files() -> dict[str, Path]:
    """The trained LoRAs in diffusers' layout, by name; made for the base."""
    return {path.parent.stem: path for path in sorted(FOLDER.glob(f"*.lora/{_LORA_FILE}"))}
