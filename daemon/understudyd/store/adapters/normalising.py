"""Formats that diffusers' pipelines do not take as they are: factors without their component's name.

PEFT's own files (`base_model.model.<module>...` with settings in `adapter_config.json`) and the oldest
files of diffusers (`<module>.processor.to_q_lora...`) name modules only, as they belong to one component.
Such a file is written anew under names that `load_lora_weights` takes, the settings in its header, where
diffusers' own files have them. Tensors keep their bits.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import load_file, save_file

from understudyd.store.adapters.bases import Base
from understudyd.store.adapters.conversion import peft_names
from understudyd.store.adapters.plain import check_peft_config
from understudyd.store.guard import read_json
from understudyd.store.safetensors_file import Header

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def peft_settings(path: Path) -> dict[str, Any]:
    """What the `adapter_config.json` beside a file of PEFT says; nothing for other files.

    Raises `StoreError` when it is damaged or asks for more than a plain LoRA.
    """
    config = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_WEIGHTS or not config.is_file():
        return {}
    document = read_json(config)
    settings = document if isinstance(document, dict) else {}
    check_peft_config(config.name, settings)
    return settings


def normalised(path: Path, header: Header, base: Base, folder: Path) -> Path:
    """`path`, or a file in `folder` of the same tensors under names that the base's pipeline takes.

    Raises `StoreError`, and `OSError` when that cannot be written.
    """
    keys = [span.name for span in header.tensors if not span.is_padding]
    settings = peft_settings(path)
    plain = {key: key.removeprefix(_PEFT_PREFIX) for key in keys}
    component = _home(plain.values(), base)
    if component is None:
        return path
    renamed = folder / "renamed.safetensors"
    metadata = {"format": "pt"}
    if settings:
        named = {f"{component}.{key}": value for key, value in settings.items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(named)
    tensors = load_file(path)
    save_file({f"{component}.{plain[key]}": tensors[key] for key in keys}, renamed, metadata=metadata)
    return renamed


def _home(keys: Iterable[str], base: Base) -> str | None:
    """The component all of whose keys these are, without its name before them."""
    keys = dict.fromkeys(keys)
    for name, signature in base.signatures.items():
        paths = {tensor.path for tensor in signature.tensors}
        try:
            found = peft_names(keys, is_transformers=signature.library == "transformers")
        except ValueError:  # in no format of this component
            continue
        modules = {key.rpartition(".lora_")[0] for key in found}
        if modules and all(f"{module}.weight" in paths for module in modules):
            return name
    return None
