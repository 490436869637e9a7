"""diffusers components as one checkpoint in Stable Diffusion's original layout, that of Civitai's files.

The inverse of what diffusers does when it reads such a file, for SD 1.x and SDXL.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

_UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_UNET_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_VAE_ATTENTION = (
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
_OPEN_CLIP_LAYER = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
)


def save_checkpoint(components: Mapping[str, nn.Module], path: Path) -> Path:
    """Write the UNet, VAE and text encoders among a pipeline's components into one file."""
    save_file(original_state(components), path)
    return path


def original_state(components: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of those components under the original names."""
    state: dict[str, Tensor] = {}
    if (unet := components.get("unet")) is not None:
        state |= _prefixed("model.diffusion_model.", _unet(unet))
    if (vae := components.get("vae")) is not None:
        state |= _prefixed("first_stage_model.", _vae(vae))
    first, second = components.get("text_encoder"), components.get("text_encoder_2")
    if second is not None:
        state |= _prefixed("conditioner.embedders.1.model.", _open_clip(second))
    if first is not None:
        prefix = "cond_stage_model." if second is None else "conditioner.embedders.0."
        state |= _prefixed(f"{prefix}transformer.", _clip(first))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    return {_unet_name(name, unet.config.layers_per_block): t for name, t in unet.state_dict().items()}


def _unet_name(name: str, layers: int) -> str:
    for new, old in _UNET_ENDS:
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, number, rest = match[1], int(match[2]), match[3]
        place = 2 * number if kind == "resnets" else 2 * number + 1
        return f"middle_block.{place}.{_resnet(rest) if kind == 'resnets' else rest}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    assert match is not None, name
    side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = block * (layers + 1) + (1 if side == "down" else 0)
    place = f"{'input' if side == 'down' else 'output'}_blocks"
    match kind:
        case "resnets":
            return f"{place}.{first + number}.0.{_resnet(rest)}"
        case "attentions":
            return f"{place}.{first + number}.1.{rest}"
        case "downsamplers":
            return f"{place}.{first + layers}.0.{rest.replace('conv', 'op')}"
        case _:
            # An upsampler follows the attention of its level, where there is one.
            return f"{place}.{first + layers}.{_UPSAMPLER_PLACE}.{rest}"


_UPSAMPLER_PLACE = 2  # diffusers reads it there with or without attention


def _resnet(name: str) -> str:
    for new, old in _UNET_RESNET:
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    raise ValueError(name)


def _vae(vae: Any) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    state = {}
    for name, tensor in vae.state_dict().items():
        is_attention = "mid_block.attentions" in name
        # The original attention is made of 1 x 1 convolutions.
        is_matrix = is_attention and tensor.ndim == 2
        state[_vae_name(name, levels)] = tensor[:, :, None, None] if is_matrix else tensor
    return state


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, _, rest = name.partition("mid_block.attentions.0.")
        for new, old in _VAE_ATTENTION:
            if rest.startswith(f"{new}."):
                return f"{head}mid.attn_1.{rest.replace(new, old, 1)}"
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name
    )


def _text_state(encoder: nn.Module) -> dict[str, Tensor]:
    """Without the wrapper's name, which some classes have and some have not."""
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _clip(encoder: nn.Module) -> dict[str, Tensor]:
    return _prefixed("text_model.", _text_state(encoder))


def _open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    state = _text_state(encoder)
    renamed = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": state.pop("text_projection.weight").T,
    }
    for name in list(state):
        if name.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.bias")):
            together = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            layer, _, end = name.removeprefix("encoder.layers.").partition(".self_attn.q_proj.")
            renamed[f"transformer.resblocks.{layer}.attn.in_proj_{end}"] = torch.cat(together)
    for name, tensor in state.items():
        for new, old in _OPEN_CLIP_LAYER:
            name = name.replace(new, old)
        renamed[name.replace("encoder.layers.", "transformer.resblocks.")] = tensor
    return renamed
