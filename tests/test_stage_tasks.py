"""Several tasks over one model's components, and schedulers of the request's choice, as in diffusers."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from input_kit import mask, picture, sent
from stage_kit import Family, Rig, pixels
from understudy_demo import tiny
from understudyd.core.types import ErrorCode, Outcome

IMAGE, MASK, EDGES = picture(1), mask(), picture(2)


def control_net(seed: int) -> StableDiffusionControlNetPipeline:
    base = tiny.stable_diffusion(seed)
    torch.manual_seed(seed)
    guide = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16))
    for parameter in guide.parameters():
        torch.nn.init.normal_(
            parameter, std=0.05
        )  # its last layers begin as zeros, which no image would show
    return StableDiffusionControlNetPipeline(
        **base.components, controlnet=guide, requires_safety_checker=False
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("family"))
    family.add("sd", tiny.stable_diffusion(1))
    family.add("xl", tiny.stable_diffusion_xl(1))
    family.add("guided", control_net(3))
    inpainting = tiny.stable_diffusion(4, in_channels=9)
    family.add(
        "nine-channels",
        StableDiffusionInpaintPipeline(**inpainting.components, requires_safety_checker=False),
    )
    refiner = tiny.stable_diffusion_xl(5)
    family.add("refiner", StableDiffusionXLImg2ImgPipeline(**refiner.components))
    return family


@pytest.fixture(scope="module")
def rig(family: Family) -> Iterator[Rig]:
    rig = Rig(family.store)
    rig.serve("sd", "xl", "guided", "nine-channels", "refiner")
    yield rig
    rig.close()


def plain(family: Family, name: str, auto: Any, **call: Any) -> list[bytes]:
    """The pixels of plain diffusers: `from_pipe` of an auto pipeline class, or the model's own pipeline."""
    pipeline = family._plain(name)
    if auto is not None:
        options = {"controlnet": None} if call.pop("without_controlnet", False) else {}
        pipeline = auto.from_pipe(pipeline, **options)
        pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(7)
    call = {"num_inference_steps": 4} | call
    return [i.tobytes() for i in pipeline("a red circle", generator=generator, **call).images]


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_one_set_of_components_does_three_tasks_in_turn(rig: Rig, family: Family, name: str) -> None:
    image, mask_image = sent("image", IMAGE), sent("mask_image", MASK)
    asked: dict[str, Any] = {
        "text-to-image": ((), None, {}),
        "image-to-image": ((image,), AutoPipelineForImage2Image, {"image": IMAGE}),
        "inpainting": (
            (image, mask_image),
            AutoPipelineForInpainting,
            {"image": IMAGE, "mask_image": MASK, "height": 32, "width": 32},
        ),
    }
    expected = {task: plain(family, name, auto, **call) for task, (_, auto, call) in asked.items()}
    assert len(set(map(tuple, expected.values()))) == 3
    rig.run(name)
    for task in [*asked, *reversed(asked)]:
        size = {"width": 32, "height": 32} if task == "inpainting" else {}
        result = rig.run(name, task=task, inputs=asked[task][0], steps=4, **size)
        assert pixels(result) == expected[task], task
        assert result.components_bound == (), "the same components, resident and bound"
        assert rig.stage.strays() == []


def test_inputs_choose_the_task_when_none_is_named(rig: Rig, family: Family) -> None:
    image, mask_image = sent("image", IMAGE), sent("mask_image", MASK)
    named = pixels(rig.run("sd", steps=4, task="image-to-image", inputs=(image,)))
    assert pixels(rig.run("sd", steps=4, inputs=(image,))) == named
    named = pixels(rig.run("sd", steps=4, task="inpainting", inputs=(image, mask_image)))
    assert pixels(rig.run("sd", steps=4, inputs=(image, mask_image))) == named


def test_a_model_with_a_controlnet(rig: Rig, family: Family) -> None:
    control, image = sent("control_image", EDGES), sent("image", IMAGE)
    guided = plain(family, "guided", None, image=EDGES)
    free = plain(family, "guided", AutoPipelineForText2Image, without_controlnet=True)
    both = plain(family, "guided", AutoPipelineForImage2Image, image=IMAGE, control_image=EDGES, strength=0.5)
    assert len({tuple(guided), tuple(free), tuple(both)}) == 3
    own = sent("image", EDGES)
    assert pixels(rig.run("guided", steps=4, inputs=(own,))) == guided
    assert pixels(rig.run("guided", steps=4, task="text-to-image-controlnet", inputs=(own,))) == guided
    assert pixels(rig.run("guided", steps=4, task="text-to-image")) == free
    named = {"steps": 4, "options": {"strength": 0.5}, "inputs": (image, control)}
    assert pixels(rig.run("guided", **named)) == both, "the names tell which task is meant"
    assert pixels(rig.run("guided", task="image-to-image-controlnet", **named)) == both
    assert rig.stage.strays() == []


