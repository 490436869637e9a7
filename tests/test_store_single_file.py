"""Single-file checkpoints against diffusers' own `from_single_file`, and what is refused of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.original_layout import original_state, save_checkpoint
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from ingest_kit import assert_serves, single_threaded
from store_kit import edit_json, listing, raw_file
from understudy_demo import tiny
from understudyd.store.errors import StoreError
from understudyd.store.ingest import IngestOptions, ingest, ingest_many
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.sources.checkpoint import Family, NoCheckpoint, read_checkpoint
from understudyd.store.store import Store

DTYPES = (torch.float16, torch.float32)
one_thread = pytest.fixture(scope="module", autouse=True)(single_threaded)


def xl_pipeline(seed: int) -> StableDiffusionXLPipeline:
    """SDXL whose text encoders differ in width, which is how diffusers tells them apart in one file."""
    parts = dict(tiny.stable_diffusion_xl(seed).components)
    del parts["image_encoder"], parts["feature_extractor"]
    torch.manual_seed(seed)
    parts["text_encoder_2"] = CLIPTextModelWithProjection(tiny.text_config(64, projection_dim=32))
    parts["unet"] = tiny.unet(
        32 + 64, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    return StableDiffusionXLPipeline(**parts)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `sd` and `xl`, and files of other weights of the same architectures."""
    root = tmp_path_factory.mktemp("single")
    with quiet_libraries():
        tiny.save(tiny.stable_diffusion(1), root / "sd")
        tiny.save(xl_pipeline(1), root / "xl")
        other = tiny.stable_diffusion(2, shared_seed=7)
        save_checkpoint(other.components, root / "sd.safetensors")
        save_checkpoint(xl_pipeline(2).components, root / "xl.safetensors")
        parts = {name: other.components[name] for name in ("unet", "text_encoder")}
        save_checkpoint(parts, root / "no-vae.safetensors")
        save_checkpoint({"unet": other.unet}, root / "unet.safetensors")
        parts = {name: other.to(torch.float16).components[name] for name in ("unet", "text_encoder")}
        save_checkpoint(parts, root / "half.safetensors")
    return root


@pytest.fixture(scope="module")
def stocked(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store.open(tmp_path_factory.mktemp("stocked") / "store", writable=True)
    ingest_many(store, [("base", sources / "sd"), ("base-xl", sources / "xl")])
    return store.path


@pytest.fixture
def store(stocked: Path, tmp_path: Path) -> Store:
    """A store with `base` and `base-xl`."""
    return Store.open(Path(shutil.copytree(stocked, tmp_path / "store")), writable=True)


def from_single_file(file: Path, folder: Path, dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    cls = StableDiffusionXLPipeline if folder.name == "xl" else StableDiffusionPipeline
    with quiet_libraries():
        return cls.from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype, **components
        )


@pytest.mark.parametrize(("file", "folder", "like"), [("sd", "sd", "base"), ("xl", "xl", "base-xl")])
def test_a_checkpoint_is_what_from_single_file_makes(
    file: str, folder: str, like: str, sources: Path, store: Store
) -> None:
    path = sources / f"{file}.safetensors"
    expected = from_single_file(path, sources / folder)
    by_model = ingest(store, "m", path, like=like)
    assert_serves(store, by_model, expected)
    assert by_model.pipeline_class == store.model(like).pipeline_class
    assert {c.signature for c in by_model.components} == {c.signature for c in store.model(like).components}
    assert by_model.source == str(path)
    assert by_model.parts == store.model(like).parts
    by_folder = ingest(store, "n", path, config=sources / folder)
    assert by_folder.components == by_model.components
    assert by_folder.parts == by_model.parts


def test_the_unet_s_dtype_is_that_of_all(sources: Path, store: Store) -> None:
    """One dtype for everything, as the library has it: base is in float32, and the missing VAE converted."""
    file, folder = sources / "half.safetensors", sources / "sd"
    vaes = {dtype: AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype) for dtype in DTYPES}
    record = ingest(store, "m", file, like="base")
    assert_serves(store, record, from_single_file(file, folder, torch.float16, vae=vaes[torch.float16]))
    wide = ingest(store, "wide", file, like="base", dtype="fp32")
    assert_serves(store, wide, from_single_file(file, folder, torch.float32, vae=vaes[torch.float32]))


def test_what_the_file_lacks_comes_from_the_model_it_is_like(sources: Path, store: Store) -> None:
    record = ingest(store, "m", sources / "no-vae.safetensors", like="base")
    base = {c.name: c.blob.sha256 for c in store.model("base").components}
    mine = {c.name: c.blob.sha256 for c in record.components}
    assert mine["vae"] == base["vae"]
    assert mine["unet"] != base["unet"] and mine["text_encoder"] != base["text_encoder"]
    unet_only = ingest(store, "u", sources / "unet.safetensors", like="base")
    mine = {c.name: c.blob.sha256 for c in unet_only.components}
    assert (mine["vae"], mine["text_encoder"]) == (base["vae"], base["text_encoder"])
    # A folder with weights serves as well as a model.
    assert ingest(store, "f", sources / "unet.safetensors", config=sources / "sd").components == (
        unet_only.components
    )


