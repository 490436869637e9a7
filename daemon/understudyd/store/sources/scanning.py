"""Finding the models in a folder tree, whoever laid it out: diffusers, Hugging Face, A1111, ComfyUI.

The tree is only read. What is a model is a `Candidate`; what looks like one and is none, or belongs to one
(LoRAs, VAEs, embeddings, ...), is `PassedOver` with the reason. No torch here.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.sources.checkpoint import NoCheckpoint, check_suffix, read_checkpoint
from understudyd.store.sources.hub import INDEX
from understudyd.store.sources.hub_cache import is_cache_entry, repository_id, snapshot
from understudyd.store.store import is_store

_LONGEST_NAME = 128
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf"})
# Folders of the web interfaces that hold no models of their own, whatever is in them.
_HELPERS = {
    "LoRAs are adapters, no models of their own": ("lora", "loras", "lycoris"),
    "these are VAEs, no models of their own": ("vae", "vae_approx", "vae-approx"),
    "these are textual inversions, no models of their own": ("embeddings", "textual_inversion"),
    "these are ControlNets, no models of their own": ("controlnet", "t2i_adapter"),
    "these are hypernetworks, which are not served": ("hypernetworks",),
    "these are upscalers, no diffusion models": (
        "upscale_models", "esrgan", "realesrgan", "swinir", "bsrgan", "ldsr", "scunet", "gfpgan",
        "codeformer",
    ),
    "these are parts of models": ("clip", "clip_vision", "text_encoders", "ipadapter", "style_models"),
}  # fmt: skip
_WHY_HELPER = {name: why for why, names in _HELPERS.items() for name in names}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be tried. `name` is made from its path; `size_bytes` is what its files hold, about."""

    path: Path
    name: str
    size_bytes: int
    is_checkpoint: bool


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file or folder that is not tried. `is_refused`: a model, but one that cannot be added."""

    path: Path
    why: str
    is_refused: bool
    code: StoreErrorCode = StoreErrorCode.UNSUPPORTED_SOURCE


def scan(root: Path) -> list[Candidate | PassedOver]:
    """Everything of interest below `root`, folders first, then checkpoints, both in order of their paths.

    Checkpoints come last, so that they may be like a folder of the same tree. Raises `StoreError` when
    `root` cannot be read.
    """
    if not root.is_dir():
        raise StoreError(StoreErrorCode.NOT_FOUND, f"there is no folder {root} to scan; give one that exists")
    if not os.access(root, os.R_OK | os.X_OK):
        raise StoreError(StoreErrorCode.UNREADABLE, f"{root} may not be read; let the daemon's user read it")
    found = sorted(_walk(root, root), key=lambda finding: finding.path)
    return sorted(found, key=lambda finding: isinstance(finding, Candidate) and finding.is_checkpoint)


def model_name(stem: str, prefix: str = "") -> str:
    """A valid name of a model made from any text: "Déjà Vu (v2)" becomes "Deja-Vu-v2"."""
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    joined = re.sub(r"[^A-Za-z0-9._-]+", "-", prefix + plain)
    return re.sub(r"^[^A-Za-z0-9]+", "", joined)[:_LONGEST_NAME].rstrip("-._") or "model"


def numbered(name: str, number: int) -> str:
    """The name to use when `name` is taken: "foo", "foo-2", "foo-3"."""
    suffix = "" if number == 1 else f"-{number}"
    return name[: _LONGEST_NAME - len(suffix)] + suffix


def _walk(folder: Path, root: Path) -> Iterator[Candidate | PassedOver]:
    if (folder / INDEX).is_file():
        yield Candidate(folder, model_name(folder.name), _tree_bytes(folder), is_checkpoint=False)
    elif is_store(folder):
        yield PassedOver(folder, "is an Understudy store", is_refused=False)
    elif is_cache_entry(folder):
        yield _cache_entry(folder)
    elif folder != root and (why := _WHY_HELPER.get(folder.name.lower())) is not None:
        if count := _weight_files(folder):
            yield PassedOver(folder, f"{why} ({count} of them)", is_refused=False)
    else:
        yield from _entries(folder, root)


def _entries(folder: Path, root: Path) -> Iterator[Candidate | PassedOver]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield PassedOver(folder, f"cannot be read ({error.strerror})", is_refused=True)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not _stays_inside(entry, root):
            if entry.is_dir() or entry.suffix.lower() in _WEIGHT_SUFFIXES:
                yield PassedOver(entry, "is a link out of the tree; add what it points to", is_refused=False)
        elif entry.is_dir():
            if not entry.is_symlink():  # what it points to is met on the way
                yield from _walk(entry, root)
        elif entry.suffix.lower() in _WEIGHT_SUFFIXES:
            yield _file(entry)


def _stays_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False


def _file(path: Path) -> Candidate | PassedOver:
    try:
        check_suffix(path)
        checkpoint = read_checkpoint(path)
    except NoCheckpoint as error:
        return PassedOver(path, _without_name(error, path), is_refused=False)
    except StoreError as error:
        # Pickles other than checkpoints are mostly upscalers and embeddings.
        is_refused = path.suffix.lower() in (".safetensors", ".ckpt")
        return PassedOver(path, _without_name(error, path), is_refused, error.code)
    return Candidate(path, model_name(path.stem), checkpoint.size_bytes, is_checkpoint=True)


def _without_name(error: StoreError, path: Path) -> str:
    return error.message.removeprefix(path.name).lstrip(": ")


def _cache_entry(entry: Path) -> Candidate | PassedOver:
    try:
        folder = snapshot(entry, None)
    except StoreError as error:
        return PassedOver(entry, error.message, is_refused=False)
    if not (folder / INDEX).is_file():
        return PassedOver(entry, "has no model_index.json: it is no diffusers pipeline", is_refused=False)
    name = model_name(repository_id(entry).rpartition("/")[2])
    return Candidate(entry, name, _tree_bytes(folder), is_checkpoint=False)


def _tree_bytes(folder: Path) -> int:
    """Bytes of the safetensors below a folder; links count with what they point to."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # the guard will say what is wrong with it
    return total


def _weight_files(folder: Path) -> int:
    return sum(path.suffix.lower() in _WEIGHT_SUFFIXES for path in folder.rglob("*"))
