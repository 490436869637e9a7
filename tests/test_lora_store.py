"""Adapters in a store: which models they fit, what their overlays hold, how they come and go."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import adapter_kit as kit
from adapter_kit import Making
from adapter_shop_kit import CONV_AND_TEXT, Shop
from ingest_kit import single_threaded
from store_kit import listing
from understudy.admin import ScanResult
from understudy_demo import tiny
from understudyd.store.adapters.files import find_adapters
from understudyd.store.adapters.ingest import AdapterOptions, add_adapter, add_adapters
from understudyd.store.adapters.overlays import AppliedAdapter, plan_overlays
from understudyd.store.adapters.records import AdapterRecord, misfit
from understudyd.store.errors import StoreError
from understudyd.store.ingest import ingest
from understudyd.store.records import DATA_ALIGN_BYTES, TENSOR_ALIGN_BYTES
from understudyd.store.store import Store
from zoo import diffusion_transformers, unets


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_threaded()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def own_shop(tmp_path: Path) -> Shop:
    """For tests that change what is there."""
    return Shop(tmp_path)


# -- which model it is for -------------------------------------------------------------------------


def test_the_base_is_found_among_the_stores_models(own_shop: Shop) -> None:
    flux = diffusion_transformers.flux(0)
    ingest(own_shop.store, "flux", tiny.save(flux, own_shop.root / "flux"))
    made = kit.make_adapter(flux, Making({"transformer": ("to_q",)}))
    assert own_shop.add(kit.write_diffusers(made, own_shop.files / "f.safetensors")).base_model == "flux"
    own = kit.write_diffusers(own_shop.make(), own_shop.files / "s.safetensors")
    record = own_shop.add(own)
    assert record.base_model == "base"
    with pytest.raises(StoreError, match="does not fit") as caught:
        own_shop.add(own, base="flux", replace=True)
    assert caught.value.code == "adapter_misfit"


def test_an_adapter_fits_a_structure_in_every_dtype_and_not_one_model(own_shop: Shop) -> None:
    half = ingest(own_shop.store, "half", own_shop.root / "saved", dtype="fp16")
    record = own_shop.add(kit.write_diffusers(own_shop.make(), own_shop.files / "a.safetensors"))
    assert record.base_model == ""  # two fit, none was named
    for model in (own_shop.model, half):
        signatures = {c.name: own_shop.store.signature(c.signature) for c in model.components}
        assert misfit(record, signatures) is None
    named = own_shop.add(own_shop.files / "a.safetensors", base="half", replace=True)
    assert named.base_model == "half"


def test_a_model_of_other_widths_is_told_by_its_first_weight(own_shop: Shop) -> None:
    record = own_shop.add(kit.write_diffusers(own_shop.make(), own_shop.files / "a.safetensors"))
    torch.manual_seed(0)
    xl = ingest(own_shop.store, "xl", tiny.save(unets.stable_diffusion_xl(0), own_shop.root / "xl"))
    signatures = {c.name: own_shop.store.signature(c.signature) for c in xl.components}
    why = misfit(record, signatures)
    assert why is not None and "unet." in why
    with pytest.raises(StoreError, match="does not fit: the model has"):
        plan_overlays(signatures, [AppliedAdapter(record, 1.0)])


def test_a_base_may_be_in_a_store_that_is_only_read(own_shop: Shop, tmp_path: Path) -> None:
    mine = Store.open(tmp_path / "mine", writable=True)
    path = kit.write_diffusers(own_shop.make(), own_shop.files / "a.safetensors")
    before = listing(own_shop.store.path)
    (file,) = find_adapters(path)
    for base in (None, "base"):
        options = AdapterOptions(base=base, more_stores=(own_shop.store,), replace=True)
        assert add_adapter(mine, file, options).base_model == "base"
    with pytest.raises(StoreError, match="no model 'nobody'"):
        add_adapter(mine, file, AdapterOptions(base="nobody", more_stores=(own_shop.store,)))
    assert listing(own_shop.store.path) == before


def test_a_store_without_a_base_says_so(tmp_path: Path, shop: Shop) -> None:
    store = Store.open(tmp_path / "empty", writable=True)
    (file,) = find_adapters(kit.write_diffusers(shop.make(), tmp_path / "a.safetensors"))
    with pytest.raises(StoreError, match="add the base model first"):
        add_adapter(store, file)


# -- the plan --------------------------------------------------------------------------------------


def test_an_overlay_holds_the_changed_weights_and_no_others(shop: Shop) -> None:
    one = shop.add(kit.write_diffusers(shop.make(layers=CONV_AND_TEXT), shop.files / "one.safetensors"))
    two = shop.add(kit.write_diffusers(shop.make(seed=2), shop.files / "two.safetensors"))
    signatures = shop.signatures()
    plans = {
        p.component: p
        for p in plan_overlays(signatures, [AppliedAdapter(one, 0.5), AppliedAdapter(two, 1.0)])
    }
    assert set(plans) == {"text_encoder", "unet"}
    assert [a.record.name for a in plans["text_encoder"].adapters] == ["one"]
    unet = plans["unet"]
    assert {w.base.path for w in unet.weights} == {
        t.path for r in (one, two) for t in r.targets if t.component == "unet"
    }
    assert [w.base.offset for w in unet.weights] == sorted(w.base.offset for w in unet.weights)
    at = 0
    for weight in unet.weights:
        assert weight.folded.offset >= at and weight.folded.offset % TENSOR_ALIGN_BYTES == 0
        assert weight.folded.offset - at < TENSOR_ALIGN_BYTES
        at = weight.folded.offset + weight.folded.size_bytes
        assert [t.adapter for t in weight.terms] == sorted(t.adapter for t in weight.terms)
    assert unet.size_bytes - at < DATA_ALIGN_BYTES and unet.size_bytes % DATA_ALIGN_BYTES == 0


def test_an_overlays_key_tells_base_adapters_order_and_scale_apart(shop: Shop) -> None:
    made = shop.make(seed=3)
    one = shop.add(kit.write_kohya(made, shop.files / "k1.safetensors", alphas=[1.0]))
    two = shop.add(kit.write_kohya(made, shop.files / "k2.safetensors", alphas=[2.0]))
    assert one.blob == two.blob  # equal factors, other alphas

    def key(*applied: tuple[AdapterRecord, float], blob: str = "b") -> str:
        (plan,) = plan_overlays(shop.signatures(), [AppliedAdapter(*pair) for pair in applied])
        return plan.key(blob)

    keys = [
        key((one, 1.0)),
        key((two, 1.0)),
        key((one, 0.5)),
        key((one, 1.0), blob="c"),
        key((one, 1.0), (two, 1.0)),
        key((two, 1.0), (one, 1.0)),
    ]
    assert len(set(keys)) == len(keys)
    assert key((one, 1.0)) == keys[0]
    with pytest.raises(StoreError, match="asked for twice"):
        key((one, 1.0), (one, 0.5))


# -- many, and again -------------------------------------------------------------------------------


def test_a_folder_is_added_in_one_call_and_one_refusal_stops_nobody(own_shop: Shop) -> None:
    kit.write_diffusers(own_shop.make(), own_shop.files / "good.safetensors")
    kit.write_peft_folder(own_shop.make(seed=2), own_shop.files / "deep" / "peft style")
    kit.write(own_shop.files / "dora.safetensors", own_shop.make().state() | {"x.dora_scale": torch.ones(1)})
    (own_shop.files / "pickle.pt").write_bytes(b"")
    told: list[ScanResult] = []
    progress: list[tuple[int, int]] = []

    def add() -> list[ScanResult]:
        return add_adapters(
            own_shop.store,
            find_adapters(own_shop.files),
            on_result=told.append,
            progress=lambda name, done, total: progress.append((done, total)),
        )

    results = add()
    assert results == told
    outcomes = {result.name: (result.outcome, result.code) for result in results}
    assert outcomes == {
        "dora": ("refused", "not_plain_lora"),
        "good": ("added", ""),
        "peft-style": ("added", ""),
        "pickle": ("refused", "unsafe_file"),
    }
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1][0] == progress[-1][1] > 0
    before = listing(own_shop.store.path)
    assert [r.outcome for r in add() if r.outcome != "refused"] == ["unchanged", "unchanged"]
    assert listing(own_shop.store.path) == before


def test_a_name_is_a_models_or_an_adapters(own_shop: Shop) -> None:
    path = kit.write_diffusers(own_shop.make(), own_shop.files / "base.safetensors")
    with pytest.raises(StoreError, match="already names a model"):
        own_shop.add(path)
    record = own_shop.add(path.rename(path.with_name("mine.safetensors")))
    with pytest.raises(StoreError, match="already names an adapter"):
        ingest(own_shop.store, record.name, own_shop.root / "saved")


def test_other_content_needs_to_be_told_to_replace(own_shop: Shop) -> None:
    path = own_shop.files / "a.safetensors"
    old = own_shop.add(kit.write_diffusers(own_shop.make(), path))
    kit.write_diffusers(own_shop.make(seed=2), path)
    with pytest.raises(StoreError, match="--replace") as caught:
        own_shop.add(path)
    assert caught.value.code == "exists"
    new = own_shop.add(path, replace=True)
    assert new.content != old.content
    own_shop.store.clean()
    assert not own_shop.store.blob_path(old.blob.sha256).exists()


def test_adapters_keep_their_blobs_until_they_are_removed(own_shop: Shop) -> None:
    record = own_shop.add(kit.write_diffusers(own_shop.make(), own_shop.files / "a.safetensors"))
    blob = own_shop.store.blob_path(record.blob.sha256)
    own_shop.store.remove("base")
    assert blob.exists()
    size_bytes = blob.stat().st_size
    with own_shop.store.writing() as writer:
        assert writer.remove_adapter("a") == size_bytes
    assert not blob.exists()
    assert own_shop.shelf.scan() == ({}, {})
    with own_shop.store.writing() as writer, pytest.raises(StoreError, match="no adapter 'a'"):
        writer.remove_adapter("a")


def test_a_damaged_adapter_is_told_apart_and_stops_the_collector(own_shop: Shop) -> None:
    record = own_shop.add(kit.write_diffusers(own_shop.make(), own_shop.files / "a.safetensors"))
    blob = own_shop.store.blob_path(record.blob.sha256)
    (own_shop.shelf.folder("a") / "manifest.json").write_text("{}")
    found, damaged = own_shop.shelf.scan()
    assert not found and set(damaged) == {"a"}
    own_shop.store.clean()
    assert blob.exists()
    assert own_shop.add(own_shop.files / "a.safetensors").name == "a"  # adding it again repairs it
    blob.write_bytes(b"short")
    with pytest.raises(StoreError, match="not as long"):
        own_shop.shelf.adapter("a")
