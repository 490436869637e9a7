"""Recognising a single-file checkpoint by its keys, before anything of it is loaded.

The original layout of Stable Diffusion (that of the files on Civitai, and of A1111 and ComfyUI's
`checkpoints` folders) holds every component in one file, each under a prefix of its own. diffusers takes what
it does not know for Stable Diffusion 1.x, so what a file is must be settled before. No torch here.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import PICKLE_SUFFIXES, main_float_dtype
from understudyd.store.safetensors_file import TensorSpan, read_header

UNET_PREFIX = "model.diffusion_model."
_FIRST_CONVOLUTION = UNET_PREFIX + "input_blocks.0.0.weight"
_VAE_PREFIXES = ("first_stage_model.", "vae.")


class Family(Enum):
    """An architecture; the value is its name for people."""

    SD_1 = "Stable Diffusion 1.x"
    SD_2 = "Stable Diffusion 2.x"
    SDXL = "SDXL"
    SDXL_REFINER = "SDXL refiner"


_TEXT_ENCODERS = {
    Family.SD_1: {"text_encoder": "cond_stage_model.transformer."},
    Family.SD_2: {"text_encoder": "cond_stage_model.model."},
    Family.SDXL: {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    Family.SDXL_REFINER: {"text_encoder_2": "conditioner.embedders.0.model."},
}
_PREDICTED_BY_WIDTH = {1024: Family.SD_2, 1280: Family.SDXL_REFINER, 2048: Family.SDXL}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A single file that holds at least the UNet of a model.

    `components` are those it brings. `float_dtype` is the safetensors name of the dtype that most of the
    UNet's bytes are in. The three widths are those of the UNet: input channels, channels of its first level,
    and of the text embeddings it attends to.
    """

    file: Path
    family: Family
    components: frozenset[str]
    float_dtype: str | None
    size_bytes: int
    unet_elements: int
    in_channels: int
    first_channels: int
    context_width: int | None


class NoCheckpoint(StoreError):
    """The file is something else; the message says what. A scan passes it over."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Recognise a file by its header. Raises `NoCheckpoint` for other kinds of files, else `StoreError`."""
    check_suffix(path)
    header = read_header(path)
    spans = {span.name: span for span in header.tensors}
    if why := _other_kind(spans):
        raise NoCheckpoint(StoreErrorCode.UNSUPPORTED_SOURCE, f"{path.name} {why}")
    family = _family(spans)
    return Checkpoint(
        file=path,
        family=family,
        components=frozenset(_components(family, spans)),
        float_dtype=main_float_dtype(s for s in header.tensors if s.name.startswith(UNET_PREFIX)),
        size_bytes=header.data_size_bytes,
        unet_elements=sum(
            math.prod(span.shape) for name, span in spans.items() if name.startswith(UNET_PREFIX)
        ),
        in_channels=spans[_FIRST_CONVOLUTION].shape[1],
        first_channels=spans[_FIRST_CONVOLUTION].shape[0],
        context_width=_context_width(spans),
    )


def check_suffix(path: Path) -> None:
    """Refuse files that are no safetensors by name: diffusers unpickles whatever is named otherwise."""
    if path.suffix == ".safetensors":
        return
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise StoreError(
            StoreErrorCode.UNSAFE_FILE,
            f"{path.name} is a pickle, which may run code when read; get the .safetensors file of the same "
            "model, or convert it",
        )
    if path.suffix.lower() == ".gguf":
        raise NoCheckpoint(
            StoreErrorCode.UNSUPPORTED_SOURCE, f"{path.name} is quantised (GGUF); use the unquantised model"
        )
    raise StoreError(
        StoreErrorCode.UNSUPPORTED_SOURCE,
        f"{path.name} is no .safetensors file; if it holds safetensors, give it that ending",
    )


# -- what else it may be ---------------------------------------------------------------------------

