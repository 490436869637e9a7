"""A user's own class: found by its entry point, its weights through the store and the arena, its requests."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import custom_kit
from custom_kit import (
    Bad,
    Grid,
    Grown,
    Hungry,
    Painter,
    install,
    plainly,
    random_grid,
    save_model,
    untied_state,
)
from stage_kit import Rig, pixels
from understudy.wire import InputInfo
from understudyd.core.events import ModelPreparationFailed
from understudyd.core.types import ErrorCode, Outcome
from understudyd.pipelines import Request
from understudyd.pipelines.installed import PipelineUnavailable, find_installed
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.ingest import ingest
from understudyd.store.store import Store

CLASSES = ("Painter", "Reader", "Grown", "Careless", "Hungry", "Bad", "Hiding", "NoPipeline")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of the kit under its name in small letters; as if just imported."""
    install(tmp_path / "site", "kit", {name.lower(): f"custom_kit:{name}" for name in CLASSES})
    monkeypatch.syspath_prepend(tmp_path / "site")
    for cls in (Painter, Grown, Hungry, Bad):
        monkeypatch.setattr(cls, "built", [])
        monkeypatch.setattr(cls, "started", [])
    monkeypatch.setattr(Hungry, "tries", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", writable=True)


@pytest.fixture
def rig(store: Store) -> Iterator[Rig]:
    rig = Rig(store, arena_bytes=1 << 20)
    yield rig
    rig.close()


def grid_folder(folder: Path, seed: int, size: int = 8, **files: str) -> Path:
    folder = save_model(folder, {}, **files)
    save_file(untied_state(random_grid(seed, size)), folder / "grid.safetensors")
    return folder


def add(store: Store, tmp_path: Path, name: str, seed: int, pipeline: str = "painter", **files: str) -> None:
    ingest(store, name, grid_folder(tmp_path / "sources" / name, seed, **files), pipeline=pipeline)


def preparation_error(rig: Rig, name: str) -> str:
    rig.stage.prepare_model(name)
    rig.wait_until(lambda: any(isinstance(e, ModelPreparationFailed) for e in rig.events))
    return next(e.message for e in rig.events if isinstance(e, ModelPreparationFailed))


# -- serving -----------------------------------------------------------------------------------------------


def test_there_and_back_equals_the_modules_alone(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    add(store, tmp_path, "b", 2, offset__txt="0.5")
    rig.serve("a", "b")
    expected = {"a": plainly(random_grid(1)), "b": plainly(random_grid(2), offset=0.5)}
    assert expected["a"] != expected["b"]
    for name in ("a", "b", "a", "a", "b"):
        assert pixels(rig.run(name, width=8, height=8)) == [expected[name]], name
        assert rig.strays() == []


def test_fine_tunes_share_a_skeleton_and_equal_weights_a_blob(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    add(store, tmp_path, "same", 1, offset__txt="0.5")
    add(store, tmp_path, "b", 2)
    Painter.built.clear()
    rig.serve("a", "same", "b")
    assert Painter.built == ["grid"] and len(rig.stage.skeletons()) == 1
    assert Painter.started == ["started"]
    assert store.model("a").components == store.model("same").components
    assert len(list((store.path / "blobs").iterdir())) == 2


def test_another_config_is_another_signature(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    source = grid_folder(tmp_path / "wide", 3, 8, config__json='{"size": 8, "note": "same size"}')
    record = ingest(store, "wide", source, pipeline="painter")
    assert record.init_kwargs == {"size": 8, "note": "same size"}
    assert record.components[0].signature != store.model("a").components[0].signature
    rig.serve("a", "wide")
    assert pixels(rig.run("wide")) == [plainly(random_grid(3))]


def test_every_tensor_is_recorded_and_bound(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    record = store.model("a")
    signature = store.signature(record.components[0].signature)
    assert (record.pipeline_library, record.pipeline_class) == ("understudy.pipelines", "painter")
    assert (signature.library, signature.class_name) == ("understudy.pipelines", "painter:grid")
    kinds = {t.path: t.kind for t in signature.tensors}
    assert kinds["wave"] == "temporary_buffer" and kinds["bend"] == kinds["tables.0"] == "attribute"
    assert [t.alias_of for t in signature.tensors if t.path == "last.weight"] == ["first.weight"]
    rig.serve("a")
    rig.run("a")
    assert rig.strays() == []


def test_weights_may_be_read_without_a_call(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1, "reader")
    rig.serve("a")
    level = int(random_grid(1).first.weight.abs().sum().item() * 10) % 256
    assert pixels(rig.run("a")) == [bytes([level, 0, 0] * 64)]


def test_a_dtype_casts_the_module(store: Store, rig: Rig, tmp_path: Path) -> None:
    source = grid_folder(tmp_path / "source", 1)
    ingest(store, "half", source, pipeline="painter", dtype="bf16")
    rig.serve("half")
    assert pixels(rig.run("half")) == [plainly(random_grid(1).to(torch.bfloat16))]
    state = {name: t.half() if name == "kept" else t for name, t in untied_state(random_grid(1)).items()}
    save_file(state, source / "grid.safetensors")
    record = ingest(store, "mixed", source, pipeline="painter")
    dtypes = {t.path: t.dtype for t in store.signature(record.components[0].signature).tensors}
    assert dtypes["kept"] == "F16" and dtypes["first.weight"] == "F32"


def test_options_and_inputs_reach_the_class(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    rig.serve("a")
    assert pixels(rig.run("a", options={"gain": 2})) == [plainly(random_grid(1), gain=2.0)]
    info = InputInfo(name="image", format="raw", width=8, height=8)
    plain = Painter({"grid": random_grid(1)}, 0.0, {})
    with torch.no_grad():
        image = Image.frombytes("RGB", (8, 8), bytes(range(192)))
        request = Request(
            seed=7,
            steps=2,
            options={"gain": 1.0},
            inputs={"image": (image,), "mask_image": ()},
        )
        expected = (plain(request)[0].permute(1, 2, 0) * 255).round().byte().numpy().tobytes()
    assert pixels(rig.run("a", inputs=((info, bytes(range(192))),))) == [expected]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"options": {"gian": 1.0}}, "did you mean 'gain'"),
        ({"options": {"gain": True}}, "gain is True; it must be a number"),
        ({"options": {"gain": float("inf")}}, "it must be a number"),
        ({"options": {"loud": 1}}, "it must be true or false"),
        ({"options": {"words": "one"}}, "it must be a list"),
        ({"task": "inpainting"}, "takes no task"),
        ({"scheduler": "euler"}, "takes no scheduler"),
        ({"format": "latent"}, "finished images only"),
        ({"prompt": "refuse me"}, "not this prompt; send another"),
        (
            {"inputs": ((InputInfo(name="pose", format="raw", width=1, height=1), b"rgb"),)},
            "no input 'pose'",
        ),
    ],
)
def test_what_the_caller_got_wrong(
    store: Store, rig: Rig, tmp_path: Path, asked: dict[str, Any], says: str
) -> None:
    add(store, tmp_path, "a", 1)
    rig.serve("a")
    ended = rig.fail("a", **asked)
    assert ended.code is ErrorCode.BAD_REQUEST and says in ended.message
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("bug", "bad failed (TypeError: a bug, not the caller)"),
        ("exit", "bad failed (SystemExit: 3)"),
        ("steps", "reported step 3 of 2"),
        ("output", "gave str"),
    ],
)
def test_what_the_class_got_wrong_fails_one_request(
    store: Store, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, says: str
) -> None:
    add(store, tmp_path, "a", 1, "bad")
    rig.serve("a")
    monkeypatch.setattr(Bad, "where", where)
    ended = rig.fail("a")
    assert ended.code is ErrorCode.INTERNAL and says in ended.message
    monkeypatch.setattr(Bad, "where", "")
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]


