"""Hub ids and the Hugging Face cache, against a hub on the loopback."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hub_kit import COMMIT, OLD_COMMIT, FakeHub, Repository, running_hub
from store_kit import edit_json, fake_source, write_json, write_weights
from understudy.admin import Done, Error, Line
from understudyd.store.errors import StoreError
from understudyd.store.guard import check_source
from understudyd.store.sources.hub import HubId, RemoteFile, download, needed_files, parse_hub_id
from understudyd.store.sources.opening import FolderSource, open_source

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the hub has of org/model: one UNet in two variants, and what must never be fetched."""
    made = fake_source(tmp_path / "remote")
    write_weights(made / "unet" / "diffusion_pytorch_model.fp16.safetensors", dtype="F16", shape=(1000, 100))
    (made / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (made / "unet" / "model.py").write_text("print('no')")
    (made / "pipeline.py").write_text("print('no')")
    (made / "README.md").write_text("# a model")
    (made / "demo.png").write_bytes(b"png")
    (made / "other").mkdir()
    (made / "other" / "notes.json").write_text("{}")
    return made


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub, with `huggingface_hub` pointed at it and at an empty cache."""
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    edit_json(old / "scheduler" / "scheduler_config.json", lambda d: d.update(beta_start=0.2))
    repositories = {
        "org/model": Repository({COMMIT: folder, OLD_COMMIT: old}, {"main": COMMIT, "v1": OLD_COMMIT}),
        "org/gated": Repository({COMMIT: folder}, token="secret"),
        "org/none": Repository({COMMIT: folder / "other"}),
    }
    with running_hub(repositories) as served:
        served.use(monkeypatch, tmp_path)
        yield served


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched(hub: FakeHub) -> None:
    source = open_source("org/model")
    assert isinstance(source, FolderSource)
    assert source.origin == f"org/model@{COMMIT}"
    expected = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", UNET}
    assert files_of(source.folder) == expected
    assert hub.fetched() == expected
    assert check_source(source.folder).pipeline_class == "StableDiffusionPipeline"


def test_a_variant_is_fetched_in_place_of_the_plain_weights(hub: FakeHub) -> None:
    download(HubId("org/model", None), variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.fetched()
    assert UNET not in hub.fetched()


def test_a_revision_is_pinned_to_its_commit(hub: FakeHub) -> None:
    by_tag = open_source("org/model@v1")
    by_option = open_source("org/model", revision="v1")
    by_commit = open_source("org/model", revision=OLD_COMMIT)
    assert isinstance(by_tag, FolderSource)
    assert by_tag.origin == f"org/model@{OLD_COMMIT}"
    assert by_tag == by_option == by_commit
    scheduler = json.loads((by_tag.folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["beta_start"] == 0.2
    with pytest.raises(StoreError, match="names a revision, --revision 'v2' another"):
        open_source("org/model@v1", revision="v2")


def test_progress_counts_the_bytes_of_all_files(hub: FakeHub, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    source = open_source("org/model", on_bytes=lambda done, total: told.append((done, total)))
    assert isinstance(source, FolderSource)
    wanted = files_of(source.folder) - {"model_index.json"}
    total = sum((folder / name).stat().st_size for name in wanted)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {size for _, size in told} == {total}


def test_what_is_cached_is_not_fetched_again(hub: FakeHub) -> None:
    first = open_source("org/model")
    hub.asked.clear()
    assert open_source("org/model") == first
    assert hub.fetched() == set()


def test_a_broken_connection_is_resumed(hub: FakeHub, folder: Path) -> None:
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.breaks.add(name)
    snapshot = download(HubId("org/model", None), variant="fp16")
    assert (snapshot / name).read_bytes() == (folder / name).read_bytes()
    assert hub.asked.count(("GET", name)) == 2


def test_offline_the_cache_is_enough_or_the_error_says_so(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = open_source("org/model")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source("org/model") == online
    assert open_source(f"org/model@{COMMIT}") == online
    for source, code in {"org/other": "hub_offline", "org/model@v1": "not_found"}.items():
        with pytest.raises(StoreError) as caught:
            open_source(source)
        assert caught.value.code == code
    assert hub.asked == []


def test_cache_entries_and_snapshots_are_sources(hub: FakeHub, tmp_path: Path) -> None:
    online = open_source("org/model")
    open_source("org/model@v1")
    entry = tmp_path / "cache" / "hub" / "models--org--model"
    assert isinstance(online, FolderSource)
    by_entry, by_snapshot = open_source(entry), open_source(entry / "snapshots" / COMMIT)
    assert isinstance(by_entry, FolderSource) and isinstance(by_snapshot, FolderSource)
    assert by_entry.origin == by_snapshot.origin == online.origin
    assert open_source(entry, revision="v1").origin == f"org/model@{OLD_COMMIT}"
    with pytest.raises(StoreError, match=f"it has {COMMIT}, {OLD_COMMIT}"):
        open_source(entry, revision="v3")
    with pytest.raises(StoreError, match="a path, which has no revisions"):
        open_source(entry / "snapshots" / COMMIT, revision="v1")


def test_a_gated_model_needs_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (None, "wrong"):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(StoreError) as caught:
            open_source("org/gated")
        assert caught.value.code == "hub_forbidden"
        assert "HF_TOKEN" in caught.value.message
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert open_source("org/gated").origin == f"org/gated@{COMMIT}"


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [
        ("org/nobody", "not_found", "the hub has no model org/nobody"),
        ("org/model@v9", "not_found", "org/model has no revision 'v9'"),
        ("org/none", "unsupported_source", "a LoRA is added with `understudyctl add-lora`"),
        ("org/model/unet", "not_found", "there is no org/model/unet"),
        ("../model", "not_found", "there is no ../model"),
    ],
)
def test_the_error_says_what_is_wrong(source: str, code: str, says: str, hub: FakeHub) -> None:
    with pytest.raises(StoreError) as caught:
        open_source(source)
    assert caught.value.code == code
    assert says in caught.value.message


def test_without_a_network_the_error_says_so(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library waits before it tries again
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(StoreError) as caught:
        open_source("org/model")
    assert caught.value.code == "hub_unreachable"
    assert "HF_HUB_OFFLINE=1" in caught.value.message


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": [None, None],
}


def choose(names: list[str], variant: str | None = None) -> set[str]:
    files = [RemoteFile(name, 1) for name in names]
    return {file.path for file in needed_files(HubId("org/model", None), INDEX, files, variant)}


def test_shards_come_with_the_index_of_their_variant() -> None:
    plain = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    indices = ["unet/diffusion_pytorch_model.safetensors.index.json",
               "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
               "unet/diffusion_pytorch_model.bin.index.json"]  # fmt: skip
    names = [
        *plain,
        *half,
        *indices,
        "unet/config.json",
        "vae/config.json",
        "../unet/x.json",
        "unet/a/b.json",
    ]
    assert choose(names) == {*plain, indices[0], "unet/config.json"}
    assert choose(names, "fp16") == {*half, indices[1], "unet/config.json"}


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("unet/diffusion_pytorch_model.bin", "unsafe_file", "as a pickle only"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "not_found", "--variant fp16"),
    ],
)
def test_weights_that_would_not_be_read_are_refused_before_the_download(
    name: str, code: str, says: str
) -> None:
    with pytest.raises(StoreError) as caught:
        choose(["unet/config.json", name])
    assert caught.value.code == code
    assert says in caught.value.message


def test_hub_ids() -> None:
    assert parse_hub_id("org/name") == HubId("org/name", None)
    assert parse_hub_id("org/na.me-1@refs/pr/3") == HubId("org/na.me-1", "refs/pr/3")
    for other in ("name", "/org/name", "org/name/more", "org/../name", "a--b/c", "org/name@", "./name"):
        assert parse_hub_id(other) is None, other


def test_a_cache_link_may_lead_to_the_blobs_of_the_whole_cache(tmp_path: Path) -> None:
    """huggingface_hub 2 keeps one copy for all repositories; other ways out stay closed."""
    entry = tmp_path / "models--org--model"
    snapshot = fake_source(entry / "snapshots" / COMMIT)
    shared = tmp_path / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    (snapshot / UNET).rename(shared)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "etag").symlink_to(shared)
    (snapshot / UNET).symlink_to(entry / "blobs" / "etag")
    assert check_source(snapshot).weights_bytes > 0
    elsewhere = shared.rename(tmp_path / "elsewhere")
    (entry / "blobs" / "etag").unlink()
    (entry / "blobs" / "etag").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link out of the folder"):
        check_source(snapshot)


def test_the_environment_reaches_the_ingest_process(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as the library reads them, in a process of its own."""
    write_json(tmp_path / "remote" / "unet" / "config.json", {"quantization_config": {"bits": 4}})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "understudyd.store.ingest", "--json", "--store", str(tmp_path / "store")]
    done = subprocess.run(
        [*command, "--name", "m", "--source", "org/gated"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = decode_last(done.stdout)
    # It came as far as the guard, which looks at what was downloaded.
    assert isinstance(last, Error) and last.code == "unsupported_source", last
    assert "quantised" in last.message
    assert (tmp_path / "home" / "hub" / "models--org--gated" / "refs" / "main").read_text() == COMMIT
    assert '"phase":"download"' in done.stdout


def decode_last(text: str) -> Line:
    import msgspec

    decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
    last = decoder.decode(text.splitlines()[-1])
    assert isinstance(last, Done | Error)
    return last
