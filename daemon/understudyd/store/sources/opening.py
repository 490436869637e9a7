"""The one place that tells the kinds of sources apart."""

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.sources.checkpoint import Checkpoint, read_checkpoint
from understudyd.store.sources.hub import INDEX, OnBytes, download, parse_hub_id
from understudyd.store.sources.hub_adapter import SETTINGS, USUAL
from understudyd.store.sources.hub_cache import is_cache_entry, snapshot, snapshot_origin


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A diffusers folder; `origin` is what a model's record names, with the commit where that is known.

    `is_picked`: a download of chosen files, so that pickles beside them are none of ours.
    """

    folder: Path
    origin: str
    is_picked: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A single-file checkpoint."""

    checkpoint: Checkpoint
    origin: str


def open_source(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    on_bytes: OnBytes = lambda done, total: None,
) -> FolderSource | CheckpointSource:
    """What `source` is: a diffusers folder, a cache entry or snapshot, a checkpoint, or a hub id.

    What exists here is taken for a path before it is taken for a hub id, which is downloaded; `on_bytes`
    follows that. Raises `StoreError`.
    """
    path = Path(source)
    if _is_there(path):
        if revision is not None and not is_cache_entry(path):
            raise StoreError(
                StoreErrorCode.NOT_FOUND,
                f"{source} is a path, which has no revisions; leave --revision {revision!r:.80} out",
            )
        return _open_path(path, revision)
    hub_id = parse_hub_id(source, revision) if isinstance(source, str) else None
    if hub_id is None:
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"there is no {source}; give a diffusers folder, a .safetensors checkpoint or a hub id, org/name",
        )
    folder = download(hub_id, variant=variant, on_bytes=on_bytes)
    return FolderSource(folder, f"{hub_id.repository}@{folder.name}", is_picked=True)


def _open_path(path: Path, revision: str | None) -> FolderSource | CheckpointSource:
    if is_cache_entry(path):
        path = snapshot(path, revision)
    if (path / INDEX).is_file():
        return FolderSource(path, snapshot_origin(path.resolve()) or str(path))
    if path.is_dir():
        is_lora = any((path / name).exists() for name in (SETTINGS, *USUAL))
        advice = (
            "it looks like a LoRA, which is added with `understudyctl add-lora`"
            if is_lora
            else "to add all models below it, scan it (--scan)"
        )
        raise StoreError(
            StoreErrorCode.UNSUPPORTED_SOURCE,
            f"{path} has no model_index.json: it is no diffusers pipeline folder; {advice}",
        )
    return CheckpointSource(read_checkpoint(path), str(path))


def _is_there(path: Path) -> bool:
    """Whether there is something at `path` that may be read. Raises `StoreError(unreadable)`."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise _unreadable(path) from error
    except (OSError, ValueError):
        return False
    wanted = os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)
    if not os.access(path, wanted):
        raise _unreadable(path)
    return True


def _unreadable(path: Path) -> StoreError:
    return StoreError(
        StoreErrorCode.UNREADABLE,
        f"user {user_name()} may not read {path}; let that user read it and try again",
    )


def user_name() -> str:
    """Who this process runs as; the number of a user without a name."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
