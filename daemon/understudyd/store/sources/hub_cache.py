"""The Hugging Face cache as folders: `models--org--name/{refs,snapshots,blobs}`.

A snapshot is a diffusers folder whose files are links into `blobs`. Its folder's name is the exact commit,
which is what the record of a model names. Reading the cache needs no library and no network.
"""

import re
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ENTRY_PREFIX = "models--"


def is_cache_entry(folder: Path) -> bool:
    """Whether a folder is the cache's of one model repository."""
    return folder.name.startswith(_ENTRY_PREFIX) and (folder / "snapshots").is_dir()


def repository_id(entry: Path) -> str:
    """`org/name` of a cache entry."""
    return entry.name.removeprefix(_ENTRY_PREFIX).replace("--", "/")


def entry_name(repository: str) -> str:
    """The name of the cache entry of `org/name`."""
    return _ENTRY_PREFIX + repository.replace("/", "--")


def snapshot(entry: Path, revision: str | None) -> Path:
    """The snapshot of a branch, tag or commit, "main" if none is named. Raises `StoreError(not_found)`."""
    named = revision or "main"
    commit = named if _COMMIT.fullmatch(named) else _read_reference(entry, named)
    if commit is None and revision is None:
        commit = _only_snapshot(entry)
    folder = entry / "snapshots" / (commit or "")
    if commit is None or not folder.is_dir():
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"the cache has no revision {named!r:.80} of {repository_id(entry)}; it has {_available(entry)}",
        )
    return folder


def snapshot_origin(folder: Path) -> str | None:
    """`org/name@commit` of a folder that is a snapshot of the cache; None if it is none."""
    entry = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) is not None
    return f"{repository_id(entry)}@{folder.name}" if is_snapshot and is_cache_entry(entry) else None


def _read_reference(entry: Path, name: str) -> str | None:
    """The commit that a branch or tag pointed to when it was downloaded."""
    references = (entry / "refs").resolve()
    path = (references / name).resolve()
    if not path.is_relative_to(references) or not path.is_file():
        return None
    commit = path.read_text(errors="replace").strip()
    return commit if _COMMIT.fullmatch(commit) else None


def _only_snapshot(entry: Path) -> str | None:
    """A download by commit leaves no reference: where there is one snapshot, that is meant."""
    commits = _commits(entry)
    return commits[0] if len(commits) == 1 else None


def _commits(entry: Path) -> list[str]:
    return sorted(p.name for p in (entry / "snapshots").iterdir() if _COMMIT.fullmatch(p.name))


def _available(entry: Path) -> str:
    return ", ".join(_commits(entry)) or "none"
