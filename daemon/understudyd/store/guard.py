"""Checking a source folder before anything in it is loaded.

A model folder comes from anywhere. Nothing of it may run: no Python file, no pickle, no remote code, no
class outside the libraries' own. Nothing of it may point elsewhere: no link out of the folder (other
than the Hugging Face cache's), no FIFO, no shard path with a slash. What the guard accepts, and only
that, is given to the library. It imports no torch, so that a refusal takes milliseconds.
"""

import importlib.util
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.safetensors_file import Header, TensorSpan, read_header

PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
_MAX_JSON_BYTES = 64 * 1024 * 1024  # the largest tokenizers are near 35 MB
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)"
    r"(?:\.(?P<variant>[A-Za-z0-9_-]+?))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<legacy>[A-Za-z0-9_-]+))?\.safetensors"
)
_REMOTE_CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines")


@dataclass(frozen=True, slots=True)
class SourcePart:
    """One entry of model_index.json that is not null, with the weight files the library will read.

    `library` is "diffusers", "transformers" or the name of a `diffusers.pipelines` package. `weights` are
    empty for tokenizers and schedulers. `variant` is set when those files are of the asked-for variant.
    """

    name: str
    library: str
    class_name: str
    folder: Path
    weights: tuple[Path, ...]
    weights_bytes: int
    float_dtype: str | None
    variant: str | None


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """A folder that may be loaded."""

    folder: Path
    pipeline_class: str
    parts: tuple[SourcePart, ...]

    @property
    def weights_bytes(self) -> int:
        """What the library will read, in bytes."""
        return sum(part.weights_bytes for part in self.parts)


def check_source(folder: Path, *, variant: str | None = None, ignore_pickle: bool = False) -> SourcePlan:
    """Check a diffusers folder. Raises `StoreError`: what is wrong, in which file, and what to do."""
    folder = folder.resolve()
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise StoreError(
            StoreErrorCode.NOT_FOUND, f"{variant!r:.80} is no variant's name (fp16, for example)"
        )
    files = check_files(folder, ignore_pickle=ignore_pickle)
    plan = _plan(folder, files.headers, variant)
    _check_pickles_are_spare(plan, files.pickles)
    return plan


# -- the tree --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """Every file of a source folder; `headers` are those of its safetensors files."""

    headers: dict[Path, Header]
    pickles: tuple[Path, ...]
    others: tuple[Path, ...]


def check_files(folder: Path, *, ignore_pickle: bool = False) -> SourceFiles:
    """Refuse code, pickles, links out of the folder and malformed files. Raises `StoreError`."""
    headers: dict[Path, Header] = {}
    pickles: list[Path] = []
    others: list[Path] = []
    for path in _files(folder):
        if path.suffix in (".py", ".pyc", ".so"):
            raise _unsafe(path, folder, "is code; a model is data only, ask its author for one without")
        if path.suffix.lower() in PICKLE_SUFFIXES:
            pickles.append(path)
        elif path.suffix == ".safetensors":
            headers[path] = read_header(path)
        else:
            others.append(path)
        if path.suffix == ".json":
            _check_json(path, folder)
    if pickles and not ignore_pickle:
        raise _unsafe(
            pickles[0],
            folder,
            "may run code when read; convert it to safetensors, or pass --ignore-pickle to leave it unread "
            "where a safetensors file of the same component exists",
        )
    return SourceFiles(headers, tuple(pickles), tuple(others))


