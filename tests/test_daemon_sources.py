"""Every way in, while a real daemon serves: checkpoints, scans, and what is said of paths it cannot see."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.original_layout import save_checkpoint
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family, pixels
from understudy import admin
from understudy.ctl import main as ctl
from understudy_demo import tiny

OPTIONS = {"seed": 7, "steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    store = shutil.copytree(family.store, tmp_path_factory.mktemp("sources") / "store")
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
    with running_daemon(store, tmp_path_factory.mktemp("run"), arena="24MiB", **more) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of the family's architecture as one file."""
    return save_checkpoint(
        tiny.stable_diffusion(9).components, tmp_path_factory.mktemp("ck") / "c.safetensors"
    )


def painted(file: Path, config: Path) -> bytes:
    """What diffusers itself paints from the file, on one thread as the daemon does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            "x", num_inference_steps=2, width=32, height=32, generator=torch.Generator("cpu").manual_seed(7)
        ).images[0]
        return bytes(image.convert("RGB").tobytes())
    finally:
        torch.set_num_threads(before)


def test_a_checkpoint_paints_what_diffusers_paints(
    daemon: DaemonProcess, family: Family, checkpoint: Path
) -> None:
    arguments = ["add", "single", str(checkpoint), "--like", "sd-a", "-o", "json"]
    result = CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pipeline"] == "StableDiffusionPipeline"
    with understudy.Client(endpoint=daemon.endpoint) as client:
        served = client.generate("single", "x", **OPTIONS).images[0]
    assert pixels(served) == painted(checkpoint, family.folders["sd-a"])
    assert daemon.ask(admin.Show(name="single"))["source"] == str(checkpoint)


def test_models_of_a_scan_are_served_as_they_come(
    daemon: DaemonProcess, family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(family.folders["sd-b"], tree / "first")
    shutil.copytree(family.folders["xl"], tree / "second")
    (tree / "third.ckpt").write_bytes(b"pickle")
    shutil.copyfile(checkpoint, tree / "fourth.safetensors")
    notes: list[admin.Note] = []
    painted_meanwhile: list[bytes] = []

    def on_note(note: admin.Note) -> None:
        notes.append(note)
        if note.result is not None and note.result.name == "first":
            with understudy.Client(endpoint=daemon.endpoint) as client:
                painted_meanwhile.append(client.generate("first", "x", **OPTIONS).images[0])

    command = admin.Scan(folder=str(tree), like=("first",))
    document = admin.call(daemon.admin_socket, command, on_note=on_note, timeout_s=120)
    outcomes = {Path(r["path"]).name: r["outcome"] for r in document["results"]}
    assert outcomes == {
        "first": "added", "second": "added", "third.ckpt": "refused", "fourth.safetensors": "added",
    }  # fmt: skip
    assert [pixels(image) for image in painted_meanwhile] == family.reference(
        "sd-b", prompt="x", seed=7, num_inference_steps=2, width=32, height=32
    )
    assert [n.result.outcome for n in notes if n.result] == ["refused", "added", "added", "added"]
    with understudy.Client(endpoint=daemon.endpoint) as client:
        fourth = client.generate("fourth", "x", **OPTIONS).images[0]
    assert pixels(fourth) == painted(checkpoint, family.folders["sd-b"])
    arguments = [
        "--socket",
        str(daemon.admin_socket),
        "add",
        "--scan",
        str(tree),
        "--dry-run",
        "--like",
        "xl",
    ]
    again = CliRunner().invoke(ctl, arguments)
    assert again.exit_code == 1  # a pickle, and a checkpoint that is not like an SDXL model
    assert "is a pickle" in again.stdout and "does not fit" in again.stdout


def test_a_dry_run_changes_nothing(daemon: DaemonProcess, family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.folders["sd-b"], tmp_path / "tree" / "dry")
    before = {row["name"] for row in daemon.ask(admin.Models())}
    command = admin.Scan(folder=str(tmp_path / "tree"), dry_run=True, name_prefix="my-")
    (result,) = daemon.ask(command)["results"]
    assert (result["name"], result["outcome"]) == ("my-dry", "added")
    assert {row["name"] for row in daemon.ask(admin.Models())} == before


def test_a_path_the_daemon_does_not_see_names_the_way_round(daemon: DaemonProcess, tmp_path: Path) -> None:
    source = str(tmp_path / "no where")
    for command in (admin.Add(name="m", source=source, dtype="fp16"), admin.Scan(folder=source)):
        with pytest.raises(admin.AdminError) as caught:
            daemon.ask(command, timeout_s=60)
        assert caught.value.code == "not_found"
        assert "sudo -u " in str(caught.value) and " understudyd ingest --store " in str(caught.value)
        assert f"{source}'" in str(caught.value) and "understudyctl rescan" in str(caught.value)
    arguments = ["--socket", str(daemon.admin_socket), "add", "m", source]
    typed = CliRunner().invoke(ctl, arguments)
    assert typed.exit_code == 1 and "sudo" not in typed.stderr, "whoever typed it does not find it either"
    unknown = pytest.raises(understudy.UnknownModel, match="`understudy models` lists them")
    with understudy.Client(endpoint=daemon.endpoint) as client, unknown:
        client.generate("qqqq", "x", **OPTIONS)
