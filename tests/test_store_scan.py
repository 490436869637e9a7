"""Scanning folder trees: what is found, how it is named, what is added; one bad model stops nothing."""

import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.original_layout import save_checkpoint
from safetensors.torch import save_file

from ingest_kit import single_threaded
from store_kit import edit_json, fake_source, listing, write_json, write_weights
from understudy.admin import Note, ScanResult
from understudy.render_scan import scan_table
from understudy_demo import tiny
from understudyd.store.batch import ingest_tree, plan_tree
from understudyd.store.errors import StoreError
from understudyd.store.ingest import IngestOptions, ingest, run_cli
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.sources.scanning import Candidate, PassedOver, model_name, numbered, scan
from understudyd.store.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
one_thread = pytest.fixture(scope="module", autouse=True)(single_threaded)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes as folders, `one` and `two`, and one as a checkpoint, `three.safetensors`."""
    root = tmp_path_factory.mktemp("models")
    with quiet_libraries():
        for number, name in enumerate(("one", "two"), start=1):
            tiny.save(tiny.stable_diffusion(number), root / name)
        save_checkpoint(tiny.stable_diffusion(3).components, root / "three.safetensors")
    return root


@pytest.fixture
def tree(models: Path, tmp_path: Path) -> Path:
    """As A1111 and ComfyUI lay it out, with a cache of the hub and things that are no models."""
    root = tmp_path / "webui" / "models"
    shutil.copytree(models / "one", root / "diffusers" / "Anime Mix (v1)")
    checkpoints = root / "Stable-diffusion" / "realistic"
    checkpoints.mkdir(parents=True)
    shutil.copyfile(models / "three.safetensors", checkpoints / "réal Vision.safetensors")
    (checkpoints / "réal Vision.civitai.info").write_text("{}")
    (checkpoints / "réal Vision.preview.png").write_bytes(b"png")
    (checkpoints / "old.ckpt").write_bytes(b"pickle")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, checkpoints / "misplaced.safetensors")
    write_weights(root / "Lora" / "a.safetensors")
    write_weights(root / "Lora" / "people" / "b.safetensors")
    (root / "VAE").mkdir()
    write_weights(root / "ControlNet" / "c.safetensors")
    entry = root / "cache" / "models--org--two"
    shutil.copytree(models / "two", entry / "snapshots" / COMMIT)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT)
    (root / "outside.safetensors").symlink_to(models / "three.safetensors")
    return root


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", writable=True)


def by_path(results: list[ScanResult], root: Path) -> dict[str, tuple[str, str]]:
    """Path below `root` -> (outcome, name)."""
    return {os.path.relpath(result.path, root): (result.outcome, result.name) for result in results}


ANIME, REAL = "diffusers/Anime Mix (v1)", "Stable-diffusion/realistic/réal Vision.safetensors"
CACHED, LIKE = "cache/models--org--two", IngestOptions(like=("Anime-Mix-v1",))
NO_MODELS = {
    "ControlNet": ("skipped", ""),
    "Lora": ("skipped", ""),
    "Stable-diffusion/realistic/misplaced.safetensors": ("skipped", ""),
    "Stable-diffusion/realistic/old.ckpt": ("refused", ""),
    "outside.safetensors": ("skipped", ""),
}


def test_a_tree_of_a_web_interface(tree: Path, store: Store) -> None:
    before = listing(tree)
    told: list[ScanResult] = []
    results = ingest_tree(store, tree, LIKE, on_result=told.append)
    assert told == results
    assert by_path(results, tree) == NO_MODELS | {
        ANIME: ("added", "Anime-Mix-v1"), REAL: ("added", "real-Vision"), CACHED: ("added", "two"),
    }  # fmt: skip
    found = store.models()
    assert set(found) == {"Anime-Mix-v1", "real-Vision", "two"}
    assert found["two"].source == f"org/two@{COMMIT}"
    assert found["Anime-Mix-v1"].source == str(tree / ANIME)
    assert listing(tree) == before  # the tree is only read
    why = {os.path.relpath(r.path, tree): r.why for r in results}
    assert why["Lora"] == "LoRAs are adapters, no models of their own (2 of them)"
    assert why["Stable-diffusion/realistic/misplaced.safetensors"].startswith("is a LoRA")
    assert why["Stable-diffusion/realistic/old.ckpt"].startswith("is a pickle")
    assert why["outside.safetensors"].startswith("is a link out of the tree")


def test_the_same_tree_again_changes_nothing(tree: Path, store: Store) -> None:
    ingest_tree(store, tree, LIKE)
    before = listing(store.path)
    results = ingest_tree(store, tree, LIKE)
    assert {r.outcome for r in results} == {"unchanged", "skipped", "refused"}
    assert listing(store.path) == before


def test_a_dry_run_adds_nothing_and_foresees_the_names(tree: Path, store: Store) -> None:
    before = listing(store.path)
    foreseen = plan_tree(store, tree, LIKE)
    assert listing(store.path) == before
    assert by_path(foreseen, tree) == by_path(ingest_tree(store, tree, LIKE), tree)
    assert by_path(plan_tree(store, tree, LIKE), tree)[ANIME] == ("unchanged", "Anime-Mix-v1")
    swap = IngestOptions(like=LIKE.like, replace=True)
    assert by_path(plan_tree(store, tree, swap), tree)[ANIME] == ("replaced", "Anime-Mix-v1")
    alone = {r.name: r for r in plan_tree(None, tree, IngestOptions())}
    assert (alone["real-Vision"].outcome, alone["two"].outcome) == ("refused", "added")
    assert "--like MODEL" in alone["real-Vision"].why


def test_a_name_that_is_taken_gets_a_number_and_keeps_it(models: Path, tmp_path: Path, store: Store) -> None:
    root = tmp_path / "tree"
    for folder, source in {"a": "one", "b": "two", "c": "one"}.items():
        shutil.copytree(models / source, root / folder / "same")
    expected = {"a/same": ("added", "same"), "b/same": ("added", "same-2"), "c/same": ("unchanged", "same")}
    assert by_path(ingest_tree(store, root, IngestOptions()), root) == expected
    again = by_path(ingest_tree(store, root, IngestOptions()), root)
    assert again == {path: ("unchanged", name) for path, (_, name) in expected.items()}


def test_a_source_that_changed_is_replaced_only_when_asked(
    models: Path, tmp_path: Path, store: Store
) -> None:
    root = tmp_path / "tree"
    shutil.copytree(models / "one", root / "model")
    ingest(store, "other", models / "two")
    ingest_tree(store, root, IngestOptions(), name_prefix="my-")
    shutil.rmtree(root / "model")
    shutil.copytree(models / "two", root / "model")
    (refused,) = ingest_tree(store, root, IngestOptions(), name_prefix="my-")
    assert (refused.outcome, refused.name, refused.code) == ("refused", "my-model", "exists")
    assert "--replace" in refused.why
    (replaced,) = ingest_tree(store, root, IngestOptions(replace=True), name_prefix="my-")
    assert (replaced.outcome, replaced.name) == ("replaced", "my-model")
    assert store.model("my-model").components == store.model("other").components


def test_replacing_never_takes_the_name_of_another_source(models: Path, tmp_path: Path, store: Store) -> None:
    kept = ingest(store, "model", models / "one")
    shutil.copytree(models / "two", tmp_path / "tree" / "model")
    (added,) = ingest_tree(store, tmp_path / "tree", IngestOptions(replace=True))
    assert (added.outcome, added.name) == ("added", "model-2")
    assert store.model("model") == kept


def test_a_prefix_asks_for_names_that_have_it(models: Path, tmp_path: Path, store: Store) -> None:
    tree, options = tmp_path / "tree", IngestOptions()
    for folder in "ab":
        shutil.copytree(models / "one", tree / folder / "same")
    edit_json(tree / "b" / "same" / "scheduler" / "scheduler_config.json", lambda d: d.update(beta_end=0.02))
    assert {r.name for r in ingest_tree(store, tree, options)} == {"same", "same-2"}
    blobs = listing(store.path / "blobs")
    foreseen = plan_tree(store, tree, options, name_prefix="z-")
    assert {(r.name, r.outcome) for r in foreseen} == {("z-same", "added"), ("z-same-2", "added")}
    assert by_path(ingest_tree(store, tree, options, name_prefix="z-"), tree) == by_path(foreseen, tree)
    assert store.names() == ["same", "same-2", "z-same", "z-same-2"]
    assert listing(store.path / "blobs") == blobs
    again = ingest_tree(store, tree, options, name_prefix="z-")
    assert by_path(again, tree) == by_path(plan_tree(store, tree, options, name_prefix="z-"), tree)
    assert {(r.name, r.outcome) for r in again} == {("z-same", "unchanged"), ("z-same-2", "unchanged")}


def test_a_store_in_the_tree_is_left_out(models: Path, tmp_path: Path, store: Store) -> None:
    shutil.copytree(models / "one", tmp_path / "tree" / "one")
    ingest_tree(store, tmp_path, IngestOptions())
    results = ingest_tree(store, tmp_path, IngestOptions())
    assert [(r.path, r.outcome, r.why) for r in results] == [
        (str(store.path), "skipped", "is an Understudy store"),
        (str(tmp_path / "tree" / "one"), "unchanged", ""),
    ]


def test_one_bad_model_stops_nothing(models: Path, tmp_path: Path, store: Store) -> None:
    root = tmp_path / "tree"
    for name in ("a-good", "b-bad", "c-good"):
        shutil.copytree(models / "one", root / name)
    edit_json(root / "b-bad" / "model_index.json", lambda d: d.update(unet=["diffusers", "NoUNet"]))
    (root / "d-bad").mkdir()
    (root / "d-bad" / "short.safetensors").write_bytes(b"12345678")
    results = ingest_tree(store, root, IngestOptions())
    assert [(r.name, r.outcome, r.code) for r in results] == [
        ("", "refused", "corrupt_source"),
        ("a-good", "added", ""),
        ("b-bad", "refused", "unknown_class"),
        ("c-good", "added", ""),
    ]
    assert list((store.path / "tmp").iterdir()) == []


def test_progress_is_of_the_whole_tree(models: Path, store: Store) -> None:
    told: list[tuple[str, int, int]] = []
    ingest_tree(store, models, IngestOptions(like=("one",)), progress=lambda *note: told.append(note))
    totals = {total for _, _, total in told}
    assert len(totals) == 1
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == totals.pop()
    assert any(phase.startswith("two: write unet") for phase, _, _ in told)


def test_folders_come_before_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tiny.stable_diffusion(1).components, tmp_path / "a.safetensors")
    fake_source(tmp_path / "b")
    fake_source(tmp_path / "c" / "deep")
    found = [find for find in scan(tmp_path) if isinstance(find, Candidate)]
    assert [find.name for find in found] == ["b", "deep", "a"]
    assert all(find.size_bytes > 0 for find in found)


def test_odd_entries_are_told_or_passed_over(tmp_path: Path) -> None:
    fake_source(tmp_path / "real")
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "away").symlink_to("/")
    fake_source(tmp_path / ".hidden" / "model")
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    entry = tmp_path / "models--org--dataset-like"
    write_json(entry / "snapshots" / COMMIT / "config.json", {})
    found = {find.path.name: find for find in scan(tmp_path)}
    assert {name for name, find in found.items() if isinstance(find, Candidate)} == {"real"}
    passed = {name: find for name, find in found.items() if isinstance(find, PassedOver)}
    assert set(passed) == {"dangling.safetensors", "away", "fifo.safetensors", entry.name}
    assert passed["fifo.safetensors"].is_refused
    assert not passed[entry.name].is_refused


def test_a_root_that_is_not_there(tmp_path: Path, store: Store) -> None:
    with pytest.raises(StoreError, match="there is no folder"):
        ingest_tree(store, tmp_path / "nowhere", IngestOptions())


@pytest.mark.parametrize(
    ("text", "prefix", "name"),
    [
        ("Déjà Vu (v2)", "", "Deja-Vu-v2"),
        ("plain_1.5", "", "plain_1.5"),
        ("..hidden", "", "hidden"),
        ("日本", "", "model"),
        ("日本", "my-", "my"),
        ("x" * 200, "p-", "p-" + "x" * 126),
        ("a/b", "", "a-b"),
    ],
)
def test_names_are_made_valid(text: str, prefix: str, name: str) -> None:
    assert model_name(text, prefix) == name


def test_a_number_fits_into_the_longest_name() -> None:
    assert numbered("foo", 1) == "foo"
    assert numbered("foo", 2) == "foo-2"
    assert len(numbered("x" * 128, 10)) == 128


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_sums_up_and_its_code_says_whether_all_went_well(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on
    store, tree = str(tmp_path / "store"), tmp_path / "tree"
    shutil.copytree(models / "one", tree / "one")
    assert run_cli(["--store", store, "--scan", str(tree), "--dry-run", "--json"]) == 0
    (done,) = lines(capfd.readouterr().out)
    assert [(r["name"], r["outcome"]) for r in done["result"]["results"]] == [("one", "added")]
    assert not Path(store).exists()
    (tree / "old.ckpt").write_bytes(b"")
    assert run_cli(["--store", store, "--scan", str(tree), "--json"]) == 1
    notes = [line for line in lines(capfd.readouterr().out) if line["type"] == "note"]
    assert [n["result"]["outcome"] for n in notes if n.get("result")] == ["refused", "added"]
    for wrong in (
        ["--scan", str(tree), "--name", "x"],
        ["--name", "x"],
        ["--name", "x", "--source", "y", "--dry-run"],
    ):
        assert run_cli(["--store", store, *wrong]) == 2


def test_the_table_has_a_row_for_each_find() -> None:
    from rich.console import Console

    results = [
        {"outcome": "refused", "path": "/m/x.ckpt", "why": "is a pickle"},
        {"outcome": "added", "path": "/m/one", "name": "one", "size_bytes": 2**20},
    ]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(scan_table(results), scan_table(results, is_dry_run=True), scan_table([]))
    text = console.export_text()
    assert "1.0 MiB" in text and "is a pickle" in text
    assert "1 added, 1 refused" in text
    assert "a dry run, nothing was changed: 1 would be added, 1 refused" in text
    assert "no models found" in text


def test_a_dry_run_tells_what_is_there_already() -> None:
    from rich.console import Console

    outcomes = ("added", "unchanged", "replaced")
    results = [{"outcome": outcome, "path": "/m", "name": outcome} for outcome in outcomes]
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(scan_table(results, is_dry_run=True))
    text = console.export_text()
    assert "is there already: would be compared" in text and "would replace" in text
    assert "1 would be added, 1 would be replaced, 1 there already" in text


def test_notes_with_results_survive_the_wire() -> None:
    import msgspec

    from understudy.admin import Line, encode_line

    note = Note(phase="added", result=ScanResult(outcome="added", path="/m", name="m"))
    decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
    assert decoder.decode(encode_line(note)) == note