def _files(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`; raises for anything else a folder may hold."""
    blobs = _cache_blobs(folder)
    for root, names, files in os.walk(folder, followlinks=False):
        names.sort()
        for name in names:
            if (Path(root) / name).is_symlink():
                raise _unsafe(Path(root, name), folder, "is a link to a folder; copy the folder in its place")
        for name in sorted(files):
            path = Path(root, name)
            _check_file(path, folder, blobs)
            yield path


def _cache_blobs(folder: Path) -> tuple[Path, ...]:
    """The blobs folders that a Hugging Face cache snapshot links into: the repository's, the cache's."""
    if folder.parent.name != "snapshots":
        return ()
    repository = folder.parent.parent
    found = [repository / "blobs"]
    if repository.name.startswith("models--"):
        found.append(repository.parent / "blobs")
    return tuple(blobs for blobs in found if blobs.is_dir() and not blobs.is_symlink())


def _check_file(path: Path, folder: Path, blobs: tuple[Path, ...]) -> None:
    try:
        if path.is_symlink():
            target = path.resolve(strict=True)
            if not any(target.is_relative_to(home) for home in (folder, *blobs)):
                raise _unsafe(path, folder, "is a link out of the folder; put the file itself there")
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links (Python before 3.13)
        raise _unsafe(path, folder, f"cannot be examined ({error}); repair or delete it") from error
    if not stat.S_ISREG(mode):
        raise _unsafe(path, folder, "is no regular file (a FIFO, socket or device); delete it")


# -- the JSON files --------------------------------------------------------------------------------


def _check_json(path: Path, folder: Path) -> None:
    document = read_json(path)
    if not isinstance(document, dict):
        return
    for key in _REMOTE_CODE_KEYS:
        if document.get(key):
            raise _unsafe(
                path, folder, f"asks for code of its own ({key}), which is never run; remove the key"
            )
    if path.name == "adapter_config.json":
        raise _unsupported(path, folder, "is an adapter; a LoRA is no model of its own, add its base model")
    if document.get("quantization_config"):
        raise _unsupported(path, folder, "is of a quantised component; use the unquantised model")
    if path.name.endswith(".index.json") or ".safetensors.index." in path.name:
        _check_shard_index(path, folder, document)


def _check_shard_index(path: Path, folder: Path, document: dict[str, Any]) -> None:
    shards = document.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise _corrupt(path, folder, "has no weight_map of file names")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise _unsafe(path, folder, f"names a shard outside its folder ({name!r:.80})")
        if Path(name).suffix == ".safetensors" and not (path.parent / name).is_file():
            raise _corrupt(
                path, folder, f"names the shard {name}, which is missing; download the model again"
            )


def read_json(path: Path) -> Any:
    """A JSON file of a source. Raises `StoreError(corrupt_source)`."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise StoreError(StoreErrorCode.CORRUPT_SOURCE, f"{path} is larger than {_MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            StoreErrorCode.CORRUPT_SOURCE, f"{path} is not readable JSON ({error}); download the model again"
        ) from error


# -- the plan --------------------------------------------------------------------------------------


def _plan(folder: Path, headers: dict[Path, Header], variant: str | None) -> SourcePlan:
    index = folder / "model_index.json"
    document = read_json(index)
    if not isinstance(document, dict):
        raise _corrupt(index, folder, "is no JSON object")
    pipeline_class = document.get("_class_name")
    if not isinstance(pipeline_class, str) or not _IDENTIFIER.fullmatch(pipeline_class):
        raise StoreError(
            StoreErrorCode.UNKNOWN_CLASS,
            f"model_index.json: _class_name is {pipeline_class!r:.80}; it must name a pipeline of diffusers",
        )
    parts = tuple(
        _part(folder, name, entry, headers, variant)
        for name, entry in document.items()
        if not name.startswith("_") and _names_class(entry)
    )
    if variant is not None and not any(part.variant for part in parts):
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"no component of {folder} has weights of the variant {variant!r}; leave it out",
        )
    return SourcePlan(folder, pipeline_class, parts)


def _names_class(entry: Any) -> bool:
    """Tell a component from the pipeline's own arguments (numbers, flags, lists of numbers)."""
    return (
        isinstance(entry, list)
        and entry != [None, None]
        and any(v is None or isinstance(v, str) for v in entry)
    )


def _part(
    folder: Path, name: str, entry: list[Any], headers: dict[Path, Header], variant: str | None
) -> SourcePart:
    if len(entry) != 2 or not all(isinstance(v, str) for v in entry) or not _IDENTIFIER.fullmatch(name):
        raise _corrupt(
            folder / "model_index.json", folder, f"has a malformed entry {name!r:.80}: {entry!r:.80}"
        )
    library, class_name = entry
    if not _IDENTIFIER.fullmatch(class_name) or not known_library(library):
        raise StoreError(
            StoreErrorCode.UNKNOWN_CLASS,
            f"{name} is a {library!r:.80}.{class_name!r:.80}; only classes of diffusers, its pipelines and "
            "transformers are served",
        )
    part_folder = folder / name
    if not part_folder.is_dir():
        raise _corrupt(
            part_folder, folder, "is missing although model_index.json names it; download it again"
        )
    weights, found_variant = weight_files([p for p in headers if p.parent == part_folder], variant)
    chosen = [headers[path] for path in weights]
    size = sum(header.data_size_bytes for header in chosen)
    dtype = main_float_dtype(span for header in chosen for span in header.tensors)
    return SourcePart(name, library, class_name, part_folder, weights, size, dtype, found_variant)


def known_library(library: str) -> bool:
    """Whether model_index.json may name this library: diffusers, transformers, a package of pipelines."""
    if library in ("diffusers", "transformers"):
        return True
    spec = importlib.util.find_spec("diffusers")  # finds it without importing it
    if not _IDENTIFIER.fullmatch(library) or spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "pipelines" / library / "__init__.py").is_file()


def weight_files(paths: Iterable[Path], variant: str | None) -> tuple[tuple[Path, ...], str | None]:
    """What the library reads: the variant's files where there are any, else those of none."""
    by_variant: dict[str | None, list[Path]] = {}
    for path in sorted(paths):
        if match := _WEIGHTS.fullmatch(path.name):
            by_variant.setdefault(match["variant"] or match["legacy"], []).append(path)
    if variant in by_variant:
        return tuple(by_variant[variant]), variant
    return tuple(by_variant.get(None, [])), None


def main_float_dtype(tensors: Iterable[TensorSpan]) -> str | None:
    """The floating dtype that most bytes are of; its safetensors name."""
    sizes: dict[str, int] = {}
    for span in tensors:
        if span.dtype.startswith(("F", "BF")):
            sizes[span.dtype] = sizes.get(span.dtype, 0) + span.size_bytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype)) if sizes else None


def _check_pickles_are_spare(plan: SourcePlan, pickles: Iterable[Path]) -> None:
    for part in plan.parts:
        own = [path for path in pickles if path.parent == part.folder]
        if own and not part.weights:
            raise _unsafe(
                own[0], plan.folder, f"is all there is of {part.name}; convert it to safetensors first"
            )


# -- errors ----------------------------------------------------------------------------------------


def _unsafe(path: Path, folder: Path, why: str) -> StoreError:
    return StoreError(StoreErrorCode.UNSAFE_FILE, f"{_shown(path, folder)} {why}")


def _corrupt(path: Path, folder: Path, why: str) -> StoreError:
    return StoreError(StoreErrorCode.CORRUPT_SOURCE, f"{_shown(path, folder)} {why}")


def _unsupported(path: Path, folder: Path, why: str) -> StoreError:
    return StoreError(StoreErrorCode.UNSUPPORTED_SOURCE, f"{_shown(path, folder)} {why}")


def _shown(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
