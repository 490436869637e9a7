"""LoRA files of every format become adapters of a store; what is no plain LoRA is refused by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapter_kit as kit
from adapter_shop_kit import CONV_AND_TEXT, Shop
from ingest_kit import single_threaded
from store_kit import listing, raw_file, write_json
from understudyd.store.errors import StoreError
from understudyd.store.records import TENSOR_ALIGN_BYTES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


def test_the_record_says_what_is_changed_and_how_strongly(shop: Shop) -> None:
    made = shop.make(layers=CONV_AND_TEXT, rank=6, alpha=3)
    path = kit.write_diffusers(made, shop.files / "told.safetensors")
    record = shop.add(path)
    assert record == shop.shelf.adapter("told")
    assert record.family == "StableDiffusionLoraLoaderMixin"
    assert record.base_model == "base"
    assert record.components == ("text_encoder", "unet")
    assert record.ranks == (6,)
    assert {target.alpha for target in record.targets} == {3.0}
    kinds = {target.path.rpartition(".")[0].rpartition(".")[2]: target.kind for target in record.targets}
    assert (kinds["conv1"], kinds["proj_in"], kinds["to_q"], kinds["fc1"]) == (
        "conv",
        "conv",
        "linear",
        "linear",
    )
    own = made.state()
    assert len(record.targets) * 2 == len(own)
    blob = load_file(shop.store.blob_path(record.blob.sha256))
    for target in record.targets:
        for factor in (target.down, target.up):
            assert factor.offset % TENSOR_ALIGN_BYTES == 0
            assert torch.equal(blob[factor.path], own[factor.path])
            assert factor.shape == tuple(own[factor.path].shape)


def test_factors_keep_their_dtype(shop: Shop) -> None:
    made = shop.make(dtype=torch.bfloat16)
    record = shop.add(kit.write_diffusers_bare(made, shop.files / "bf16.safetensors"))
    assert {factor.dtype for target in record.targets for factor in (target.down, target.up)} == {"BF16"}


@pytest.mark.parametrize(
    "write",
    [
        kit.write_attn_processors,
        kit.write_attn_processors_prefixed,
        lambda made, path: kit.write_kohya(made, path, alphas=[4.0]),
        lambda made, path: kit.write_peft_folder(made, path.with_suffix("")),
    ],
    ids=["attention processors", "attention processors with prefix", "kohya", "PEFT folder"],
)
def test_every_format_of_one_adapter_is_the_same_adapter(
    shop: Shop, tmp_path: Path, write: Callable[[kit.MadeAdapter, Path], Path]
) -> None:
    made = shop.make(alpha=4)  # as the rank, which formats without alpha mean
    plain = shop.add(kit.write_diffusers_bare(made, shop.files / "plain.safetensors"), replace=True)
    other = shop.add(write(made, tmp_path / "other.safetensors"), replace=True)
    assert other.name == "other"
    assert other.content == plain.content


def test_pefts_settings_are_in_the_folder(shop: Shop, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 5}, "use_rslora": True}
    made = shop.make(alpha=7, settings=settings)
    path = kit.write_peft_folder(made, tmp_path / "patterned")
    record = shop.add(path)
    named = shop.add(kit.write_diffusers(made, tmp_path / "named.safetensors"))
    assert record.content == named.content
    found = {(t.path.rpartition(".")[0].rpartition(".")[2], t.rank, t.alpha) for t in record.targets}
    assert found == {("to_q", 2, 7.0), ("to_k", 4, 5.0), ("to_v", 4, 7.0), ("0", 4, 7.0)}
    assert all(target.is_rank_stabilised for target in record.targets)


def test_what_people_want_to_know_is_kept(shop: Shop) -> None:
    metadata = {
        "ss_network_dim": "4",
        "ss_tag_frequency": "x" * 1000,
        "modelspec.trigger_phrase": "pixel art, px",
        "modelspec.license": "cc-by-4.0",
        "other": "not ours",
    }
    made = shop.make(seed=9)
    path = kit.write_kohya(made, shop.files / "noted.safetensors", alphas=[4.0], metadata=metadata)
    write_json(path.with_suffix(".json"), {"activation text": "px, 8 bit", "description": "small squares"})
    write_json(path.with_suffix(".civitai.info"), {"trainedWords": ["sprite", 5]})
    facts = shop.add(path).facts
    assert facts.trigger_words == ("pixel art", "px", "8 bit", "sprite")
    assert (facts.licence, facts.description) == ("cc-by-4.0", "small squares")
    assert facts.metadata == {
        "modelspec.license": "cc-by-4.0",
        "modelspec.trigger_phrase": "pixel art, px",
        "ss_network_dim": "4",
    }


def test_damaged_notes_are_left_out(shop: Shop) -> None:
    path = kit.write_diffusers_bare(shop.make(seed=10), shop.files / "scribbled.safetensors")
    path.with_suffix(".json").write_text("{")
    path.with_suffix(".civitai.info").write_text("[1]")
    assert shop.add(path).facts.trigger_words == ()


# -- what is refused -------------------------------------------------------------------------------

MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def _plus(key: str) -> Callable[[kit.State], None]:
    return lambda state: state.update({key: torch.ones(1)})


def _nan(state: kit.State) -> None:
    next(iter(state.values()))[0, 0] = float("nan")


def _renamed(state: kit.State) -> None:
    state[f"{MODULE}_not.lora_A.weight"] = state.pop(f"{MODULE}.lora_A.weight")
    state[f"{MODULE}_not.lora_B.weight"] = state.pop(f"{MODULE}.lora_B.weight")


def _other_component(state: kit.State) -> None:
    state["transformer.to_q.lora_A.weight"] = state.pop(f"{MODULE}.lora_A.weight")


def _wrong_shape(state: kit.State) -> None:
    state[f"{MODULE}.lora_A.weight"] = torch.ones(4, 7)


def _wrong_rank(state: kit.State) -> None:
    state[f"{MODULE}.lora_B.weight"] = torch.ones(state[f"{MODULE}.lora_B.weight"].shape[0], 3)


def _norm(state: kit.State) -> None:
    state["unet.conv_norm_out.lora_A.weight"] = torch.ones(4, 32)
    state["unet.conv_norm_out.lora_B.weight"] = torch.ones(32, 4)


def _whole(state: kit.State) -> None:
    for key in list(state):
        state[key] = state[key].to(torch.int8)


REFUSALS: dict[str, tuple[Callable[[kit.State], None], str, str]] = {
    "DoRA of kohya": (_plus("lora_unet_x.dora_scale"), "not_plain_lora", "is a DoRA"),
    "DoRA of PEFT": (_plus(f"{MODULE}.lora_magnitude_vector"), "not_plain_lora", "is a DoRA"),
    "LoKr": (_plus("lora_unet_x.lokr_w1"), "not_plain_lora", "is a LoKr"),
    "LoHa": (_plus("lora_unet_x.hada_w1_a"), "not_plain_lora", "is a LoHa"),
    "OFT": (_plus("lora_unet_x.oft_blocks"), "not_plain_lora", "is an OFT"),
    "BOFT": (_plus("x.boft_R"), "not_plain_lora", "is a BOFT"),
    "IA3": (_plus("x.ia3_l"), "not_plain_lora", "is an IA3"),
    "VeRA": (_plus("x.vera_lambda_b"), "not_plain_lora", "is a VeRA"),
    "Tucker": (_plus("lora_unet_x.lora_mid.weight"), "not_plain_lora", "Tucker"),
    "textual inversion": (_plus("emb_params"), "not_plain_lora", "textual inversion"),
    "bundled embedding": (_plus("bundle_emb.word.string_to_param.*"), "not_plain_lora", "textual inversion"),
    "full difference": (_plus("lora_unet_x.diff"), "not_plain_lora", "full differences"),
    "bias difference": (_plus("lora_unet_x.diff_b"), "not_plain_lora", "full differences"),
    "bias": (_plus(f"{MODULE}.lora_B.bias"), "not_plain_lora", "biases"),
    "checkpoint": (_plus("model.diffusion_model.out"), "not_plain_lora", "which `understudyctl add` adds"),
    "unknown key": (_plus("what.is.this"), "not_plain_lora", "what.is.this"),
    "integers": (_whole, "not_plain_lora", "in I8"),
    "empty": (lambda state: state.clear(), "not_plain_lora", "it is empty"),
    "not finite": (_nan, "corrupt_source", "not finite"),
    "half a pair": (lambda state: state.pop(f"{MODULE}.lora_B.weight"), "corrupt_source", "one factor"),
    "unknown module": (_renamed, "adapter_misfit", f"changes {MODULE}_not, which the base has not"),
    "unknown component": (_other_component, "adapter_misfit", "'transformer.to_q.lora_A.weight'"),
    "norm layer": (_norm, "adapter_misfit", "a GroupNorm; linear and convolution layers only"),
    "wrong shape": (_wrong_shape, "adapter_misfit", f"[4, 7] and [64, 4] for {MODULE}"),
    "wrong rank": (_wrong_rank, "adapter_misfit", "for " + MODULE),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_plain_lora_is_refused_by_name(shop: Shop, tmp_path: Path, name: str) -> None:
    change, code, words = REFUSALS[name]
    state = shop.make().state()
    change(state)
    path = kit.write(tmp_path / "bad.safetensors", state)
    before = listing(shop.store.path)
    with pytest.raises(StoreError) as caught:
        shop.add(path)
    assert caught.value.code == code
    assert words in caught.value.message
    assert "bad.safetensors" in caught.value.message
    assert listing(shop.store.path) == before


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_pickles_are_refused_unread(shop: Shop, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(b"never read")
    with pytest.raises(StoreError, match="pickle") as caught:
        shop.add(path)
    assert caught.value.code == "unsafe_file"


@pytest.mark.parametrize(
    "header", [b"{", b"[]", {"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}]
)
def test_a_bad_header_is_refused(shop: Shop, tmp_path: Path, header: object) -> None:
    with pytest.raises(StoreError) as caught:
        shop.add(raw_file(tmp_path / "bad.safetensors", header, b"0000"))
    assert caught.value.code == "corrupt_source"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["conv_in"]}, "more than its factors"),
        ({"peft_type": "LOHA"}, "'LOHA' adapter of PEFT"),
    ],
)
def test_pefts_settings_for_other_kinds_are_refused(
    shop: Shop, tmp_path: Path, setting: dict[str, Any], words: str
) -> None:
    path = kit.write_peft_folder(shop.make(), tmp_path / "other")
    config = path.with_name("adapter_config.json")
    write_json(config, json.loads(config.read_text()) | setting)
    with pytest.raises(StoreError, match=words) as caught:
        shop.add(path)
    assert caught.value.code == "not_plain_lora"
