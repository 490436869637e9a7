"""Telling a plain LoRA by its keys, before anything of it is loaded. What it is instead is refused by name.

The conventions are those of kohya's sd-scripts, of LyCORIS, PEFT, diffusers and A1111. No torch here.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import PICKLE_SUFFIXES
from understudyd.store.safetensors_file import Header, read_header

_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
_CHECKPOINT = "a checkpoint"
_KINDS: tuple[tuple[str, str], ...] = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"\.lokr_", "a LoKr"),
    (r"\.hada_", "a LoHa"),
    (r"\.boft_|boft_[sR]", "a BOFT"),
    (r"\.oft_|\.oft_blocks|\.oft_diag|oft_R", "an OFT"),
    (r"\.ia3_l|\.on_input$", "an IA3"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "a GLoRA"),
    (r"vera_lambda", "a VeRA"),
    (r"lora_mid\.", "a LoCon in Tucker form"),
    (r"^lora_controlnet$|controlnet", "a ControlNet LoRA"),
    (r"lora_embedding_[AB]", "a LoRA of embeddings"),
    (r"^emb_params$|^string_to_param|^bundle_emb\.|^clip_[lg]$", "a textual inversion, or has parts of one"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "has full differences of weights (diff), not factors"),
    (r"lora_B(\.\w+)?\.bias$|lora_up\.bias$|lora\.up\.bias$", "has biases (lora_B.bias)"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", _CHECKPOINT),
)
_NO_PLAIN = tuple((re.compile(pattern), what) for pattern, what in _KINDS)
_FACTOR = re.compile(
    r"(lora_down|lora_up|lora_[AB](\.\w+)?|_lora\d?\.(down|up)|\.lora\.(down|up)"
    r"|lora_linear_layer\.(down|up))(\.weight)?$"
)
_SWITCHES = {"use_dora": "a DoRA", "lora_bias": "has biases (lora_bias)"}


def read_plain_header(path: Path) -> Header:
    """The header of a file that holds a plain LoRA and nothing else. Raises `StoreError`."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise StoreError(
            StoreErrorCode.UNSAFE_FILE,
            f"{path.name} is a pickle, which may run code when read; convert it to safetensors",
        )
    header = read_header(path)
    tensors = [span for span in header.tensors if not span.is_padding]
    check_keys(path.name, (span.name for span in tensors))
    for span in tensors:
        if span.dtype not in _FLOATS:
            raise _not_plain(
                path.name, f"has {span.name!r:.80} in {span.dtype}; only floats of 16 bits or more"
            )
        if 0 in span.shape:
            raise StoreError(StoreErrorCode.CORRUPT_SOURCE, f"{path.name}: {span.name!r:.80} is empty")
    return header


def check_keys(what: str, keys: Iterable[str]) -> None:
    """Refuse what is no plain LoRA, by name. Raises `StoreError`."""
    keys = list(keys)
    for pattern, kind in _NO_PLAIN:
        if found := next((key for key in keys if pattern.search(key)), None):
            advice = ", which `understudyctl add` adds" if kind == _CHECKPOINT else ""
            raise _not_plain(what, f"{_is(kind)} ({found!r:.100}){advice}")
    factors = [key for key in keys if _FACTOR.search(key)]
    if not factors:
        raise _not_plain(
            what, "has no LoRA factors" + (f" ({keys[0]!r:.80}, ...)" if keys else ": it is empty")
        )
    for key in keys:
        if not _FACTOR.search(key) and not key.endswith(".alpha"):
            raise _not_plain(what, f"has {key!r:.100}, which is no factor of a LoRA")


def check_peft_config(what: str, config: Mapping[str, Any]) -> None:
    """Refuse PEFT settings under which a LoRA is no plain one. Raises `StoreError`."""
    if config.get("peft_type", "LORA") not in ("LORA", None):
        raise _not_plain(what, f"is a {config['peft_type']!r:.40} adapter of PEFT")
    for key, value in config.items():
        switch = key.rpartition(".")[2]
        if value and switch in _SWITCHES:
            raise _not_plain(what, f"{_is(_SWITCHES[switch])} ({key})")
        if value and switch in ("modules_to_save", "trainable_token_indices", "target_parameters"):
            raise _not_plain(what, f"changes more than its factors ({key})")
        if switch == "bias" and value not in (None, "none"):
            raise _not_plain(what, f"has biases ({key} = {value!r:.20})")


def _is(kind: str) -> str:
    return kind if kind.startswith("has ") else f"is {kind}"


def _not_plain(what: str, why: str) -> StoreError:
    return StoreError(
        StoreErrorCode.NOT_PLAIN_LORA, f"{what} {why}; only plain LoRAs (two factors a weight) are served"
    )
