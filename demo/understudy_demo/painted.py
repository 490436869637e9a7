"""A family of random-weight pipelines of two architectures, as an operator's model folder would be.

For benchmarks, where only sizes, sharing and speed matter; `family` is the one that draws what it is asked.
Most are fine-tunes of one architecture that share a VAE; half have a text encoder of their own; every
fourth is of a second, SDXL-style architecture with a VAE of its own. Files with the same bytes are
hard links. Each model paints with a palette and a brush of its own (see `painting`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from understudy_demo import painting, tiny
from understudy_demo.members import Member, OnMember, clear, finish, link_tree, made_before

_KIND = "painted-1"
_FINE_TUNE = 0.05  # how far a fine-tune moves from its base, in standard deviations of each tensor

_HUES = ("coral", "amber", "lemon", "lime", "fern", "jade", "teal", "azure", "cobalt", "violet", "orchid",
         "rose")  # fmt: skip
_GRAINS = {
    "clouds": (3.0, 3.0),
    "waves": (6.0, 1.0),
    "reeds": (1.0, 6.0),
    "pebbles": (1.4, 1.4),
    "dunes": (5.0, 2.0),
    "rain": (2.0, 4.0),
    "moss": (2.0, 2.0),
}


def family_key(models: int, seed: int) -> str:
    """Names a family's folder: the same key, the same weights."""
    return f"{models}-{seed}-{_KIND}"


def make_family(
    folder: Path, models: int = 24, seed: int = 0, on_member: OnMember = lambda member: None
) -> tuple[Member, ...]:
    """Write `models` pipelines under `folder` and return them; a finished folder of the same kind is reused.

    The same arguments give the same weights. A folder of another family is emptied first; a folder
    that holds anything else is refused with `FileExistsError`.
    """
    if made := made_before(folder, _KIND, models, seed):
        for member in made:
            on_member(member)
        return made
    clear(folder, ".base-sd")
    transformers_logging.disable_progress_bar()
    sd, xl = _StableDiffusion(folder / ".base-sd", seed), _StableDiffusionXL(folder / ".base-xl", seed)
    members = []
    for index in range(models):
        architecture: _Architecture = xl if index % 4 == 3 else sd
        members.append(_write_member(folder, index, models, seed, architecture))
        on_member(members[-1])
    return finish(folder, _KIND, models, seed, tuple(members))


class _Architecture(Protocol):
    """One architecture: its base pipeline on disk and in memory, and how its UNet is called."""

    name: str
    base: Path
    pipeline: Any

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Any: ...


class _StableDiffusion:
    name = "sd"

    def __init__(self, base: Path, seed: int) -> None:
        self.base = base
        self.pipeline = tiny.stable_diffusion(seed, shared_seed=seed)
        _finish_base(self.pipeline, base, seed)
        self._text = _embeddings(self.pipeline.text_encoder, self.pipeline.tokenizer)

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Any:
        return self.pipeline.unet(noisy, timesteps, _cycle(self._text, len(noisy)))


class _StableDiffusionXL:
    name = "xl"

    def __init__(self, base: Path, seed: int) -> None:
        self.base = base
        self.pipeline = tiny.stable_diffusion_xl(seed)
        _finish_base(self.pipeline, base, seed + 1)
        first = _embeddings(self.pipeline.text_encoder, self.pipeline.tokenizer)
        second = _embeddings(self.pipeline.text_encoder_2, self.pipeline.tokenizer)
        self._text = torch.cat([first, second], -1)

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Any:
        added = {
            "text_embeds": torch.zeros(len(noisy), 32),
            "time_ids": torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(len(noisy), 6),
        }
        text = _cycle(self._text, len(noisy))
        return self.pipeline.unet(noisy, timesteps, text, added_cond_kwargs=added)


def _finish_base(pipeline: Any, base: Path, seed: int) -> None:
    """Give the base its paths and its decoder, and write it once; members link to its files."""
    vae: AutoencoderKL = pipeline.vae
    painting.lay_paths(vae, pipeline.unet)
    painting.fit_decoder(vae, seed)
    tiny.save(pipeline, base)


def _embeddings(encoder: Any, tokenizer: Any) -> Tensor:
    """What the UNet sees of a few prompts, the empty one among them."""
    with torch.no_grad():
        prompts = ["", "a cat", "a red house by the sea", ""]
        ids = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden: Tensor = encoder(ids).last_hidden_state
        return hidden


def _cycle(rows: Tensor, n: int) -> Tensor:
    return rows[torch.arange(n) % len(rows)]


@dataclass(frozen=True, slots=True)
class _Style:
    name: str
    brush: painting.Brush


def _style(index: int, models: int) -> _Style:
    """Hues go round the wheel by the golden angle, so that neighbours differ."""
    hue = (index * 0.381966) % 1.0
    grain_name, grain = list(_GRAINS.items())[index % len(_GRAINS)]
    digits = max(2, len(str(models - 1)))
    name = f"{_HUES[int(hue * len(_HUES))]}-{grain_name}-{index:0{digits}d}"
    return _Style(name, painting.Brush(hue, *grain))


def _write_member(folder: Path, index: int, models: int, seed: int, architecture: _Architecture) -> Member:
    style = _style(index, models)
    path = folder / style.name
    own_text_encoder = architecture.name == "sd" and index % 4 != 0
    own = {"unet"} | ({"text_encoder"} if own_text_encoder else set())
    link_tree(architecture.base, path, leave_out=own)
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    _write_unet(path / "unet", architecture, style.brush, generator)
    if own_text_encoder:
        _write_text_encoder(path / "text_encoder", architecture.pipeline.text_encoder, generator)
    return Member(
        name=style.name,
        folder=str(path),
        architecture=architecture.name,
        own_text_encoder=own_text_encoder,
        hue=style.brush.hue,
    )


def _write_unet(
    path: Path, architecture: _Architecture, brush: painting.Brush, generator: torch.Generator
) -> None:
    """A fine-tune of the base UNet: every weight moved a little, the last layer fitted to the brush."""
    unet = architecture.pipeline.unet
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    try:
        unet.load_state_dict(_moved(base, generator))
        alphas = architecture.pipeline.scheduler.alphas_cumprod
        painting.fit_brush(unet, brush, architecture.predict, alphas, generator)
        unet.save_pretrained(path)
    finally:
        unet.load_state_dict(base)


def _write_text_encoder(path: Path, encoder: CLIPTextModel, generator: torch.Generator) -> None:
    base = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    try:
        encoder.load_state_dict(_moved(base, generator))
        encoder.save_pretrained(path)
    finally:
        encoder.load_state_dict(base)


def _moved(base: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Fine-tuned weights: noise on every floating-point tensor of two or more dimensions."""
    return {name: _nudge(tensor, generator) for name, tensor in base.items()}


def _nudge(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    return tensor + _FINE_TUNE * tensor.std() * torch.randn(tensor.shape, generator=generator)