def test_what_a_model_can_do(rig: Rig) -> None:
    can = {name: rig.stage.tasks(name) for name in ("sd", "guided", "nine-channels")}
    assert can == {
        "sd": ["text-to-image", "image-to-image", "inpainting"],
        "guided": [
            "text-to-image",
            "text-to-image-controlnet",
            "image-to-image",
            "image-to-image-controlnet",
            "inpainting",
            "inpainting-controlnet",
        ],
        "nine-channels": ["inpainting"],
    }


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("sd", {"task": "text-to-video"}, "it can do text-to-image, image-to-image, inpainting"),
        ("sd", {"task": "inpainting-controlnet"}, "cannot do inpainting-controlnet; it can do text-to-image"),
        ("nine-channels", {"task": "text-to-image"}, "cannot do text-to-image; it can do inpainting"),
        ("nine-channels", {}, "needs an image as image"),
        ("sd", {"task": "inpainting", "inputs": (sent("image", IMAGE),)}, "needs an image as mask_image"),
        ("refiner", {}, "needs an image as image"),
        ("sd", {"task": "text-to-image", "inputs": (sent("image", IMAGE),)}, "it takes no images"),
        ("sd", {"inputs": (sent("picture", IMAGE),)}, "takes no input 'picture'"),
        ("guided", {}, "needs an image as image"),
        ("sd", {"inputs": (sent("mask_image", MASK),)}, "send it with image= or --init-image"),
        ("sd", {"inputs": (sent("control_image", EDGES),)}, "image-to-image takes image; inpainting takes"),
        ("sd", {"inputs": (sent("control_image", EDGES),)}, "needs a model with a ControlNet"),
        ("sd", {"options": {"strength": 0.5}}, "image-to-image takes it: send an image"),
        ("sd", {"options": {"strenght": 0.5}}, "mean strength? image-to-image takes it: send an image"),
        ("sd", {"options": {"padding_mask_crop": 8}}, "inpainting takes it: send an image and a mask"),
    ],
)
def test_what_it_cannot_do_is_refused_before_it_takes_the_stage(
    rig: Rig, name: str, params: dict[str, Any], said: str
) -> None:
    request_id = rig.submit(name, **params)
    ended = rig.ended(request_id)
    assert ended.code is ErrorCode.BAD_REQUEST
    assert said in ended.message
    assert len(rig.of(request_id)) == 2, "it ended, and so did its lease; it never started"


def test_a_task_is_cancelled_half_way_and_tried_again_without_memory(rig: Rig, family: Family) -> None:
    image = sent("image", IMAGE)
    expected = plain(family, "sd", AutoPipelineForImage2Image, image=IMAGE)
    request_id = f"r{rig._requests + 1}"
    rig.cancel_at_step(request_id, 2)
    ended = rig.ended(rig.submit("sd", steps=4, inputs=(image,)))
    assert ended.outcome is Outcome.CANCELLED
    assert rig.stage.strays() == []
    failures = iter([MemoryError()])

    def fail_once(*_args: Any) -> None:
        for error in failures:
            raise error

    hook = rig.skeleton("AutoencoderKL").module.decoder.register_forward_hook(fail_once)
    try:
        assert pixels(rig.run("sd", steps=4, inputs=(image,))) == expected, "a generator that starts anew"
    finally:
        hook.remove()
    gc.collect()


def test_progress_counts_the_steps_that_are_run(rig: Rig) -> None:
    result_id = f"r{rig._requests + 1}"
    rig.run("sd", steps=4, inputs=(sent("image", IMAGE),), options={"strength": 0.5})
    assert [p[1:] for p in rig.progress if p[0] == result_id] == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "scheduler_class", "changes"),
    [
        ("DPMSolverMultistepScheduler", DPMSolverMultistepScheduler, {}),
        ("dpm++_2m_karras", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        ("euler_a", EulerAncestralDiscreteScheduler, {}),
        ("LCM", LCMScheduler, {}),
    ],
)
def test_another_scheduler(
    rig: Rig, family: Family, name: str, scheduler_class: Any, changes: dict[str, Any]
) -> None:
    pipeline = family._plain("sd")
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
    generator = torch.Generator("cpu").manual_seed(7)
    expected = pipeline("a red circle", generator=generator, num_inference_steps=4).images
    own = pixels(rig.run("sd", steps=4))
    assert pixels(rig.run("sd", steps=4, scheduler=name)) == [expected[0].tobytes()] != own
    assert pixels(rig.run("sd", steps=4)) == own, "the next request has the model's own again"


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "Scheduler", "__class__", ""])
def test_a_scheduler_that_does_not_fit(rig: Rig, name: str) -> None:
    ended = rig.fail("sd", scheduler=name)
    assert ended.code is ErrorCode.BAD_REQUEST
    assert "use one of euler, euler_a" in ended.message
