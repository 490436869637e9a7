"""Tiny but complete diffusers pipelines with random weights, for tests, the demo and benchmarks.

Every architecture is the real one; only its widths are small. Nothing is downloaded: the CLIP tokenizer
has the 256 bytes as its vocabulary and no merges.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_BOS, _EOS = 512, 513


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over single bytes: 256 letters, 256 word ends, two markers."""
    letters = _byte_letters()
    vocab = {letter: i for i, letter in enumerate(letters)}
    vocab |= {letter + "</w>": 256 + i for i, letter in enumerate(letters)}
    vocab |= {"<|startoftext|>": _BOS, "<|endoftext|>": _EOS}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def scheduler() -> EulerDiscreteScheduler:
    """Euler with Stable Diffusion's noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def text_config(width: int = 32, **changes: Any) -> CLIPTextConfig:
    """A two-layer CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_EOS,
        **changes,
    )


def vae(**changes: Any) -> AutoencoderKL:
    """A two-level autoencoder: one latent per 2 x 2 pixels."""
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    return AutoencoderKL(**config | changes)


def unet(cross_attention_dim: int = 32, **changes: Any) -> UNet2DConditionModel:
    """A two-level UNet with cross attention on the lower level."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**config | changes)


def stable_diffusion(seed: int, *, shared_seed: int = 0, own_text_encoder: bool = True,
                     **unet_changes: Any) -> StableDiffusionPipeline:  # fmt: skip
    """A Stable Diffusion pipeline; the VAE (and the text encoder if not its own) come from `shared_seed`."""
    torch.manual_seed(shared_seed)
    shared_vae, shared_text = vae(), CLIPTextModel(text_config())
    torch.manual_seed(1_000 + seed)
    return StableDiffusionPipeline(
        vae=shared_vae,
        text_encoder=CLIPTextModel(text_config()) if own_text_encoder else shared_text,
        tokenizer=tokenizer(),
        unet=unet(**unet_changes),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(seed: int, *, force_upcast: bool = True) -> StableDiffusionXLPipeline:
    """An SDXL pipeline: two text encoders, size conditioning, a VAE that may want float32."""
    torch.manual_seed(2_000 + seed)
    added = 32  # pooled text embedding; six time ids of 8 numbers each follow it
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=force_upcast),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=added)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=added + 6 * 8,
        ),
        scheduler=scheduler(),
    )


def save(pipeline: Any, folder: Path) -> Path:
    """`save_pretrained` without its progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
