"""Ingest against plain `from_pretrained`: equal bits, shared blobs, shared signatures, clean refusals."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from ingest_kit import assert_serves, reference, single_threaded
from store_kit import edit_json, listing
from understudy.admin import Done, Error, Note
from understudy_demo import tiny
from understudyd.store.errors import StoreError
from understudyd.store.ingest import IngestOptions, ingest, ingest_many, run_cli
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.store import Store

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


one_thread = pytest.fixture(scope="module", autouse=True)(single_threaded)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders written by diffusers: sd (two fine-tunes), sdxl, half precision, a variant, shards."""
    root = tmp_path_factory.mktemp("sources")
    with quiet_libraries():
        one = tiny.stable_diffusion(1)
        tiny.save(one, root / "one")
        tiny.save(tiny.stable_diffusion(2, own_text_encoder=False), root / "two")
        tiny.save(tiny.stable_diffusion_xl(1), root / "sdxl")
        one.save_pretrained(root / "sharded", max_shard_size="200KB")
        one.to(torch.float16)
        tiny.save(one, root / "half")
        shutil.copytree(root / "one", root / "variant")
        one.save_pretrained(root / "variant", variant="fp16")
        # Half a variant: the text encoder has none, and is read as it is.
        (root / "variant" / "text_encoder" / "model.fp16.safetensors").unlink()
    return root


