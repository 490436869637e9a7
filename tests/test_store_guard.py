"""What the guard refuses before anything is loaded, with no torch in the process's way."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from store_kit import edit_json, fake_source, listing, raw_file, write_json, write_weights
from understudyd.store.errors import StoreError
from understudyd.store.guard import check_source, known_library
from understudyd.store.ingest import ingest
from understudyd.store.sources.opening import FolderSource, open_source
from understudyd.store.store import Store

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fake_source(tmp_path / "source")


def touch(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    return spoil


def index(key: str, value: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "model_index.json", lambda d: d.update({key: value}))


def config(key: str, value: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "unet" / "config.json", lambda d: d.update({key: value}))


def link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target)


def shards(names: object) -> Callable[[Path], object]:
    path = Path("unet", "diffusion_pytorch_model.safetensors.index.json")
    return lambda folder: write_json(folder / path, {"weight_map": names})


REFUSED = {
    "python file": ("unsafe_file", touch("unet/evil.py")),
    "python file at the root": ("unsafe_file", touch("pipeline.py")),
    "python file where nobody looks": ("unsafe_file", touch(".hidden/deep/evil.py")),
    "bytecode": ("unsafe_file", touch("unet/evil.pyc")),
    **{
        f"pickle {suffix}": ("unsafe_file", touch(f"unet/model{suffix}"))
        for suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".BIN")
    },
    "link out of the folder": ("unsafe_file", link("unet/notes.txt", "/etc/hostname")),
    "link that is broken": ("unsafe_file", link("unet/notes.txt", "nowhere")),
    "link to itself": ("unsafe_file", link("unet/notes.txt", "notes.txt")),
    "link to a folder": ("unsafe_file", link("unet2", "unet")),
    "fifo": ("unsafe_file", lambda folder: os.mkfifo(folder / "unet" / "weights.safetensors")),
    "remote code of the pipeline": ("unsafe_file", index("custom_pipeline", "somebody/pipe")),
    "remote code of a component": ("unsafe_file", config("auto_map", {"AutoModel": "evil.Model"})),
    "pipeline class of a custom module": ("unknown_class", index("_class_name", ["pipeline", "Mine"])),
    "pipeline class missing": ("unknown_class", index("_class_name", None)),
    "pipeline class no identifier": ("unknown_class", index("_class_name", "os.system")),
    "library of its own": ("unknown_class", index("unet", ["my_unet", "Net"])),
    "library of the system": ("unknown_class", index("unet", ["os", "system"])),
    "library up the tree": ("unknown_class", index("unet", ["..", "Net"])),
    "library onnx": ("unknown_class", index("unet", ["onnxruntime.training", "ORTModule"])),
    "class no identifier": ("unknown_class", index("unet", ["diffusers", "a.b"])),
    "component name no identifier": (
        "corrupt_source",
        index("../unet", ["diffusers", "UNet2DConditionModel"]),
    ),
    "entry of one": ("corrupt_source", index("unet", ["diffusers"])),
    "entry half null": ("corrupt_source", index("unet", [None, "UNet2DConditionModel"])),
    "component folder missing": ("corrupt_source", lambda folder: shutil.rmtree(folder / "unet")),
    "index no JSON": ("corrupt_source", lambda folder: (folder / "model_index.json").write_text("{")),
    "index no map": ("corrupt_source", lambda folder: (folder / "model_index.json").write_text("[]")),
    "config no JSON": ("corrupt_source", lambda folder: (folder / "unet/config.json").write_bytes(b"\xff")),
    "config nested deeply": (
        "corrupt_source",
        lambda folder: (folder / "unet/config.json").write_text("[" * 100_000),
    ),
    "weights damaged": ("corrupt_source", lambda folder: raw_file(folder / UNET, {"a": 1})),
    "weights truncated": (
        "corrupt_source",
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1]),
    ),
    "stray safetensors damaged": ("corrupt_source", touch("extra.safetensors")),
    "shard outside": ("unsafe_file", shards({"weight": "../../secret.safetensors"})),
    "shard missing": ("corrupt_source", shards({"weight": "missing.safetensors"})),
    "shard index of numbers": ("corrupt_source", shards({"weight": 7})),
    "shard index without map": ("corrupt_source", shards(None)),
    "adapter": ("unsupported_source", lambda f: write_json(f / "unet/adapter_config.json", {"r": 4})),
    "quantised": ("unsupported_source", config("quantization_config", {"load_in_4bit": True})),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_leaves_nothing_behind(name: str, source: Path, tmp_path: Path) -> None:
    code, spoil = REFUSED[name]
    store = Store.open(tmp_path / "store", writable=True)
    before = listing(store.path)
    spoil(source)
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", source)
    assert caught.value.code == code
    assert len(caught.value.message) > 20
    assert listing(store.path) == before
    assert list((store.path / "tmp").iterdir()) == []


def test_accepts_the_sound_folder(source: Path) -> None:
    plan = check_source(source)
    assert plan.pipeline_class == "StableDiffusionPipeline"
    parts = {part.name: part for part in plan.parts}
    assert set(parts) == {"scheduler", "unet"}
    assert parts["unet"].weights == (source / UNET,)
    assert parts["unet"].float_dtype == "F32"
    assert parts["scheduler"].weights == ()
    assert parts["scheduler"].float_dtype is None


def test_numbers_and_flags_are_the_pipelines_own_arguments(source: Path) -> None:
    index("boundaries", [0.5, 1.0, 2.0])(source)
    assert {part.name for part in check_source(source).parts} == {"scheduler", "unet"}


def test_a_pickle_beside_safetensors_may_be_ignored(source: Path) -> None:
    touch("unet/diffusion_pytorch_model.bin")(source)
    touch("v1-5-pruned.ckpt")(source)
    assert check_source(source, ignore_pickle=True).parts[1].weights == (source / UNET,)


def test_a_pickle_instead_of_safetensors_may_not(source: Path) -> None:
    (source / UNET).unlink()
    touch("unet/diffusion_pytorch_model.bin")(source)
    with pytest.raises(StoreError, match="convert it to safetensors"):
        check_source(source, ignore_pickle=True)


def test_a_hugging_face_cache_entry_is_a_folder_of_links(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in source.rglob("*") if p.is_file()):
        target = snapshot / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    assert len(check_source(snapshot).parts) == 2
    (snapshot / "unet" / "passwd.txt").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="link out of the folder"):
        check_source(snapshot)


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.fp16.safetensors"],
        [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
        ["diffusion_pytorch_model-00001-of-00001.fp16.safetensors"],
    ],
)
def test_a_variant_is_read_where_there_is_one(names: list[str], source: Path) -> None:
    for name in names:
        write_weights(source / "unet" / name, dtype="F16")
    plain = check_source(source).parts[1]
    variant = check_source(source, variant="fp16").parts[1]
    assert (plain.float_dtype, plain.variant) == ("F32", None)
    assert (variant.float_dtype, variant.variant) == ("F16", "fp16")
    assert [path.name for path in variant.weights] == names


@pytest.mark.parametrize("variant", ["fp16", "../x", ""])
def test_a_variant_that_nothing_has_is_not_found(variant: str, source: Path) -> None:
    with pytest.raises(StoreError) as caught:
        check_source(source, variant=variant)
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    ("library", "known"),
    [
        ("diffusers", True),
        ("transformers", True),
        ("stable_diffusion", True),
        ("flux", True),
        ("torch", False),
        ("pipeline_utils", False),
        ("../models", False),
        ("", False),
    ],
)
def test_libraries(library: str, known: bool) -> None:
    assert known_library(library) is known


def test_each_kind_of_source_has_its_answer(source: Path, tmp_path: Path) -> None:
    assert open_source(str(source)) == FolderSource(source, str(source))
    answers = {
        source / UNET: "unsupported_source",
        tmp_path: "unsupported_source",
        tmp_path / "nowhere": "not_found",
        "no where": "not_found",
    }
    for given, code in answers.items():
        with pytest.raises(StoreError) as caught:
            open_source(given)
        assert caught.value.code == code


def test_records_reader_and_guard_need_no_torch() -> None:
    modules = "records, errors, safetensors_file, blob_writer, store, writer, guard, ingest, ingest_cli"
    script = (
        f"import sys; from understudyd.store import {modules}; "
        "from understudyd.store.guard import known_library; assert known_library('stable_diffusion'); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
