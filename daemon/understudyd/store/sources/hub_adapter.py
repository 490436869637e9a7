"""Downloading a LoRA from the Hugging Face hub into its cache: weights, PEFT's settings, nothing else."""

from collections.abc import Sequence
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.sources.hub import (
    INDEX,
    HubId,
    OnBytes,
    RemoteFile,
    fetch_files,
    translated_hub_errors,
)
from understudyd.store.sources.hub_cache import entry_name, snapshot

SETTINGS = "adapter_config.json"
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_TRAINING = ("checkpoint", "optimizer", "scheduler")  # diffusers passes these over, too
_LISTED = 5


def download_adapter(
    hub_id: HubId, *, weight_name: str | None = None, on_bytes: OnBytes = lambda done, total: None
) -> Path:
    """The weights' file in the cache, below a folder that is named after the commit.

    Offline (HF_HUB_OFFLINE) the cache must have it. Raises `StoreError`, also when the repository has several
    files and `weight_name` names none.
    """
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return _cached(Path(constants.HF_HUB_CACHE), hub_id, weight_name)
    with translated_hub_errors(hub_id):
        api = HfApi()
        info = api.model_info(hub_id.repository, revision=hub_id.revision, files_metadata=True)
        files = {s.rfilename: RemoteFile(s.rfilename, s.size or 0) for s in info.siblings or ()}
        weights = files[choose_weights(hub_id, list(files), weight_name)]
        # By branch or tag: the cache then remembers, for offline use, which commit that was.
        (path,) = fetch_files(api, hub_id, [weights], on_bytes)
        settings = str(Path(weights.path).with_name(SETTINGS))
        if settings in files:
            commit = HubId(hub_id.repository, info.sha)
            fetch_files(api, commit, [files[settings]], lambda done, total: None)
        return path


def choose_weights(hub_id: HubId, paths: Sequence[str], weight_name: str | None) -> str:
    """Which file of a repository is the LoRA. Raises `StoreError`."""
    if weight_name is not None:
        if weight_name in paths and weight_name.endswith(".safetensors"):
            return weight_name
        raise _unclear(hub_id, f"has no safetensors file {weight_name!r:.80}", paths)
    candidates = [path for path in paths if path.endswith(".safetensors") and "/" not in path]
    candidates = [path for path in candidates if not any(word in path for word in _TRAINING)]
    for usual in USUAL:
        if usual in candidates:
            return usual
    if INDEX in paths:
        raise is_a_model(hub_id.repository)
    if len(candidates) == 1:
        return candidates[0]
    raise _unclear(hub_id, f"has {len(candidates)} safetensors files that may be the LoRA", paths)


def is_a_model(what: object) -> StoreError:
    """For who takes a whole pipeline for a LoRA."""
    return StoreError(
        StoreErrorCode.NOT_PLAIN_LORA,
        f"{what} is a diffusers pipeline, no LoRA; add it with `understudyctl add NAME {what}`",
    )


def _cached(cache: Path, hub_id: HubId, weight_name: str | None) -> Path:
    entry = cache / entry_name(hub_id.repository)
    if not entry.is_dir():
        raise StoreError(
            StoreErrorCode.HUB_OFFLINE,
            f"{hub_id.repository} is not in the cache {cache}, and HF_HUB_OFFLINE forbids to download it; "
            "unset that, or download the LoRA where there is a network",
        )
    folder = snapshot(entry, hub_id.revision)
    paths = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return folder / choose_weights(hub_id, paths, weight_name)


def _unclear(hub_id: HubId, why: str, paths: Sequence[str]) -> StoreError:
    weights = [path for path in paths if path.endswith(".safetensors")]
    listed = ", ".join(weights[:_LISTED]) + (", ..." if len(weights) > _LISTED else "")
    return StoreError(
        StoreErrorCode.NOT_FOUND,
        f"{hub_id.repository} {why}; name one of its files (--weight-name): {listed or 'it has none'}",
    )