def test_a_config_folder_needs_no_weights_of_what_the_file_brings(
    sources: Path, tmp_path: Path, store: Store
) -> None:
    def weights(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    configs = shutil.copytree(sources / "sd", tmp_path / "configs", ignore=weights)
    record = ingest(store, "m", sources / "sd.safetensors", config=configs)
    assert_serves(store, record, from_single_file(sources / "sd.safetensors", sources / "sd"))
    before = listing(store.path)
    with pytest.raises(StoreError, match="brings no vae") as caught:
        ingest(store, "n", sources / "no-vae.safetensors", config=configs)
    assert caught.value.code == "not_found"
    assert listing(store.path) == before


def test_keys_of_no_component_are_left_unread(sources: Path, tmp_path: Path, store: Store) -> None:
    state = load_file(sources / "sd.safetensors") | {
        "alphas_cumprod": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.5),
    }
    save_file(state, tmp_path / "more.safetensors")
    plain = ingest(store, "plain", sources / "sd.safetensors", like="base")
    more = ingest(store, "more", tmp_path / "more.safetensors", like="base")
    assert more.components == plain.components


def test_the_first_model_that_fits_counts(sources: Path, store: Store) -> None:
    options = IngestOptions(like=("base", "base-xl"))
    (record,) = ingest_many(store, [("m", sources / "xl.safetensors")], options)
    assert record.pipeline_class == "StableDiffusionXLPipeline"


def test_a_checkpoint_tells_what_it_is(sources: Path) -> None:
    sd, xl = read_checkpoint(sources / "sd.safetensors"), read_checkpoint(sources / "xl.safetensors")
    assert (sd.family, xl.family) == (Family.SD_1, Family.SDXL)
    assert sd.components == {"unet", "vae", "text_encoder"}
    assert xl.components == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert (sd.in_channels, sd.first_channels, sd.context_width) == (4, 32, 32)
    assert xl.context_width == 96
    assert read_checkpoint(sources / "half.safetensors").float_dtype == "F16"
    bare = read_checkpoint(sources / "unet.safetensors")
    assert (bare.family, bare.components) == (Family.SD_1, {"unet"})


def keys(*names: str, shape: tuple[int, ...] = (2, 2)) -> Callable[[Path], Path]:
    """A file that holds tensors of these names."""

    def write(path: Path) -> Path:
        save_file({name: torch.zeros(shape) for name in names}, path)
        return path

    return write


UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
LORA = "is a LoRA, an adapter and no model of its own; add it with `understudyctl add-lora`"
OTHER_KINDS = {
    "kohya LoRA": (LORA, keys("lora_unet_down_blocks_0_attn.lora_down.weight", "x.alpha")),
    "diffusers LoRA": (LORA, keys("unet.down_blocks.0.attn.to_q.lora_A.weight")),
    "PEFT LoRA": (LORA, keys("base_model.model.to_q.lora_B.weight")),
    "LoHa": (LORA, keys("lora_te_x.hada_w1_a")),
    "ControlNet": ("is a ControlNet", keys("control_model.time_embed.0.weight", UNET_KEY)),
    "IP-Adapter": ("is an IP-Adapter", keys("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    "embedding": ("is a textual inversion", keys("emb_params")),
    "SDXL embedding": ("is a textual inversion", keys("clip_g", "clip_l")),
    "VAE": ("is a VAE alone", keys("encoder.conv_in.weight", "decoder.conv_in.weight")),
    "VAE with its prefix": ("is a VAE alone", keys("first_stage_model.encoder.conv_in.weight")),
    "text encoder": ("is a text encoder alone", keys("text_model.embeddings.token_embedding.weight")),
    "Flux": ("is of Flux", keys("model.diffusion_model.double_blocks.0.img_attn.qkv.weight")),
    "SD3": ("is of Stable Diffusion 3", keys("model.diffusion_model.joint_blocks.0.x_block.weight")),
    "diffusers UNet": ("is one component", keys("down_blocks.0.resnets.0.conv1.weight")),
    "other transformer": ("is of another architecture", keys("model.diffusion_model.layers.0.weight")),
    "quantised": ("is quantised", keys(UNET_KEY, "model.diffusion_model.out.2.absmax")),
    "upscaler": ("is an upscaler", keys("conv_first.weight", "body.0.rdb1.conv1.weight")),
    "anything": ("holds no diffusion model", keys("weight")),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_files_are_named(kind: str, tmp_path: Path, store: Store) -> None:
    what, write = OTHER_KINDS[kind]
    path = write(tmp_path / "file.safetensors")
    before = listing(store.path)
    with pytest.raises(NoCheckpoint) as caught:
        ingest(store, "m", path, like="base")
    assert caught.value.code == "unsupported_source"
    assert caught.value.message.startswith(f"file.safetensors {what}")
    assert listing(store.path) == before


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("model.ckpt", "unsafe_file", "is a pickle"),
        ("model.pt", "unsafe_file", "is a pickle"),
        ("model.SAFETENSORS", "unsupported_source", "give it that ending"),
        ("model.sft", "unsupported_source", "give it that ending"),
        ("model.gguf", "unsupported_source", "quantised"),
    ],
)
def test_other_endings_are_never_opened(
    name: str, code: str, says: str, sources: Path, tmp_path: Path, store: Store
) -> None:
    """diffusers unpickles what does not end in .safetensors, whatever is in it."""
    path = Path(shutil.copyfile(sources / "sd.safetensors", tmp_path / name))
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", path, like="base")
    assert caught.value.code == code
    assert says in caught.value.message


def wider(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {UNET_KEY: torch.zeros(32, 9, 3, 3)}


def shorter(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if ".output_blocks.1." not in name}


def deeper(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    block = {n: t for n, t in state.items() if "middle_block.1.transformer_blocks.0" in n}
    return state | {name.replace("blocks.0", "blocks.1"): t.clone() for name, t in block.items()}


def without_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    lost = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    return {name: tensor for name, tensor in state.items() if name != lost}


SPOILT = {
    "inpainting": ("unsupported_source", wider, "has a UNet of 4 input channels, the checkpoint 9"),
    "fewer weights": ("corrupt_source", shorter, "of another architecture or was cut down"),
    "more weights": ("unsupported_source", deeper, "of different architectures"),
    "a missing weight": ("corrupt_source", without_text, "lacks 1 weights of text_encoder"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_is_refused(name: str, sources: Path, tmp_path: Path, store: Store) -> None:
    code, spoil, says = SPOILT[name]
    save_file(spoil(load_file(sources / "sd.safetensors")), tmp_path / "bad.safetensors")
    before = listing(store.path)
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", tmp_path / "bad.safetensors", like="base")
    assert (caught.value.code, says in caught.value.message) == (code, True), caught.value.message
    assert listing(store.path) == before
    assert list((store.path / "tmp").iterdir()) == []


def test_an_unfit_model_is_named_with_the_reason(sources: Path, store: Store) -> None:
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", sources / "xl.safetensors", like="base")
    assert caught.value.message == (
        "xl.safetensors is a checkpoint of SDXL and does not fit: base is a StableDiffusionPipeline without "
        "text_encoder_2; name a model of the same architecture"
    )
    with pytest.raises(StoreError, match="has a UNet of 96 numbers a token, the checkpoint 32"):
        ingest(store, "m", sources / "unet.safetensors", config=sources / "xl")
    with pytest.raises(StoreError, match="--like MODEL"):
        ingest(store, "m", sources / "sd.safetensors")
    with pytest.raises(StoreError, match="no model 'nobody'"):
        ingest(store, "m", sources / "sd.safetensors", like="nobody")
    with pytest.raises(StoreError, match="--config takes a diffusers folder"):
        ingest(store, "m", sources / "sd.safetensors", config=sources)


def test_a_config_folder_is_guarded_like_any_source(sources: Path, tmp_path: Path, store: Store) -> None:
    configs = shutil.copytree(sources / "sd", tmp_path / "configs")
    edit_json(configs / "unet" / "config.json", lambda d: d.update(auto_map={"x": "y"}))
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", sources / "sd.safetensors", config=configs)
    assert caught.value.code == "unsafe_file"


def test_eight_bit_floats_need_a_dtype(sources: Path, tmp_path: Path, store: Store) -> None:
    state = load_file(sources / "sd.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if n.startswith("model.") else t for n, t in state.items()}
    save_file(small, tmp_path / "small.safetensors")
    with pytest.raises(StoreError, match="--dtype fp16"):
        ingest(store, "m", tmp_path / "small.safetensors", like="base")
    record = ingest(store, "m", tmp_path / "small.safetensors", like="base", dtype="fp16")
    unet = next(c for c in record.components if c.name == "unet")
    assert {t.dtype for t in store.signature(unet.signature).tensors} == {"F16"}


def test_a_hostile_header_is_refused(tmp_path: Path, store: Store) -> None:
    header = json.dumps({UNET_KEY: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    raw_file(tmp_path / "short.safetensors", header.encode(), b"")
    with pytest.raises(StoreError) as caught:
        ingest(store, "m", tmp_path / "short.safetensors", like="base")
    assert caught.value.code == "corrupt_source"


def test_the_original_layout_holds_every_weight() -> None:
    """The kit itself: as many numbers as the components have."""
    pipeline = tiny.stable_diffusion(3)
    state = original_state(pipeline.components)
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for m in modules for p in m.parameters())