_ADAPTER = re.compile(
    r"[._]lora_(up|down|A|B|linear_layer)\b|^lora_(unet|te\d?|transformer)_|\.(hada|lokr)_w1"
)
_QUANTISED = re.compile(r"\.(absmax|quant_map|scale_weight|weight_scale|comfy_quant)$|^scaled_fp8$")
_OTHER_KINDS = (
    (re.compile(r"^control_model\.|controlnet_cond_embedding\.|^input_hint_block\."),
     "is a ControlNet, no model of its own; add a diffusers folder of a ControlNet pipeline"),
    (re.compile(r"^(image_proj|ip_adapter)\."), "is an IP-Adapter, no model of its own; add its base model"),
    (re.compile(r"^emb_params$|^string_to_param"), "is a textual inversion, no model of its own"),
    (re.compile(r"\bjoint_blocks\.\d"), "is of Stable Diffusion 3"),
    (re.compile(r"\bdouble_blocks\.\d"), "is of Flux or a relative of it"),
    (re.compile(r"^(down_blocks|up_blocks|transformer_blocks|single_transformer_blocks)\.\d"),
     "is one component of a diffusers model; give the folder that holds model_index.json"),
    (re.compile(r"^(encoder|decoder)\.conv_in\."), "is a VAE alone, no model of its own"),
    (re.compile(r"^(first_stage_model|vae)\."), "is a VAE alone, no model of its own"),
    (re.compile(r"^(text_model|transformer\.text_model|cond_stage_model|conditioner)\."),
     "is a text encoder alone, no model of its own"),
    (re.compile(r"^(conv_first|body\.0\.|model\.0\.weight)"), "is an upscaler, no diffusion model"),
)  # fmt: skip
_FOLDER_ONLY = "; single files are read of Stable Diffusion 1.x, 2.x and SDXL, give its diffusers folder"


def _other_kind(spans: dict[str, TensorSpan]) -> str | None:
    """What a file is that holds no UNet of the original layout; None if it holds one."""
    if any(_ADAPTER.search(name) for name in spans):
        return "is a LoRA, an adapter and no model of its own; add it with `understudyctl add-lora`"
    if any(_QUANTISED.search(name) for name in spans):
        return "is quantised; use the unquantised model"
    if set(spans) <= {"clip_l", "clip_g"}:
        return "is a textual inversion, no model of its own"
    has_control = any(name.startswith("control_model.") for name in spans)
    if _FIRST_CONVOLUTION in spans and len(spans[_FIRST_CONVOLUTION].shape) == 4 and not has_control:
        return None
    for pattern, why in _OTHER_KINDS:
        if any(pattern.search(name) for name in spans):
            return why + (_FOLDER_ONLY if why.startswith("is of ") else "")
    if any(name.startswith(UNET_PREFIX) for name in spans):
        return "is of another architecture" + _FOLDER_ONLY
    return "holds no diffusion model that is known here" + _FOLDER_ONLY


# -- what it is ------------------------------------------------------------------------------------


def _family(spans: dict[str, TensorSpan]) -> Family:
    """By the text encoders; without any, by what the UNet attends to."""
    for family in (Family.SDXL_REFINER, Family.SDXL, Family.SD_2, Family.SD_1):
        if any(_starts(spans, prefix) for prefix in _TEXT_ENCODERS[family].values()):
            return family
    has_size_conditioning = _starts(spans, UNET_PREFIX + "label_emb.")
    fallback = Family.SDXL if has_size_conditioning else Family.SD_1
    return _PREDICTED_BY_WIDTH.get(_context_width(spans) or 0, fallback)


def _components(family: Family, spans: dict[str, TensorSpan]) -> Iterable[str]:
    yield "unet"
    if any(_starts(spans, prefix) for prefix in _VAE_PREFIXES):
        yield "vae"
    yield from (name for name, prefix in _TEXT_ENCODERS[family].items() if _starts(spans, prefix))


def _starts(spans: dict[str, TensorSpan], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in spans)


def _context_width(spans: dict[str, TensorSpan]) -> int | None:
    for name, span in spans.items():
        if name.startswith(UNET_PREFIX) and name.endswith(".attn2.to_k.weight") and span.shape:
            return span.shape[-1]
    return None
