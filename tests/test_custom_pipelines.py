"""A user's own class: found by its entry point, its weights through the store and the arena, its requests."""

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
    add_grid,
    custom_store,
    grid_folder,
    plainly,
    random_grid,
    untied_state,
)
from stage_kit import Rig, pixels
from understudy.wire import InputInfo
from understudyd.core.events import ModelPreparationFailed
from understudyd.core.types import ErrorCode, Outcome
from understudyd.pipelines import Request
from understudyd.store.ingest import ingest
from understudyd.store.store import Store


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return custom_store(tmp_path, monkeypatch)


@pytest.fixture
def rig(store: Store) -> Iterator[Rig]:
    rig = Rig(store, arena_bytes=1 << 20)
    yield rig
    rig.close()


def preparation_error(rig: Rig, name: str) -> str:
    rig.stage.prepare_model(name)
    rig.wait_until(lambda: any(isinstance(e, ModelPreparationFailed) for e in rig.events))
    return next(e.message for e in rig.events if isinstance(e, ModelPreparationFailed))


# -- serving -----------------------------------------------------------------------------------------------


def test_there_and_back_equals_the_modules_alone(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
    add_grid(store, tmp_path, "b", 2, offset__txt="0.5")
    rig.serve("a", "b")
    expected = {"a": plainly(random_grid(1)), "b": plainly(random_grid(2), offset=0.5)}
    assert expected["a"] != expected["b"]
    for name in ("a", "b", "a", "a", "b"):
        assert pixels(rig.run(name, width=8, height=8)) == [expected[name]], name
        assert rig.strays() == []


def test_fine_tunes_share_a_skeleton_and_equal_weights_a_blob(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
    add_grid(store, tmp_path, "same", 1, offset__txt="0.5")
    add_grid(store, tmp_path, "b", 2)
    Painter.built.clear()
    rig.serve("a", "same", "b")
    assert Painter.built == ["grid"] and len(rig.stage.skeletons()) == 1
    assert Painter.started == ["started"]
    assert store.model("a").components == store.model("same").components
    assert len(list((store.path / "blobs").iterdir())) == 2


def test_another_config_is_another_signature(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
    source = grid_folder(tmp_path / "wide", 3, 8, config__json='{"size": 8, "note": "same size"}')
    record = ingest(store, "wide", source, pipeline="painter")
    assert record.init_kwargs == {"size": 8, "note": "same size"}
    assert record.components[0].signature != store.model("a").components[0].signature
    rig.serve("a", "wide")
    assert pixels(rig.run("wide")) == [plainly(random_grid(3))]


def test_every_tensor_is_recorded_and_bound(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
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
    add_grid(store, tmp_path, "a", 1, "reader")
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
    add_grid(store, tmp_path, "a", 1)
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
    add_grid(store, tmp_path, "a", 1)
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
    add_grid(store, tmp_path, "a", 1, "bad")
    rig.serve("a")
    monkeypatch.setattr(Bad, "where", where)
    ended = rig.fail("a")
    assert ended.code is ErrorCode.INTERNAL and says in ended.message
    monkeypatch.setattr(Bad, "where", "")
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]


def test_an_error_in_prepare_that_is_no_refusal_is_the_classs_own(
    store: Store, rig: Rig, tmp_path: Path
) -> None:
    add_grid(store, tmp_path, "a", 1)
    rig.serve("a")
    assert rig.fail("a", prompt="bug before").code is ErrorCode.INTERNAL


def test_cancelled_half_way(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
    add_grid(store, tmp_path, "b", 2)
    rig.serve("a", "b")
    rig.cancel_at_step("r1", 3)
    ended = rig.ended(rig.submit("a", steps=100))
    assert ended.outcome is Outcome.CANCELLED
    assert [step for _, step, _ in rig.progress] == [1, 2, 3]
    assert rig.strays() == []
    assert pixels(rig.run("b")) == [plainly(random_grid(2))]
    assert pixels(rig.run("a")) == [plainly(random_grid(1))]


def test_a_swallowed_cancel_ends_the_request_all_the_same(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1, "careless")
    rig.serve("a")
    rig.cancel_at_step("r1", 3)
    assert rig.ended(rig.submit("a")).outcome is Outcome.CANCELLED


def test_no_memory_is_tried_once_more(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1, "hungry")
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
    add_grid(store, tmp_path, "a", 1, "bad")
    add_grid(store, tmp_path, "b", 2)
    monkeypatch.setattr(Bad, "where", where)
    rig.stage.start_custom_classes()
    error = preparation_error(rig, "a")
    assert error.startswith("PipelineUnavailable: ") and says in error
    rig.serve("b")
    assert pixels(rig.run("b")) == [plainly(random_grid(2))]


def test_a_package_that_is_gone_fails_its_own_models(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
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
    add_grid(store, tmp_path, "a", 1, "grown")
    monkeypatch.setattr(Grown, "version", version)
    error = preparation_error(rig, "a")
    assert (
        error.startswith("SkeletonMismatch: grown is not the code that the model was added with")
        and says in error
    )


def test_classes_are_started_once_and_before_their_models(store: Store, rig: Rig, tmp_path: Path) -> None:
    add_grid(store, tmp_path, "a", 1)
    add_grid(store, tmp_path, "b", 2)
    assert Painter.started == []  # not when a model is added
    rig.stage.start_custom_classes()
    assert Painter.started == ["started"]
    rig.serve("a", "b")
    assert Painter.started == ["started"]


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
