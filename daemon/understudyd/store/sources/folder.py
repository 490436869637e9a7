"""What a diffusers folder holds beside weights: the small files that a model of the store keeps."""

import hashlib
import shutil
from pathlib import Path

from understudyd.store.guard import PICKLE_SUFFIXES, SourcePart, SourcePlan

_UNCOPIED_SUFFIXES = PICKLE_SUFFIXES | {
    ".safetensors",
    ".onnx",
    ".pb",
    ".msgpack",
    ".h5",
    ".gguf",
    ".md",
    ".png",
}


def copy_small_files(plan: SourcePlan, folder: Path) -> dict[str, str]:
    """Copy model_index.json and what is no weight file of each part; part name -> sha256 over the files.

    Makes `folder`. Raises `OSError`.
    """
    folder.mkdir()
    shutil.copyfile(plan.folder / "model_index.json", folder / "model_index.json")
    return {part.name: _copy_part(part, folder / part.name) for part in plan.parts}


def _copy_part(part: SourcePart, folder: Path) -> str:
    folder.mkdir()
    content = hashlib.sha256()
    for source in sorted(path for path in part.folder.rglob("*") if _is_small_file(path, part)):
        name = source.relative_to(part.folder)
        data = source.read_bytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        content.update(f"{len(str(name))} {name} {len(data)} ".encode() + data)
    return content.hexdigest()


def _is_small_file(path: Path, part: SourcePart) -> bool:
    if part.weights:
        return path == part.folder / "config.json"
    hidden = any(piece.startswith(".") for piece in path.relative_to(part.folder).parts)
    return path.is_file() and path.suffix.lower() not in _UNCOPIED_SUFFIXES and not hidden
