"""Checking a folder of weights for an installed custom pipeline (docs/custom-pipelines.md).

    config.json                  optional; what the class's `components` is given
    <component>.safetensors      the component's state dict, or
    <component>/*.safetensors    the same, in several files
    anything else                small files of safe kinds, kept beside the weights for the class to read

The class is the operator's installed code and trusted. The folder is not: the guard's rules hold.
No torch here.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudyd.pipelines.installed import InstalledPipeline, PipelineUnavailable, find_installed
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.guard import check_files, read_json
from understudyd.store.safetensors_file import Header

MAX_SMALL_BYTES = 256 * 1024 * 1024
_SMALL_SUFFIXES = frozenset(
    {
        ".json",
        ".txt",
        ".csv",
        ".toml",
        ".yaml",
        ".yml",
        ".model",
        ".spm",
        ".tiktoken",
        ".png",
        ".jpg",
        ".jpeg",
    }
)
_DOCUMENTS = frozenset({".md", ".rst", ".html", ".pdf"})
_LICENSES = ("license", "licence", "notice")


@dataclass(frozen=True, slots=True)
class CustomPlan:
    """A folder that may be loaded. `weights` are the files of each component that has any, `component_bytes`
    what is read of them; `small_files` are copied.
    """

    folder: Path
    pipeline: InstalledPipeline
    config: dict[str, Any]
    weights: dict[str, tuple[Path, ...]]
    component_bytes: dict[str, int]
    small_files: tuple[Path, ...]

    @property
    def weights_bytes(self) -> int:
        """What will be read of all components."""
        return sum(self.component_bytes.values())


def check_custom(folder: Path, pipeline: str, *, ignore_pickle: bool = False) -> CustomPlan:
    """Check a folder for the installed pipeline of this name. Raises `StoreError`."""
    try:
        installed = find_installed(pipeline)
    except PipelineUnavailable as error:
        raise StoreError(StoreErrorCode.UNKNOWN_CLASS, str(error)) from error
    if not folder.is_dir():
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"there is no folder {folder}; give the one with the weights of {pipeline}",
        )
    folder = folder.resolve()
    files = check_files(folder, ignore_pickle=ignore_pickle)
    weights = _weights(folder, files.headers)
    return CustomPlan(
        folder=folder,
        pipeline=installed,
        config=_config(folder),
        weights=weights,
        component_bytes={
            component: sum(files.headers[path].data_size_bytes for path in paths)
            for component, paths in weights.items()
        },
        small_files=_small_files(folder, files.others),
    )


def copy_small_files(plan: CustomPlan, folder: Path) -> str:
    """Copy them to the new `folder`; the sha256 over their names and bytes."""
    folder.mkdir()
    content = hashlib.sha256()
    for source in plan.small_files:
        name = source.relative_to(plan.folder)
        data = source.read_bytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        content.update(f"{len(str(name))} {name} {len(data)} ".encode() + data)
    return content.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    document = read_json(path) if path.is_file() else {}
    if not isinstance(document, dict):
        raise StoreError(StoreErrorCode.CORRUPT_SOURCE, "config.json is no JSON object; make it one")
    try:
        json.dumps(document, allow_nan=False)
    except ValueError as error:
        raise StoreError(
            StoreErrorCode.CORRUPT_SOURCE,
            "config.json holds NaN or Infinity, which JSON has not; write a text",
        ) from error
    return document


def _weights(folder: Path, headers: dict[Path, Header]) -> dict[str, tuple[Path, ...]]:
    """Files by component: the folder a file is in names it, else its own name does."""
    found: dict[str, list[Path]] = {}
    for path in sorted(headers):
        place = path.relative_to(folder).parts
        if len(place) > 2:
            raise _unsupported(path, folder, "lies too deep; put it into the folder of its component")
        component = place[0] if len(place) == 2 else path.stem
        found.setdefault(component, []).append(path)
    for component, paths in found.items():
        if len({path.parent for path in paths}) > 1:
            raise _unsupported(
                folder / f"{component}.safetensors",
                folder,
                f"stands beside a folder {component} with weights, too; keep one of them",
            )
    return {component: tuple(paths) for component, paths in found.items()}


def _small_files(folder: Path, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """What is copied; documents are left out, and what may be anything is refused, not left out silently."""
    chosen: list[Path] = []
    for path in paths:
        is_hidden = any(piece.startswith(".") for piece in path.relative_to(folder).parts)
        if is_hidden or path.suffix.lower() in _DOCUMENTS or path.name.lower().startswith(_LICENSES):
            continue
        if path == folder / "manifest.json":
            raise _unsupported(path, folder, "has the name of the store's own file; rename it")
        if path.suffix.lower() not in _SMALL_SUFFIXES:
            kinds = " ".join(sorted(_SMALL_SUFFIXES))
            raise _unsupported(path, folder, f"is of no kind that is kept ({kinds}); convert or remove it")
        chosen.append(path)
    if (size := sum(path.stat().st_size for path in chosen)) > MAX_SMALL_BYTES:
        raise _unsupported(
            folder, folder, f"has {size} bytes of small files, the limit is {MAX_SMALL_BYTES}; remove some"
        )
    return tuple(chosen)


def _unsupported(path: Path, folder: Path, why: str) -> StoreError:
    shown = path.name if path == folder else path.relative_to(folder)
    return StoreError(StoreErrorCode.UNSUPPORTED_SOURCE, f"{shown} {why}")