def test_an_error_in_prepare_that_is_no_refusal_is_the_classs_own(
    store: Store, rig: Rig, tmp_path: Path
) -> None:
    add(store, tmp_path, "a", 1)
    rig.serve("a")
    assert rig.fail("a", prompt="bug before").code is ErrorCode.INTERNAL


def test_cancelled_half_way(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    add(store, tmp_path, "b", 2)
    rig.serve("a", "b")
    rig.cancel_at_step("r1", 3)
    ended = rig.ended(rig.submit("a", steps=100))
    assert ended.outcome is Outcome.CANCELLED
    assert [step for _, step, _ in rig.progress] == [1, 2, 3]
    assert rig.strays() == []
    assert pixels(rig.run("b")) == [plainly(random_grid(2))]
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]


def test_a_swallowed_cancel_ends_the_request_all_the_same(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1, "careless")
    rig.serve("a")
    rig.cancel_at_step("r1", 3)
    assert rig.ended(rig.submit("a")).outcome is Outcome.CANCELLED


def test_no_memory_is_tried_once_more(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1, "hungry")
    rig.serve("a")
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]
    assert Hungry.tries == 2


# -- preparing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("on_startup", "on_startup of bad (of kit 1.0) failed (SystemExit: no licence)"),
        ("components", "KeyError: 'width'"),
        ("__init__", "no tokenizer"),
    ],
)
def test_a_class_that_cannot_be_prepared_fails_its_own_models(
    store: Store, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, says: str
) -> None:
    add(store, tmp_path, "a", 1, "bad")
    add(store, tmp_path, "b", 2)
    monkeypatch.setattr(Bad, "where", where)
    rig.stage.start_custom_classes()
    error = preparation_error(rig, "a")
    assert error.startswith("PipelineUnavailable: ") and says in error
    rig.serve("b")
    assert pixels(rig.run("b")) == [plainly(random_grid(2))]


