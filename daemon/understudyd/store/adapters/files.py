"""Finding the LoRA files of a source: one file, a folder tree, a repository of the hub. No torch here."""

import os
from dataclasses import dataclass
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import PICKLE_SUFFIXES
from understudyd.store.sources.hub import INDEX, OnBytes, parse_hub_id
from understudyd.store.sources.hub_adapter import download_adapter, is_a_model
from understudyd.store.sources.scanning import model_name

# Names under which libraries save every adapter: the folder's is the telling one.
_COMMON_STEMS = frozenset({"adapter_model", "pytorch_lora_weights"})


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file that should be a LoRA. `name` is made from its path, `origin` is what its record names."""

    path: Path
    name: str
    origin: str
    size_bytes: int


def find_adapters(
    source: str | Path,
    *,
    revision: str | None = None,
    weight_name: str | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> list[AdapterFile]:
    """The LoRAs of `source`: what exists here is a path before it is a hub id, which is downloaded.

    Of a folder every `.safetensors`, and pickles, which will be refused one by one. Raises `StoreError`.
    """
    path = Path(source)
    if (path / INDEX).is_file():
        raise is_a_model(path)
    if path.is_dir():
        return _below(path)
    if path.exists() or path.is_symlink():
        return [_file(path, str(path))]
    hub_id = parse_hub_id(source, revision) if isinstance(source, str) else None
    if hub_id is None:
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"there is no {source}; give a .safetensors file, a folder of them or a hub id, org/name",
        )
    weights = download_adapter(hub_id, weight_name=weight_name, on_bytes=on_bytes)
    commit = weights.relative_to(_snapshots(weights)).parts[0]
    name = model_name(hub_id.repository.rpartition("/")[2])
    return [AdapterFile(weights, name, f"{hub_id.repository}@{commit}", weights.stat().st_size)]


def _snapshots(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "snapshots")


def _below(root: Path) -> list[AdapterFile]:
    found = []
    for folder, names, files in os.walk(root, followlinks=False):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".safetensors" or path.suffix.lower() in PICKLE_SUFFIXES:
                found.append(_file(path, str(path)))
    if not found:
        raise StoreError(
            StoreErrorCode.NOT_FOUND, f"{root} has no .safetensors below it; give a folder of LoRAs"
        )
    return found


def _file(path: Path, origin: str) -> AdapterFile:
    stem = path.parent.name if path.stem in _COMMON_STEMS else path.stem
    try:
        size_bytes = path.stat().st_size
    except OSError:  # reading it will say what is wrong
        size_bytes = 0
    return AdapterFile(path, model_name(stem), origin, size_bytes)
