"""The frame of a single-file checkpoint: a diffusers folder with its configs and what it does not bring.

A checkpoint holds weights only. Configs, tokenizers, the scheduler and missing components come from a model
of the store (`--like`) or from a folder (`--config`). No torch here.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import read_json
from understudyd.store.sources.checkpoint import Checkpoint
from understudyd.store.store import Store

# diffusers' single-file loader leaves it out, too: no checkpoint holds one.
LEFT_OUT = "safety_checker"


def choose_like(checkpoint: Checkpoint, names: tuple[str, ...], folder_of: Callable[[str], Path]) -> str:
    """The first of these models that the checkpoint fits; `folder_of` says where a model's configs are.

    Raises `StoreError`: no names, why none fits, or what `folder_of` raises.
    """
    if not names:
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{checkpoint.file.name} is a checkpoint of {checkpoint.family.value}, which holds weights "
            "only: name a model of the store that has the rest (--like MODEL), or a diffusers folder "
            "(--config FOLDER)",
        )
    reasons = []
    for name in names:
        why = misfit(checkpoint, folder_of(name))
        if why is None:
            return name
        reasons.append(f"{name} {why}")
    raise StoreError(
        StoreErrorCode.UNSUPPORTED_SOURCE,
        f"{checkpoint.file.name} is a checkpoint of {checkpoint.family.value} and does not fit: "
        f"{'; '.join(reasons)}; name a model of the same architecture",
    )


def stored_folder(store: Store, name: str) -> Path:
    """Where the configs of a usable model of the store are. Raises `StoreError` for any other."""
    store.model(name)
    return store.model_folder(name)


def check_config(checkpoint: Checkpoint, folder: Path) -> Path:
    """The folder, if the checkpoint fits it. Raises `StoreError`."""
    if not (folder / "model_index.json").is_file():
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"{folder} has no model_index.json; --config takes a diffusers folder with a model's configs",
        )
    if why := misfit(checkpoint, folder):
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{checkpoint.file.name} is a checkpoint of {checkpoint.family.value} and does not fit: {folder} "
            f"{why}; give the folder of a model of the same architecture",
        )
    return folder


def misfit(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Why a checkpoint and a diffusers folder are of different architectures; None if they are not."""
    index = _json_object(folder / "model_index.json")
    lacking = sorted(name for name in checkpoint.components if not _names_class(index.get(name)))
    if lacking:
        return f"is a {index.get('_class_name')} without {' and '.join(lacking)}"
    unet = _json_object(folder / "unet" / "config.json")
    asked = {
        "input channels": (checkpoint.in_channels, unet.get("in_channels", 4)),
        "channels on its first level": (
            checkpoint.first_channels,
            _first(unet.get("block_out_channels", 320)),
        ),
        "numbers a token": (checkpoint.context_width, _first(unet.get("cross_attention_dim", 1280))),
    }
    for what, (found, expected) in asked.items():
        if found is not None and expected is not None and found != expected:
            return f"has a UNet of {expected} {what}, the checkpoint {found}"
    return None


def build_like_frame(store: Store, name: str, checkpoint: Checkpoint, folder: Path) -> None:
    """Make `folder` the frame that a model of the store gives: small files, and links to missing weights."""
    record = store.model(name)
    shutil.copytree(store.model_folder(name), folder, ignore=shutil.ignore_patterns("manifest.json"))
    for component in record.components:
        if component.name in checkpoint.components or component.name == LEFT_OUT:
            continue
        library = store.signature(component.signature).library
        weights = "model" if library == "transformers" else "diffusion_pytorch_model"
        _link(store.blob_path(component.blob.sha256), folder / component.name / f"{weights}.safetensors")


def _link(blob: Path, target: Path) -> None:
    """A blob is a safetensors file like any other; its bytes are copied only from another disk."""
    try:
        os.link(blob, target)
    except OSError:
        shutil.copyfile(blob, target)


def _json_object(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise StoreError(StoreErrorCode.CORRUPT_SOURCE, f"{path} is no JSON object; download the model again")
    return document


def _names_class(entry: Any) -> bool:
    return isinstance(entry, list) and any(entry)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
