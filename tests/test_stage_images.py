"""Images from the stage equal plain diffusers' bit for bit, and nothing is left outside the arena."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from stage_kit import Family, Rig, pixels
from understudy_demo import tiny
from understudyd.core.types import ErrorCode, Outcome


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("family"))
    family.add("fp32-a", tiny.stable_diffusion(1))
    family.add("fp32-b", tiny.stable_diffusion(2))
    family.add("fp32-c", tiny.stable_diffusion(3, own_text_encoder=False))
    family.add("fp16-a", tiny.stable_diffusion(1), "fp16")
    family.add("fp16-b", tiny.stable_diffusion(2), "fp16")
    family.add("xl-a", tiny.stable_diffusion_xl(1), "fp16")
    family.add("xl-b", tiny.stable_diffusion_xl(2), "fp16")
    return family


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    rig = Rig(family.store)
    yield rig
    rig.close()


@pytest.mark.parametrize("pair", ["fp32", "fp16", "xl"])
def test_a_b_a_equals_plain_diffusers(rig: Rig, family: Family, pair: str) -> None:
    a, b = f"{pair}-a", f"{pair}-b"
    rig.serve(a, b)
    plain = {name: family.plain_images(name) for name in (a, b)}
    assert plain[a] != plain[b]
    for name in (a, b, a, a, b):
        assert pixels(rig.run(name)) == plain[name]
        assert rig.strays() == []


def test_architectures_take_turns(rig: Rig, family: Family) -> None:
    names = ["fp32-a", "xl-a", "fp16-a", "fp32-a", "xl-a"]
    rig.serve(*set(names))
    for name in names:
        assert pixels(rig.run(name)) == family.plain_images(name)


@pytest.mark.parametrize(
    "params",
    [
        {"negative_prompt": "blurry", "guidance": 3.0, "seed": 2**40},
        {"width": 48, "height": 32},
        {"images": 3},
        {"guidance": 1.0, "prompt": ""},
        {"prompt": "ein Grüß-Gott-Bild, " * 20},
    ],
    ids=["negative", "size", "three images", "no guidance", "long prompt"],
)
@pytest.mark.parametrize("name", ["fp32-a", "xl-a"])
def test_what_a_client_may_ask_for(rig: Rig, family: Family, name: str, params: dict[str, Any]) -> None:
    rig.serve(name)
    result = rig.run(name, **params)
    assert pixels(result) == family.plain_images(name, **params)
    assert len(result.infos) == params.get("images", 1)


def test_none_means_the_pipelines_default(rig: Rig, family: Family) -> None:
    rig.serve("fp32-a")
    assert pixels(rig.run("fp32-a", steps=None)) == family.plain_images("fp32-a", steps=None)
    assert rig.progress[-1][1:] == (50, 50)


def test_raw_images_are_rows_of_rgb(rig: Rig, family: Family) -> None:
    rig.serve("fp32-a")
    result = rig.run("fp32-a", format="raw", width=48, height=32)
    (info,) = result.infos
    assert (info.format, info.width, info.height, info.channels) == ("raw", 48, 32, 3)
    assert list(result.images) == family.plain_images("fp32-a", width=48, height=32)


@pytest.mark.parametrize(
    "scheduler_class",
    [
        DDIMScheduler,
        PNDMScheduler,
        HeunDiscreteScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
    ],
)
def test_every_request_steps_its_own_scheduler(
    tmp_path_factory: pytest.TempPathFactory, scheduler_class: Any
) -> None:
    family = Family(tmp_path_factory.mktemp("scheduler"))
    pipeline = tiny.stable_diffusion(1)
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    family.add("model", pipeline)
    rig = Rig(family.store)
    try:
        rig.serve("model")
        expected = family.plain_images("model", steps=4)
        assert [pixels(rig.run("model", steps=4)) for _ in range(2)] == [expected, expected]
    finally:
        rig.close()


def test_bind_touches_only_what_differs(rig: Rig) -> None:
    rig.serve("fp32-a", "fp32-b", "fp32-c")
    assert rig.run("fp32-a").components_bound == ("text_encoder", "unet", "vae")
    assert rig.run("fp32-a").components_bound == ()
    assert rig.run("fp32-b").components_bound == ("text_encoder", "unet")
    assert rig.run("fp32-c").components_bound == ("text_encoder", "unet")


def test_fine_tunes_share_skeletons_and_parts(rig: Rig) -> None:
    rig.serve("fp32-a", "fp32-b", "fp32-c")
    assert len(rig.stage.skeletons()) == 3


def test_components_of_one_signature_have_a_skeleton_each(tmp_path_factory: pytest.TempPathFactory) -> None:
    family = Family(tmp_path_factory.mktemp("twins"))
    pipeline = tiny.stable_diffusion_xl(1)
    torch.manual_seed(5)
    # SDXL takes the pooled embedding from the last encoder, so both may be of the projecting class.
    config = tiny.text_config(projection_dim=32)
    pipeline.text_encoder = type(pipeline.text_encoder_2)(config)
    family.add("twins", pipeline)
    first, second, *_ = family.store.model("twins").components
    assert first.signature == second.signature
    rig = Rig(family.store)
    try:
        rig.serve("twins")
        assert pixels(rig.run("twins")) == family.plain_images("twins")
    finally:
        rig.close()


def test_cancelled_in_the_middle_of_decoding(rig: Rig, family: Family) -> None:
    rig.serve("xl-a", "xl-b")
    before = pixels(rig.run("xl-a"))
    vae = rig.skeleton("AutoencoderKL")
    was_dirty = []

    def cancel(_module: Any, _args: Any) -> None:
        was_dirty.append(vae.is_dirty)
        rig.stage.cancel_run("r2", ErrorCode.CANCELLED)

    blocks_entered: list[int] = []
    hooks = [
        vae.module.decoder.mid_block.register_forward_pre_hook(cancel),
        vae.module.decoder.up_blocks[-1].register_forward_hook(lambda *_: blocks_entered.append(1)),
    ]
    assert rig.ended(rig.submit("xl-a")).outcome is Outcome.CANCELLED
    for hook in hooks:
        hook.remove()
    assert was_dirty == [True], "the VAE was upcast when the cancel came"
    assert blocks_entered == [], "the decoder stopped before its last block"
    assert not vae.is_dirty
    assert rig.strays() == []
    assert {tensor.dtype for _, tensor in vae.tensors()} == {torch.float16}
    assert pixels(rig.run("xl-a")) == before
    assert pixels(rig.run("xl-b")) == family.plain_images("xl-b")


def outside_bytes(rig: Rig) -> tuple[int, int]:
    """How many tensors live outside the arena, and their bytes."""
    start = rig.arena.data_ptr()
    addresses = range(start, start + rig.arena.numel())
    gc.collect()
    sizes = [
        found.numel() * found.element_size()
        for found in gc.get_objects()
        if type(found) in (torch.Tensor, torch.nn.Parameter)  # what compilers leave has no memory
        and found.numel()
        and found.data_ptr() not in addresses
    ]
    return len(sizes), sum(sizes)


def test_nothing_grows_outside_the_arena(rig: Rig) -> None:
    rig.serve("xl-a", "xl-b")

    def round_of_requests() -> None:
        rig.run("xl-a")
        rig.run("xl-b")
        request_id = f"r{rig._requests + 1}"
        rig.cancel_at_step(request_id, 1)
        assert rig.ended(rig.submit("xl-a")).outcome is Outcome.CANCELLED

    round_of_requests()
    seen = outside_bytes(rig)
    for _ in range(5):
        round_of_requests()
        assert outside_bytes(rig) == seen
