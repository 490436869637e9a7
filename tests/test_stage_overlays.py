"""Images of models with adapters equal those that diffusers makes with `fuse_lora`, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, StableDiffusionPipeline

import adapter_kit as lora
from adapter_kit import Making
from input_kit import mask, picture, sent
from overlay_kit import CONV, TEXT, TRANSFORMER, UNET, XL_TEXT, AdaptedFamily, OverlayRig, Write
from stage_kit import pixels, plain_images
from understudy_demo import tiny
from understudyd.core.events import ImagesEncoded
from understudyd.core.types import ErrorCode, Outcome
from zoo import diffusion_transformers

IMAGE, MASK = picture(1), mask()


def kohya(*alphas: float) -> Write:
    return lambda made, path: lora.write_kohya(made, path, alphas=alphas)


@dataclass(frozen=True)
class Case:
    """A base, its adapters with their scales, and the components whose weights they change."""

    name: str
    base: str
    adapters: tuple[tuple[str, float], ...]
    bound: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("one", "sd", (("style", 1.0),), ("unet",)),
    Case("two", "sd", (("style", 0.8), ("shape", -0.35)), ("unet",)),
    Case("the other way round", "sd", (("shape", -0.35), ("style", 0.8)), ("unet",)),
    Case("one blob under two names", "sd", (("style", 0.8), ("again", 0.5)), ("unet",)),
    Case("text encoder", "sd", (("words", 0.6),), ("text_encoder", "unet")),
    Case("convolutions", "sd", (("shape", 0.9),), ("unet",)),
    Case("kohya", "sd", (("kohya", 0.8),), ("text_encoder", "unet")),
    Case("half", "sd-half", (("style", 0.8), ("words", 0.5)), ("text_encoder", "unet")),
    Case("xl", "xl", (("xl-words", 0.6),), ("text_encoder", "text_encoder_2", "unet")),
    Case("xl half", "xl-half", (("xl-words", 0.6),), ("text_encoder", "text_encoder_2", "unet")),
    Case("xl civitai", "xl", (("civitai", 0.6),), ("unet",)),
    Case("sd3", "sd3", (("sd3-style", 0.6),), ("text_encoder", "text_encoder_2", "transformer")),
    Case("flux", "flux", (("flux-style", 0.7), ("flux-words", 0.4)), ("text_encoder", "transformer")),
    Case("several images", "sd", (("words", 0.6),), ("text_encoder", "unet"), {"images": 3}),
    Case("guidance off", "sd", (("style", 1.7),), ("unet",), {"guidance": 1.0, "width": 48}),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdaptedFamily:
    family = AdaptedFamily(tmp_path_factory.mktemp("family"))
    family.add("sd", tiny.stable_diffusion(1))
    family.add("sd-half", tiny.stable_diffusion(1), "fp16")
    family.add("xl", tiny.stable_diffusion_xl(1))
    family.add("xl-half", tiny.stable_diffusion_xl(1), "fp16")  # its autoencoder is cast for a while
    family.add("sd3", diffusion_transformers.stable_diffusion_3(1))
    family.add("flux", diffusion_transformers.flux(1))
    family.adapt("sd", "style", Making(UNET))
    family.adapt("sd", "again", Making(UNET))
    family.adapt("sd", "shape", Making(CONV, rank=5, alpha=3, seed=2))
    family.adapt("sd", "words", Making(UNET | TEXT, alpha=3, seed=3))
    family.adapt("sd", "kohya", Making(CONV | TEXT, seed=4), kohya(1.0, 2.0, 4.5))
    family.adapt("xl", "xl-words", Making(CONV | XL_TEXT, alpha=3))
    family.adapt("xl", "civitai", Making(CONV), lora.write_civitai_xl)
    family.adapt("sd3", "sd3-style", Making(TRANSFORMER | XL_TEXT, alpha=3))
    family.adapt("flux", "flux-style", Making(TRANSFORMER, rank=2))
    family.adapt("flux", "flux-words", Making(TRANSFORMER | TEXT, alpha=3, seed=3))
    return family


@pytest.fixture(scope="module")
def rig(family: AdaptedFamily) -> Iterator[OverlayRig]:
    rig = OverlayRig(family)
    yield rig
    rig.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_images_equal_the_fused_pipelines(rig: OverlayRig, family: AdaptedFamily, case: Case) -> None:
    expected = plain_images(family.fused(case.base, case.adapters), **case.params)
    model = rig.serve_derived(case.base, case.adapters)
    plain = rig.run(case.base, **case.params)
    result = rig.run(model, **case.params)
    assert pixels(result) == expected
    assert set(result.components_bound) == set(case.bound)
    assert pixels(plain) == family.plain_images(case.base, **case.params) != expected
    assert rig.run(model, **case.params).components_bound == (), "bound already"
    back = rig.run(case.base, **case.params)
    assert pixels(back) == pixels(plain) and set(back.components_bound) == set(case.bound)
    assert rig.strays() == rig.stage.strays() == []


def test_models_of_one_base_take_turns_back_to_back(rig: OverlayRig) -> None:
    names = ["sd", *(rig.serve_derived("sd", ((name, 0.7),)) for name in ("style", "shape", "words"))]
    alone = {name: pixels(rig.run(name)) for name in names}
    assert len(set(map(tuple, alone.values()))) == len(names)
    order = [names[i] for i in (1, 2, 0, 3, 3, 1, 0, 2)]
    for request_id, name in [(rig.submit(name), name) for name in order]:
        rig.wait_for(ImagesEncoded(request_id))
        assert pixels(rig.stage.take_result(request_id)) == alone[name]
    assert rig.stage.strays() == []


def test_a_cancelled_run_leaves_the_base_and_other_overlays_alone(rig: OverlayRig) -> None:
    """In fp16 SDXL's autoencoder has just been cast when the run ends."""
    model = rig.serve_derived("xl-half", (("xl-words", 0.6),))
    plain, expected = pixels(rig.run("xl-half")), pixels(rig.run(model))
    (vae,) = [part for part in rig.stage._repertoire.find(model).components if part.name == "vae"]
    hook = vae.skeleton.module.decoder.register_forward_pre_hook(
        lambda *_: rig.stage.cancel_run(request_id, ErrorCode.CANCELLED)
    )
    request_id = f"r{rig._requests + 1}"
    assert rig.ended(rig.submit(model)).outcome is Outcome.CANCELLED
    hook.remove()
    assert rig.stage.strays() == []
    assert pixels(rig.run("xl-half")) == plain
    assert pixels(rig.run(model)) == expected


