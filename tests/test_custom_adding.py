"""A user's own class and its weights are added: what is taken, and what is refused and leaves nothing."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from custom_kit import (
    Bad,
    add_grid,
    custom_store,
    grid_folder,
    install,
    random_grid,
    save_model,
    untied_state,
)
from understudyd.pipelines.installed import PipelineUnavailable, find_installed
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.ingest import ingest
from understudyd.store.store import Store


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return custom_store(tmp_path, monkeypatch)


# -- adding ------------------------------------------------------------------------------------------------


def refusal(store: Store, source: Path, pipeline: str = "painter", **options: Any) -> StoreError:
    """Why a source is refused; nothing of it may be left."""
    with pytest.raises(StoreError) as caught:
        ingest(store, "a", source, pipeline=pipeline, **options)
    assert store.names() == [] and not list((store.path / "blobs").iterdir())
    assert not list((store.path / "tmp").iterdir())
    return caught.value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first.bias": None}, "Missing key"),
        ({"extra": torch.zeros(1)}, "Unexpected key"),
        ({"kept": torch.zeros(3)}, "size mismatch"),
        ({"last.weight": torch.zeros(8, 8)}, "are tied, but their weights differ"),
    ],
)
def test_state_dicts_are_loaded_strictly(
    store: Store, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    state = untied_state(random_grid(1)) | change
    source = save_model(tmp_path / "source", {})
    save_file({name: t for name, t in state.items() if t is not None}, source / "grid.safetensors")
    error = refusal(store, source)
    assert error.code is StoreErrorCode.CORRUPT_SOURCE and says in error.message


def test_both_of_a_tie_and_several_files_are_fine(store: Store, tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in random_grid(1).state_dict().items()}
    folder = tmp_path / "source" / "grid"
    folder.mkdir(parents=True)
    save_file({"last.weight": state.pop("last.weight")}, folder / "1.safetensors")
    save_file(state, folder / "2.safetensors")
    split = ingest(store, "split", tmp_path / "source", pipeline="painter")
    add_grid(store, tmp_path, "whole", 1)
    assert split.components == store.model("whole").components
    save_file({"kept": state["kept"]}, folder / "3.safetensors")
    with pytest.raises(StoreError, match="kept in more than one file"):
        ingest(store, "twice", tmp_path / "source", pipeline="painter")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("code.py", StoreErrorCode.UNSAFE_FILE, "is code"),
        ("grid.bin", StoreErrorCode.UNSAFE_FILE, "may run code"),
        ("words.npy", StoreErrorCode.UNSUPPORTED_SOURCE, "no kind that is kept"),
        ("manifest.json", StoreErrorCode.UNSUPPORTED_SOURCE, "rename it"),
        ("config.json", StoreErrorCode.CORRUPT_SOURCE, "is no JSON object"),
    ],
)
def test_the_folder_is_not_trusted(
    store: Store, tmp_path: Path, name: str, code: StoreErrorCode, says: str
) -> None:
    source = grid_folder(tmp_path / "source", 1)
    (source / name).write_text("[]")
    error = refusal(store, source)
    assert error.code is code and says in error.message


def test_a_link_out_of_the_folder_is_refused(store: Store, tmp_path: Path) -> None:
    source = grid_folder(tmp_path / "source", 1)
    (tmp_path / "secret.txt").write_text("x")
    os.symlink(tmp_path / "secret.txt", source / "words.txt")
    assert refusal(store, source).code is StoreErrorCode.UNSAFE_FILE


def test_weights_must_be_of_the_classs_components(store: Store, tmp_path: Path) -> None:
    source = grid_folder(tmp_path / "source", 1)
    (source / "grid.safetensors").rename(source / "gird.safetensors")
    assert (
        "weights of gird, but the components of painter (of kit 1.0) are grid"
        in refusal(store, source).message
    )
    save_file({"x": torch.zeros(1)}, source / "deep.safetensors")
    (source / "a" / "b").mkdir(parents=True)
    (source / "deep.safetensors").rename(source / "a" / "b" / "deep.safetensors")
    assert "lies too deep" in refusal(store, source).message


def test_small_files_are_kept_and_documents_are_not(store: Store, tmp_path: Path) -> None:
    source = grid_folder(tmp_path / "source", 1, offset__txt="1", README__md="# hello", LICENSE="mine")
    (source / "words").mkdir()
    (source / "words" / "list.json").write_text("[]")
    ingest(store, "a", source, pipeline="painter")
    folder = store.model_folder("a")
    kept = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert kept == ["manifest.json", "offset.txt", "words/list.json"]
    (source / "offset.txt").write_text("2")
    with pytest.raises(StoreError, match="with other content"):
        ingest(store, "a", source, pipeline="painter")


@pytest.mark.parametrize(
    ("pipeline", "code", "says"),
    [
        ("pinter", StoreErrorCode.UNKNOWN_CLASS, "did you mean 'painter'"),
        ("nopipeline", StoreErrorCode.PIPELINE_FAILED, "no subclass of understudyd.pipelines.CustomPipeline"),
        ("missing", StoreErrorCode.PIPELINE_FAILED, "cannot be imported (ModuleNotFoundError"),
        ("double", StoreErrorCode.UNKNOWN_CLASS, "one 1.0 and two 1.0 both provide"),
    ],
)
def test_classes_that_cannot_be_used(
    store: Store, tmp_path: Path, pipeline: str, code: StoreErrorCode, says: str
) -> None:
    install(tmp_path / "site", "one", {"missing": "no_such_module:X", "double": "custom_kit:Painter"})
    install(tmp_path / "site", "two", {"double": "custom_kit:Painter"})
    error = refusal(store, grid_folder(tmp_path / "source", 1), pipeline)
    assert error.code is code and says in error.message


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("components", "components() of bad (of kit 1.0) failed (KeyError"),
        ("modules", "must give builders by name"),
    ],
)
def test_components_are_checked_when_a_model_is_added(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, says: str
) -> None:
    monkeypatch.setattr(Bad, "where", where)
    error = refusal(store, grid_folder(tmp_path / "source", 1), "bad")
    assert error.code is StoreErrorCode.PIPELINE_FAILED and says in error.message


def test_tensors_out_of_sight_are_refused(store: Store, tmp_path: Path) -> None:
    error = refusal(store, grid_folder(tmp_path / "source", 1), "hiding")
    assert "grid.first.table is a Table that holds tensors" in error.message


def test_a_config_without_json_form_is_refused(store: Store, tmp_path: Path) -> None:
    source = grid_folder(tmp_path / "source", 1, config__json='{"size": NaN}')
    assert "NaN" in refusal(store, source).message


def test_options_of_diffusers_models_are_refused(store: Store, tmp_path: Path) -> None:
    error = refusal(store, grid_folder(tmp_path / "source", 1), variant="fp16")
    assert "are for diffusers models" in error.message


def test_a_folder_without_entry_point_is_no_model(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"model_index\.json"):
        ingest(store, "a", grid_folder(tmp_path / "source", 1))
    with pytest.raises(PipelineUnavailable, match="there are bad, careless"):
        find_installed("zebra")