@pytest.fixture
def source(sources: Path, tmp_path: Path) -> Path:
    """A copy of a fine-tune, to be spoilt."""
    return Path(shutil.copytree(sources / "one", tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", writable=True)


def test_stable_diffusion_is_what_from_pretrained_made(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "one")
    assert_serves(store, record, reference(sources / "one"))
    assert record.pipeline_class == "StableDiffusionPipeline"
    assert [c.name for c in record.components] == ["text_encoder", "unet", "vae"]
    assert {(p.name, p.library, p.class_name) for p in record.parts} == {
        ("scheduler", "diffusers", "EulerDiscreteScheduler"),
        ("tokenizer", "transformers", "CLIPTokenizer"),
    }
    assert set(record.absent) == {"safety_checker", "feature_extractor", "image_encoder"}
    assert record.init_kwargs == {"requires_safety_checker": False}
    folder = store.model_folder("m")
    for name in ("model_index.json", "unet/config.json", "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (sources / "one" / name).read_bytes()
    assert not list(folder.rglob("*.safetensors"))
    assert Store.open(store.path, writable=False).model("m") == record


def test_stable_diffusion_xl(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "sdxl")
    assert_serves(store, record, reference(sources / "sdxl"))
    assert [c.name for c in record.components] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert record.init_kwargs == {"force_zeros_for_empty_prompt": True}
    one, other = (p.content for p in record.parts if p.name.startswith("tokenizer"))
    assert one == other


def test_a_safety_checker_and_its_image_processor(tmp_path: Path, store: Store) -> None:
    """A model class that only a package of pipelines exports, and an image processor."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "projection_dim": 8,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=tiny.text_config().to_dict(), projection_dim=8)
    with quiet_libraries():
        parts = tiny.stable_diffusion(1).components | {
            "safety_checker": StableDiffusionSafetyChecker(config),
            "feature_extractor": CLIPImageProcessor(size=32, crop_size=32),
        }
        folder = tiny.save(StableDiffusionPipeline(**parts), tmp_path / "safe")
    record = ingest(store, "m", folder)
    assert_serves(store, record, reference(folder))
    assert record.components[-1].name == "safety_checker"  # the pipeline's offload sequence leaves it out
    signature = store.signature(record.components[-1].signature)
    assert signature.library == "diffusers.pipelines.stable_diffusion"
    assert signature.class_name == "StableDiffusionSafetyChecker"
    assert {p.name for p in record.parts} == {"scheduler", "tokenizer", "feature_extractor"}
    assert record.absent == ("image_encoder",)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("folder", ["one", "half"])
def test_conversion(name: Any, dtype: torch.dtype, folder: str, sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / folder, dtype=name)
    assert_serves(store, record, reference(sources / folder, dtype=dtype))


def test_keep_keeps_the_files_dtype(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "half")
    assert_serves(store, record, reference(sources / "half", dtype=torch.float16))
    assert record.size_bytes < ingest(store, "wide", sources / "one").size_bytes


def test_a_variant_and_a_component_without_it(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "variant", variant="fp16")
    dtypes = {"default": torch.float16, "text_encoder": torch.float32}
    assert_serves(store, record, reference(sources / "variant", variant="fp16", dtype=dtypes))


def test_shards_make_the_same_model(sources: Path, store: Store) -> None:
    assert len(list((sources / "sharded" / "unet").glob("*.safetensors"))) > 1
    whole, sharded = ingest_many(store, [("whole", sources / "one"), ("sharded", sources / "sharded")])
    assert sharded.components == whole.components


def test_fine_tunes_share_signatures_and_equal_blobs(sources: Path, store: Store) -> None:
    one, two = ingest_many(store, [("one", sources / "one"), ("two", str(sources / "two"))])
    for mine, other in zip(one.components, two.components, strict=True):
        assert mine.signature == other.signature
        assert (mine.blob == other.blob) is (mine.name == "vae")
    assert len(list((store.path / "blobs").iterdir())) == 5
    assert len(list((store.path / "signatures").iterdir())) == 3


def test_where_a_model_came_from_is_no_part_of_its_signature(
    source: Path, sources: Path, store: Store
) -> None:
    def disguise(config: dict[str, Any]) -> None:
        config |= {"_name_or_path": "/somewhere", "_diffusers_version": "0.30.0"}

    edit_json(source / "unet" / "config.json", disguise)
    edit_json(
        source / "text_encoder" / "config.json",
        lambda c: c.update(
            _name_or_path="x", transformers_version="4.1", architectures=None, torch_dtype="float16"
        ),
    )
    one, other = ingest_many(store, [("one", sources / "one"), ("other", source)])
    assert one.components == other.components


def test_a_config_that_changes_behaviour_changes_the_signature(
    source: Path, sources: Path, store: Store
) -> None:
    edit_json(source / "unet" / "config.json", lambda c: c.update(norm_eps=1e-4))
    one, other = ingest_many(store, [("one", sources / "one"), ("other", source)])
    assert [c.blob for c in one.components] == [c.blob for c in other.components]
    differing = [a.name for a, b in zip(one.components, other.components) if a.signature != b.signature]
    assert differing == ["unet"]


def test_the_same_again_adds_nothing(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "one")
    before = listing(store.path)
    assert ingest(store, "m", sources / "one") == record
    assert ingest(store, "m", sources / "sharded") == record
    assert listing(store.path) == before


def test_another_model_of_that_name_needs_replace(sources: Path, store: Store) -> None:
    ingest(store, "m", sources / "one")
    before = listing(store.path)
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", sources / "two")
    assert caught.value.code == "exists"
    assert listing(store.path) == before
    record = ingest(store, "m", sources / "two", replace=True)
    assert_serves(store, record, reference(sources / "two"))


def lose_weight(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / UNET, metadata={"format": "pt"})


def lose_text_weight(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path, metadata={"format": "pt"})


def widen_weight(folder: Path) -> None:
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / UNET, metadata={"format": "pt"})


def name_class(component: str, library: str, class_name: str) -> Callable[[Path], object]:
    return lambda folder: edit_json(
        folder / "model_index.json", lambda d: d.update({component: [library, class_name]})
    )


LATE_REFUSALS = {
    "missing weight": ("corrupt_source", lose_weight),
    "missing text weight": ("corrupt_source", lose_text_weight),
    "wrong shape": ("corrupt_source", widen_weight),
    "no weights": ("corrupt_source", lambda folder: (folder / UNET).unlink()),
    "no config": ("corrupt_source", lambda folder: (folder / "unet/config.json").unlink()),
    "tokenizer broken": (
        "corrupt_source",
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text('{"a": 1}'),
    ),
    "component not listed": (
        "corrupt_source",
        lambda folder: edit_json(folder / "model_index.json", lambda d: d.pop("unet")),
    ),
    "no such pipeline": (
        "unknown_class",
        lambda folder: edit_json(folder / "model_index.json", lambda d: d.update(_class_name="NoPipeline")),
    ),
    "pipeline that is none": (
        "unknown_class",
        lambda folder: edit_json(
            folder / "model_index.json", lambda d: d.update(_class_name="AutoencoderKL")
        ),
    ),
    "no such class": ("unknown_class", name_class("unet", "diffusers", "NoUNet")),
    "class of another kind": ("unknown_class", name_class("unet", "transformers", "CLIPTextConfig")),
    "function": ("unknown_class", name_class("unet", "transformers", "pipeline")),
    "pipeline as component": ("unknown_class", name_class("unet", "diffusers", "DiffusionPipeline")),
    "onnx": ("unknown_class", name_class("unet", "diffusers", "OnnxRuntimeModel")),
    "module of a pipelines package": ("unknown_class", name_class("unet", "stable_diffusion", "os")),
    "several folders": (
        "unsupported_source",
        lambda f: edit_json(
            f / "model_index.json", lambda d: d.update(_class_name="KandinskyCombinedPipeline")
        ),
    ),
}


@pytest.mark.parametrize("name", LATE_REFUSALS)
def test_refused_while_loading_with_nothing_left_behind(name: str, source: Path, store: Store) -> None:
    code, spoil = LATE_REFUSALS[name]
    spoil(source)
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", source)
    assert caught.value.code == code, caught.value.message
    assert listing(store.path) == {}
    assert list((store.path / "tmp").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(sources: Path, store: Store) -> None:
    kept = ingest(store, "kept", sources / "two")
    before = listing(store.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))  # a text encoder fits, the UNet does not
    try:
        with pytest.raises(StoreError) as caught:
            ingest(store, "m", sources / "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "disk_full"
    assert "free space" in caught.value.message
    assert listing(store.path) == before
    assert store.models() == {"kept": kept}
    assert ingest(store, "m", sources / "one").name == "m"


def test_progress_counts_every_byte(sources: Path, store: Store) -> None:
    notes: list[tuple[str, int, int]] = []
    record = ingest(store, "m", sources / "one", progress=lambda *note: notes.append(note))
    phases = list(dict.fromkeys(phase for phase, _, _ in notes))
    assert phases == ["check", "load", "write text_encoder", "write unet", "write vae", "publish"]
    for phase in phases[1:]:
        of_phase = [(done, total) for name, done, total in notes if name == phase]
        assert of_phase == sorted(of_phase)
        assert of_phase[-1][0] == of_phase[-1][1]
    written = {phase: total for phase, _, total in notes if phase.startswith("write ")}
    assert sum(written.values()) == record.size_bytes


def test_many_stop_at_the_first_that_fails(sources: Path, tmp_path: Path, store: Store) -> None:
    pairs = [("one", sources / "one"), ("none", tmp_path / "nowhere"), ("two", sources / "two")]
    with pytest.raises(StoreError):
        ingest_many(store, pairs, IngestOptions(dtype="fp16"))
    assert set(store.models()) == {"one"}


def decode_lines(text: str) -> list[Note | Done | Error]:
    import msgspec

    decoder = msgspec.json.Decoder(Note | Done | Error)
    return [decoder.decode(line) for line in text.splitlines()]


def test_the_command_reports_in_json_on_a_clean_stdout(sources: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "understudyd.store.ingest", "--json", "--store", str(tmp_path / "store")]
    added = subprocess.run(
        [*command, "--name", "m", "--source", str(sources / "half"), "--dtype", "fp32"],
        capture_output=True, text=True, env=os.environ | {"TRANSFORMERS_VERBOSITY": "info"},
    )  # fmt: skip
    assert added.returncode == 0, added.stderr
    assert added.stderr  # libraries chat, but not on stdout
    lines = decode_lines(added.stdout)
    assert all(isinstance(line, Note) for line in lines[:-1])
    record = Store.open(tmp_path / "store", writable=False).model("m")
    assert lines[-1] == Done(
        result={"name": "m", "pipeline": "StableDiffusionPipeline", "size_bytes": record.size_bytes}
    )


def test_the_command_says_what_is_wrong(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(tmp_path / "store")]
    assert run_cli([*store, "--json", "--name", "a/b", "--source", str(sources / "one")]) == 1
    *_, error = decode_lines(capfd.readouterr().out)
    assert isinstance(error, Error)
    assert error.code == "bad_name"
    assert run_cli([*store, "--name", "m", "--source", str(tmp_path / "nowhere")]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "error [not_found]: there is no" in captured.err
    assert run_cli([*store, "--name", "m"]) == 2
    assert run_cli([*store, "--name", "m", "--source", "x", "--dtype", "int8"]) == 2
    assert run_cli(["--help"]) == 0


def test_the_command_shows_people_what_it_did(
    sources: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--store", str(tmp_path / "store"), "--name", "m", "--source", str(sources / "one")]
    assert run_cli(arguments) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("added m: StableDiffusionPipeline, ")
    assert "write unet" in captured.err
    manifest = json.loads((tmp_path / "store" / "models" / "m" / "manifest.json").read_bytes())
    assert manifest["source"] == str(sources / "one")
