"""Downloading a model from the Hugging Face hub into its cache: what is needed, and nothing that may run.

`huggingface_hub` does the work, so HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what
they mean everywhere. First `model_index.json`, then of the components it names the JSON and vocabulary files
and the safetensors of the variant: never pickles, never Python. All files are of one commit.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudyd.store.errors import FULL_DISK, StoreError, StoreErrorCode
from understudyd.store.guard import PICKLE_SUFFIXES, weight_files
from understudyd.store.sources.hub_cache import entry_name, snapshot

INDEX = "model_index.json"
_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})
_SHARD_INDEX = re.compile(r".*\.safetensors\.index(?:\.(?P<variant>[A-Za-z0-9_-]+))?\.json")

OnBytes = Callable[[int, int], None]
"""`on_bytes(done, total)`: bytes of all files together."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of models and the branch, tag or commit that is asked for."""

    repository: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; the hub says how long it is."""

    path: str
    size_bytes: int


def parse_hub_id(source: str, revision: str | None = None) -> HubId | None:
    """`org/name[@revision]`; None for what cannot be a hub id. Raises `StoreError` for two revisions."""
    match = _ID.fullmatch(source)
    if match is None or ".." in source or "--" in match["repository"]:
        return None
    if revision is not None and match["revision"] not in (None, revision):
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"{source} names a revision, --revision {revision!r:.80} another; leave one out",
        )
    return HubId(match["repository"], revision or match["revision"])


def download(hub_id: HubId, *, variant: str | None, on_bytes: OnBytes = lambda done, total: None) -> Path:
    """The snapshot folder of a model, whole, in the cache; its name is the commit.

    Offline (HF_HUB_OFFLINE) the cache must have it. Raises `StoreError`.
    """
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return _cached(Path(constants.HF_HUB_CACHE), hub_id)
    with translated_hub_errors(hub_id):
        api = HfApi()
        # By branch or tag: the cache then remembers, for offline use, which commit that was.
        index = Path(api.hf_hub_download(hub_id.repository, INDEX, revision=hub_id.revision))
        commit = index.parent.name
        info = api.model_info(hub_id.repository, revision=commit, files_metadata=True)
        files = [RemoteFile(s.rfilename, s.size or 0) for s in info.siblings or ()]
        needed = needed_files(hub_id, json.loads(index.read_bytes()), files, variant)
        fetch_files(api, HubId(hub_id.repository, commit), needed, on_bytes)
        return index.parent


def fetch_files(api: Any, hub_id: HubId, files: Sequence[RemoteFile], on_bytes: OnBytes) -> list[Path]:
    """Files of a repository, in the cache. Raises what the library raises: see `translated_hub_errors`."""
    bar = _bar_class(sum(file.size_bytes for file in files), on_bytes)
    # Bars by the byte are younger than the oldest release that is supported.
    has_bars = "tqdm_class" in inspect.signature(api.hf_hub_download).parameters
    options = {"tqdm_class": bar} if has_bars else {}
    paths = []
    for file in files:
        path = api.hf_hub_download(hub_id.repository, file.path, revision=hub_id.revision, **options)
        paths.append(Path(path))
        bar.finish(file)
    return paths


def needed_files(
    hub_id: HubId, index: Any, files: Sequence[RemoteFile], variant: str | None
) -> list[RemoteFile]:
    """What to download of a repository. Raises `StoreError` when a component has no safetensors to read."""
    if not isinstance(index, dict):
        raise _no_pipeline(hub_id)
    chosen = []
    for name, entry in index.items():
        if _COMPONENT.fullmatch(name) and isinstance(entry, list) and any(entry):
            own = [file for file in files if Path(file.path).parent == Path(name)]
            chosen += _component_files(hub_id, name, own, variant)
    return chosen


def _component_files(
    hub_id: HubId, name: str, files: list[RemoteFile], variant: str | None
) -> list[RemoteFile]:
    paths = [Path(file.path) for file in files]
    weights, found_variant = weight_files((p for p in paths if p.suffix == ".safetensors"), variant)
    if not weights:
        _refuse_other_weights(hub_id, name, paths)
    wanted = {str(path) for path in weights}
    for path in paths:
        is_shard_index = ".index." in path.name
        match = _SHARD_INDEX.fullmatch(path.name)
        is_ours = match is not None and match["variant"] == found_variant
        if path.suffix in _SMALL_SUFFIXES and (is_ours or not is_shard_index):
            wanted.add(str(path))
    return [file for file in files if file.path in wanted]


def _refuse_other_weights(hub_id: HubId, name: str, paths: list[Path]) -> None:
    """A component that has weights, but none that would be read."""
    repository = hub_id.repository
    if others := [path.name for path in paths if path.suffix == ".safetensors"]:
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"{repository} has no such weights of {name}, but {others[0]}; name the variant (--variant fp16)",
        )
    if pickles := [path.name for path in paths if path.suffix.lower() in PICKLE_SUFFIXES]:
        raise StoreError(
            StoreErrorCode.UNSAFE_FILE,
            f"{repository} has {name} as a pickle only ({pickles[0]}), which may run code when read; "
            "look for a revision or a repository with safetensors",
        )


def _cached(cache: Path, hub_id: HubId) -> Path:
    """The snapshot that the cache has. Whether it is whole, the guard and the libraries find out."""
    entry = cache / entry_name(hub_id.repository)
    if not entry.is_dir():
        raise StoreError(
            StoreErrorCode.HUB_OFFLINE,
            f"{hub_id.repository} is not in the cache {cache}, and HF_HUB_OFFLINE forbids to download it; "
            "unset that, or download the model where there is a network",
        )
    folder = snapshot(entry, hub_id.revision)
    if not (folder / INDEX).is_file():
        raise _no_pipeline(hub_id)
    return folder


# -- progress --------------------------------------------------------------------------------------


def _bar_class(total_bytes: int, on_bytes: OnBytes) -> Any:
    """A class in tqdm's place that adds up the bytes of all files."""
    from huggingface_hub.utils import tqdm

    finished_bytes = 0

    class Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        """One file's bar: shows nothing, counts."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.seen_bytes = int(kwargs.get("initial") or 0)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.seen_bytes += int(n or 0)
            on_bytes(min(total_bytes, finished_bytes + self.seen_bytes), total_bytes)
            return None

        @staticmethod
        def finish(file: RemoteFile) -> None:
            """A file is there, downloaded or from the cache."""
            nonlocal finished_bytes
            finished_bytes += file.size_bytes
            on_bytes(min(total_bytes, finished_bytes), total_bytes)

    return Bar


# -- errors ----------------------------------------------------------------------------------------


def _no_pipeline(hub_id: HubId) -> StoreError:
    return StoreError(
        StoreErrorCode.UNSUPPORTED_SOURCE,
        f"{hub_id.repository} has no model_index.json: it is no diffusers pipeline; a LoRA is "
        "added with `understudyctl add-lora`; else look for a repository that is a pipeline, or download its "
        "single file and add that (--like MODEL)",
    )


@contextmanager
def translated_hub_errors(hub_id: HubId) -> Iterator[None]:
    """Turn what the library and its HTTP client raise into `StoreError`."""
    from huggingface_hub import errors

    at = f" at {hub_id.revision!r:.80}" if hub_id.revision else ""
    what = f"{hub_id.repository}{at}"
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except errors.GatedRepoError as error:
        raise StoreError(
            StoreErrorCode.HUB_FORBIDDEN,
            f"{what} is gated: accept its conditions on its page, then give a token of that account as "
            "HF_TOKEN (in the daemon's environment, or in that of `understudyd ingest`)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise StoreError(
            StoreErrorCode.NOT_FOUND, f"{hub_id.repository} has no revision {hub_id.revision!r:.80}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise StoreError(
            StoreErrorCode.NOT_FOUND,
            f"the hub has no model {what}, or it is private: check the spelling, or give a token as HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:  # what the library raises without a network
        raise _unreachable(what, error) from error
    except errors.EntryNotFoundError as error:
        raise _no_pipeline(hub_id) from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise StoreError(
                StoreErrorCode.HUB_FORBIDDEN,
                f"the hub forbids {what}: give a token that may read it as HF_TOKEN",
            ) from error
        raise _unreachable(what, error) from error
    except OSError as error:
        if error.errno in FULL_DISK:
            raise StoreError(
                StoreErrorCode.DISK_FULL,
                f"{what} cannot be downloaded: the disk of the cache (HF_HOME) is full; free space",
            ) from error
        raise _unreachable(what, error) from error
    except ValueError as error:  # an id that the hub's own rules forbid, a document that is no JSON
        raise StoreError(StoreErrorCode.NOT_FOUND, f"{what} cannot be read: {str(error)[:300]}") from error
    except Exception as error:  # the seam: each release has an HTTP client of its own
        raise _unreachable(what, error) from error


def _unreachable(what: str, error: Exception) -> StoreError:
    return StoreError(
        StoreErrorCode.HUB_UNREACHABLE,
        f"{what} cannot be downloaded ({type(error).__name__}: {str(error)[:300]}); check the network "
        "and HF_ENDPOINT and try again, or set HF_HUB_OFFLINE=1 to use what the cache has",
    )
