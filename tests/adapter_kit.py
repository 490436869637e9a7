"""LoRA files of every format, made on tiny models without a network.

An adapter is first made by PEFT on a copy of the model, with random factors, and then written as this or that
program would write it.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
CONV_LAYERS = (*UNET_LAYERS, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
FLUX_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "ff.net.0.proj")

State = dict[str, Tensor]
_DIRECTIONS = {"A": "down", "B": "up"}


@dataclass(frozen=True)
class MadeAdapter:
    """Factors by component, under PEFT's names; `configs` are what made them."""

    layers: dict[str, State]
    configs: dict[str, LoraConfig]

    def state(self) -> State:
        """diffusers' names: the component first."""
        return {f"{name}.{key}": t for name, own in self.layers.items() for key, t in own.items()}


@dataclass(frozen=True)
class Making:
    """What to make: layers by component, and PEFT's settings."""

    layers: Mapping[str, Sequence[str]]
    rank: int = 4
    alpha: float = 8
    seed: int = 1
    dtype: torch.dtype = torch.float32
    settings: Mapping[str, Any] = field(default_factory=dict)


def make_adapter(pipeline: Any, making: Making) -> MadeAdapter:
    """Random factors for a copy of the pipeline's components."""
    torch.manual_seed(making.seed)
    layers, configs = {}, {}
    for name, targets in making.layers.items():
        module = copy.deepcopy(getattr(pipeline, name))
        config = LoraConfig(
            r=making.rank,
            lora_alpha=making.alpha,
            target_modules=list(targets),
            init_lora_weights=False,
            **{key: _of(targets, value) for key, value in making.settings.items()},
        )
        module.add_adapter(config, "made")
        state = get_peft_model_state_dict(module, adapter_name="made")
        layers[name] = {key: (0.3 * t.detach()).to(making.dtype).contiguous() for key, t in state.items()}
        configs[name] = module.peft_config["made"]
    return MadeAdapter(layers, configs)


def _of(targets: Sequence[str], setting: Any) -> Any:
    """Of a pattern, what is about these layers: PEFT warns of the rest."""
    return {k: v for k, v in setting.items() if k in targets} if isinstance(setting, dict) else setting


# -- writing it as others do -----------------------------------------------------------------------


def write_diffusers(made: MadeAdapter, path: Path) -> Path:
    """`save_lora_weights` with its metadata: alphas are in the header."""
    settings = {
        f"{name}.{key}": sorted(value) if isinstance(value, set) else value
        for name, config in made.configs.items()
        for key, value in config.to_dict().items()
    }
    return write(path, made.state(), {"lora_adapter_metadata": json.dumps(settings)})


def write_diffusers_bare(made: MadeAdapter, path: Path) -> Path:
    """The same without metadata: alpha is taken to be the rank."""
    return write(path, made.state())


def write_peft_folder(made: MadeAdapter, folder: Path) -> Path:
    """`PeftModel.save_pretrained` of one component: its name is nowhere."""
    (own,) = made.layers.values()
    (config,) = made.configs.values()
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    state = {f"base_model.model.{key}": tensor for key, tensor in own.items()}
    return write(folder / "adapter_model.safetensors", state)


def write_attn_processors(made: MadeAdapter, path: Path, *, prefix: str = "") -> Path:
    """diffusers' first format: attention processors, of the UNet alone."""
    state = {}
    for key, tensor in made.layers["unet"].items():
        module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        attention, _, layer = module.replace(".to_out.0", ".to_out").rpartition(".")
        state[f"{prefix}{attention}.processor.{layer}_lora.{_DIRECTIONS[factor]}.weight"] = tensor
    return write(path, state)


def write_attn_processors_prefixed(made: MadeAdapter, path: Path) -> Path:
    """diffusers' second format: the same, with the component's name."""
    return write_attn_processors(made, path, prefix="unet.")


def write_with_alphas(made: MadeAdapter, path: Path, *, alpha: float, dtype: torch.dtype) -> Path:
    """diffusers' names with alphas between them, as some trainers of Flux write; each is larger by 1."""
    state = made.state()
    for number, key in enumerate([key for key in state if key.endswith(".lora_A.weight")]):
        state[key.replace("lora_A.weight", "alpha")] = torch.tensor(alpha + number, dtype=dtype)
    return write(path, state)


def write_flux_kohya(path: Path, *, width: int = 32, rank: int = 4, seed: int = 5) -> Path:
    """sd-scripts' Flux: q, k and v in one pair of factors, which diffusers splits."""
    torch.manual_seed(seed)
    shapes = {
        "double_blocks_0_img_attn_qkv": (width, 3 * width),
        "double_blocks_0_img_attn_proj": (width, width),
        "double_blocks_0_txt_attn_qkv": (width, 3 * width),
        "double_blocks_0_img_mlp_0": (width, 4 * width),
        "single_blocks_0_linear2": (5 * width, width),
        "single_blocks_0_modulation_lin": (width, 3 * width),
    }
    state: State = {}
    for name, (wide_in, wide_out) in shapes.items():
        state[f"lora_unet_{name}.lora_down.weight"] = 0.1 * torch.randn(rank, wide_in)
        state[f"lora_unet_{name}.lora_up.weight"] = 0.1 * torch.randn(wide_out, rank)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(3.0)
    return write(path, state)


def write_kohya(
    made: MadeAdapter, path: Path, *, alphas: Sequence[float], metadata: Mapping[str, str] | None = None
) -> Path:
    """sd-scripts' names, as Civitai has them and A1111 reads them; `alphas` are given out in turn."""
    prefixes = {
        "unet": "lora_unet_",
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_" if "text_encoder_2" in made.layers else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    state: State = {}
    modules = 0
    for name, own in made.layers.items():
        for key, tensor in own.items():
            module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
            if name.startswith("text_encoder"):
                module = "text_model." + module.removeprefix("text_model.")
            flat = prefixes[name] + module.replace(".", "_")
            state[f"{flat}.lora_{_DIRECTIONS[factor]}.weight"] = tensor
            if factor == "A":
                state[f"{flat}.alpha"] = torch.tensor(alphas[modules % len(alphas)], dtype=tensor.dtype)
                modules += 1
    return write(path, state, metadata)


def write_civitai_xl(made: MadeAdapter, path: Path, *, layers_per_block: int = 1) -> Path:
    """SDXL as sd-scripts trains it: the blocks of Stability's own code, in sd-scripts' flat names."""
    state: State = {}
    for key, tensor in made.layers["unet"].items():
        module, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        flat = "lora_unet_" + _stabilitys_name(module, layers_per_block + 1).replace(".", "_")
        state[f"{flat}.lora_{_DIRECTIONS[factor]}.weight"] = tensor
        state[f"{flat}.alpha"] = torch.tensor(3.0)
    return write(path, state)


_RESNET_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _stabilitys_name(module: str, per_block: int) -> str:
    """`down_blocks.1.attentions.0.x` is `input_blocks.3.1.x` where a block has two entries."""
    side, _, rest = module.partition(".")
    if side == "mid_block":
        kind, number, inner = rest.split(".", 2)
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inner(kind, inner)}"
    block, kind, layer, inner = rest.split(".", 3)
    place = int(block) * per_block + int(layer)
    start = {"down_blocks": f"input_blocks.{1 + place}", "up_blocks": f"output_blocks.{place}"}[side]
    return f"{start}.{int(kind == 'attentions')}.{_inner(kind, inner)}"


def _inner(kind: str, name: str) -> str:
    return _RESNET_NAMES[name] if kind == "resnets" else name


def write(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt", **(metadata or {})})
    return path