def test_a_package_that_is_gone_fails_its_own_models(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    next((tmp_path / "site").glob("*.dist-info")).rename(tmp_path / "uninstalled")
    error = preparation_error(rig, "a")
    assert "no installed package provides the pipeline 'painter'" in error
    assert "or restart the daemon if it was installed after the daemon started" in error


@pytest.mark.parametrize(
    ("version", "says"),
    [(2, "more is in no blob of this signature; add the model again"), (3, "add the model again")],
)
def test_code_that_makes_other_tensors_asks_for_the_model_again(
    store: Store, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, says: str
) -> None:
    add(store, tmp_path, "a", 1, "grown")
    monkeypatch.setattr(Grown, "version", version)
    error = preparation_error(rig, "a")
    assert (
        error.startswith("SkeletonMismatch: grown is not the code that the model was added with")
        and says in error
    )


def test_classes_are_started_once_and_before_their_models(store: Store, rig: Rig, tmp_path: Path) -> None:
    add(store, tmp_path, "a", 1)
    add(store, tmp_path, "b", 2)
    assert Painter.started == []  # not when a model is added
    rig.stage.start_custom_classes()
    assert Painter.started == ["started"]
    rig.serve("a", "b")
    assert Painter.started == ["started"]


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
    add(store, tmp_path, "whole", 1)
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


def test_a_request_can_be_made_by_hand() -> None:
    grid: nn.Module = random_grid(1)
    assert isinstance(grid, Grid)
    told: list[tuple[int, int]] = []
    request = Request(
        seed=7,
        options={"gain": 1.0},
        inputs={"image": ()},
        on_step=lambda done, total: told.append((done, total)),
    )
    with torch.no_grad():
        image = custom_kit.Painter({"grid": grid}, 0.0, {})(request)
    assert image.shape == (1, 3, 8, 8) and told == [(1, 2), (2, 2)]


def test_the_pages_package_says_which_of_the_pages_files_is_its_module() -> None:
    """The page's other scripts lie beside it, and setuptools refuses to guess among several."""
    settings = tomllib.loads(custom_kit.page_block("pyproject.toml"))
    (target,) = settings["project"]["entry-points"]["understudy.pipelines"].values()
    assert settings["tool"]["setuptools"]["py-modules"] == [target.partition(":")[0]]
