"""Where LoRAs come from: files, folders, the hub; and the command that adds them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import adapter_kit as kit
from adapter_kit import Making
from hub_kit import COMMIT, FakeHub, Repository, running_hub
from understudy_demo import tiny
from understudyd.store.adapters.cli import run
from understudyd.store.adapters.files import find_adapters
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.errors import StoreError
from understudyd.store.ingest import ingest
from understudyd.store.sources.hub import HubId
from understudyd.store.sources.hub_adapter import choose_weights
from understudyd.store.store import Store
from zoo import unets


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return unets.stable_diffusion(0)


@pytest.fixture(scope="module")
def made(pipeline: Any) -> kit.MadeAdapter:
    return kit.make_adapter(pipeline, Making({"unet": ("to_q", "to_k")}))


@pytest.fixture
def hub(made: kit.MadeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """org/lora has a PEFT adapter among other things, org/many several files."""
    one = kit.write_peft_folder(made, tmp_path / "remote" / "one").parent
    kit.write(one / "checkpoint-10" / "x.safetensors", made.state())
    (one / "README.md").write_text("# a LoRA")
    (one / "optimizer.pt").write_bytes(b"pickle")
    many = tmp_path / "remote" / "many"
    for name in ("a", "b"):
        kit.write_diffusers(made, many / f"{name}.safetensors")
    repositories = {"org/lora": Repository({COMMIT: one}), "org/many": Repository({COMMIT: many})}
    with running_hub(repositories) as served:
        served.use(monkeypatch, tmp_path)
        yield served


def test_only_weights_and_settings_are_fetched(hub: FakeHub) -> None:
    told: list[tuple[int, int]] = []
    (file,) = find_adapters("org/lora", on_bytes=lambda done, total: told.append((done, total)))
    assert (file.name, file.origin) == ("lora", f"org/lora@{COMMIT}")
    assert hub.fetched() == {"adapter_model.safetensors", "adapter_config.json"}
    assert file.path.with_name("adapter_config.json").is_file()
    assert told[-1] == (file.size_bytes, file.size_bytes)


def test_what_was_fetched_is_found_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (online,) = find_adapters("org/lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_adapters("org/lora") == [online]
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE") as caught:
        find_adapters("org/other")
    assert caught.value.code == "hub_offline"


def test_of_several_files_one_must_be_named(hub: FakeHub) -> None:
    with pytest.raises(StoreError, match=r"--weight-name\): a.safetensors, b.safetensors"):
        find_adapters("org/many")
    (file,) = find_adapters("org/many", weight_name="b.safetensors")
    assert file.path.name == "b.safetensors"


def test_a_repository_that_is_not_there_is_told(hub: FakeHub) -> None:
    with pytest.raises(StoreError) as caught:
        find_adapters("org/none")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (["x.safetensors", "README.md"], "x.safetensors"),
        (["x.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
        (["x.safetensors", "checkpoint-1.safetensors", "deep/y.safetensors"], "x.safetensors"),
    ],
)
def test_the_usual_file_is_chosen(paths: list[str], chosen: str) -> None:
    assert choose_weights(HubId("org/x", None), paths, None) == chosen


def test_a_repository_of_pickles_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="it has none"):
        choose_weights(HubId("org/x", None), ["pytorch_lora_weights.bin"], None)


def test_who_takes_a_model_for_a_lora_hears_of_add(tmp_path: Path) -> None:
    """A pipeline may have a checkpoint beside it, or the one LoRA that is meant."""
    paths = ["model_index.json", "v1-5.safetensors", "unet/x.safetensors"]
    with pytest.raises(
        StoreError, match=r"org/x is a .* no LoRA; .* `understudyctl add NAME org/x`"
    ) as caught:
        choose_weights(HubId("org/x", None), paths, None)
    assert caught.value.code == "not_plain_lora"
    lora = "pytorch_lora_weights.safetensors"
    assert choose_weights(HubId("org/x", None), [*paths, lora], None) == lora
    assert choose_weights(HubId("org/x", None), paths, "v1-5.safetensors") == "v1-5.safetensors"
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(StoreError, match="`understudyctl add NAME") as caught:
        find_adapters(tmp_path)
    assert caught.value.code == "not_plain_lora"


def test_names_come_from_files_or_from_their_folders(tmp_path: Path, made: kit.MadeAdapter) -> None:
    kit.write_diffusers(made, tmp_path / "Pixel Art (v2).safetensors")
    kit.write_diffusers(made, tmp_path / "sketch" / "pytorch_lora_weights.safetensors")
    kit.write_diffusers(made, tmp_path / ".hidden" / "no.safetensors")
    assert [file.name for file in find_adapters(tmp_path)] == ["Pixel-Art-v2", "sketch"]


@pytest.mark.parametrize("source", ["no/such/file/here", "nothing.safetensors"])
def test_a_source_that_is_not_there_is_told(source: str) -> None:
    with pytest.raises(StoreError, match="hub id") as caught:
        find_adapters(source)
    assert caught.value.code == "not_found"


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no \.safetensors below"):
        find_adapters(tmp_path)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def store(pipeline: Any, tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "store", writable=True)
    ingest(store, "base", tiny.save(pipeline, tmp_path / "saved"))
    return store


def test_the_command_adds_a_folder_and_sums_up(
    store: Store, made: kit.MadeAdapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kit.write_diffusers(made, tmp_path / "files" / "good.safetensors")
    (tmp_path / "files" / "bad.ckpt").write_bytes(b"")
    assert run(["--store", str(store.path), "--source", str(tmp_path / "files")]) == 1
    out = capfd.readouterr().out
    assert "1 added, 1 refused" in out and "pickle" in out
    assert AdapterShelf(store).names() == ["good"]


def test_the_command_reports_to_a_daemon_in_lines(
    store: Store, made: kit.MadeAdapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = kit.write_diffusers(made, tmp_path / "x.safetensors")
    arguments = ["--store", str(store.path), "--source", str(path), "--name", "pixel-art", "--json"]
    assert run([*arguments, "--base", "base"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [r["name"] for r in lines[-1]["result"]["results"]] == ["pixel-art"]
    assert any(line.get("result", {}).get("outcome") == "added" for line in lines[:-1] if line.get("result"))
    assert AdapterShelf(store).adapter("pixel-art").base_model == "base"
    assert run([*arguments, "--base", "nobody"]) == 1
    (error,) = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (error["type"], error["code"]) == ("error", "not_found")