def test_a_pipeline_that_reads_weights_early_reads_the_overlays(
    rig: OverlayRig, family: AdaptedFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = (("style", 0.8),)
    path = family.plans("sd", adapters)[0].weights[0].base.path
    sums: list[float] = []
    own = StableDiffusionPipeline.check_inputs

    def reads(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        sums.append(pipeline.unet.get_parameter(path).sum().item())
        return own(pipeline, *args, **kwargs)

    reads.__wrapped__ = own  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusionPipeline, "check_inputs", reads)
    layer = path.removesuffix(".weight")
    fused = family.fused("sd", adapters).unet.get_parameter(f"{layer}.base_layer.weight").sum().item()
    plain = family._plain("sd").unet.get_parameter(path).sum().item()
    model = rig.serve_derived("sd", adapters)
    for name, expected in ((model, fused), ("sd", plain), (model, fused)):
        sums.clear()
        rig.run(name)
        assert sums == [expected], "read once, and on stage"


def test_image_to_image_and_inpainting_take_adapters_too(rig: OverlayRig, family: AdaptedFamily) -> None:
    adapters = (("words", 0.6), ("shape", 0.5))
    model = rig.serve_derived("sd", adapters)
    image, mask_image = sent("image", IMAGE), sent("mask_image", MASK)
    fused = family.fused("sd", adapters)

    def expected(auto: Any, **call: Any) -> list[bytes]:
        pipeline = auto.from_pipe(fused)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(7)
        made = pipeline("a red circle", generator=generator, num_inference_steps=4, **call)
        return [i.tobytes() for i in made.images]

    changed = rig.run(model, steps=4, inputs=(image,))
    assert pixels(changed) == expected(AutoPipelineForImage2Image, image=IMAGE)
    painted = rig.run(model, steps=4, inputs=(image, mask_image), width=32, height=32)
    size = {"width": 32, "height": 32}
    assert pixels(painted) == expected(AutoPipelineForInpainting, image=IMAGE, mask_image=MASK, **size)
    assert rig.stage.tasks(model) == rig.stage.tasks("sd")
    plain = rig.run("sd", steps=4, inputs=(image,))
    assert pixels(plain) != pixels(changed)
