"""Options against a pipeline's own signature: names, types, and what must not get around the limits."""

import inspect
import math
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Optional, Union

import diffusers
import pytest
import torch
from PIL import Image

from stage_kit import Family, Rig, asked, pixels
from understudy_demo import tiny
from understudyd.core.types import ErrorCode
from understudyd.stage.calls import EMPTY, CallFacts, Keyword, read_call
from understudyd.stage.errors import BadRequest
from understudyd.stage.fitting import Misfit, described, fitted
from understudyd.stage.keywords import (
    MAX_FRAMES,
    MAX_STEPS,
    call_arguments,
    frames_per_second,
    option_names,
)

SDXL = read_call(diffusers.StableDiffusionXLPipeline)
INPAINTING = read_call(diffusers.StableDiffusionInpaintPipeline)
WAN = read_call(diffusers.WanPipeline)
DDPM = read_call(diffusers.DDPMPipeline)
DIT = read_call(diffusers.DiTPipeline)


def given(call: CallFacts, **options: Any) -> dict[str, Any]:
    """What the pipeline gets for these options, without what it gets anyway."""
    everything = call_arguments(asked(options=options), call)
    return {name: everything[name] for name in options}


def refusal(call: CallFacts, **params: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        call_arguments(asked(**params), call)
    return str(caught.value)


# -- types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.5, 0.5),
        (bool, True, True),
        (str, "a", "a"),
        (Optional[int], None, None),  # noqa: UP045  as older pipelines spell it
        (int | None, 4, 4),
        (Union[float, list[float]], [1, 0.5], [1.0, 0.5]),  # noqa: UP007
        (float | list[float], 1, 1.0),
        (float | int, 1, 1),
        (list[int], [1, 2], [1, 2]),
        (typing.List[float], [1, 2], [1.0, 2.0]),  # noqa: UP006
        (tuple[int, int], [1, 2], (1, 2)),
        (typing.Tuple[int, int], [1, 2], (1, 2)),  # noqa: UP006
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (tuple[int], [9, 18, 27], (9, 18, 27)),
        (list[list[int]], [[1], [2, 3]], [[1], [2, 3]]),
        (Sequence[int], [1], [1]),
        (Iterable[int], [1], [1]),
        (list, [1, "a"], [1, "a"]),
        (Literal["first", "last"], "last", "last"),
        (torch.Tensor | list[int] | int | None, 3, 3),
        (Any, "a", "a"),
        (EMPTY, 3, 3),
    ],
)
def test_what_fits(kind: Any, value: Any, expected: Any) -> None:
    found = fitted(value, Keyword("name", kind, EMPTY))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 1.0),
        (int, "1"),
        (float, False),
        (float, "1"),
        (float, math.nan),
        (float, math.inf),
        (Any, -math.inf),
        (list[float], [1.0, math.nan]),
        (bool, 1),
        (bool, 0.0),
        (str, 1),
        (str, ["a"]),
        (int, None),
        (int | None, "a"),
        (list[int], 1),
        (list[int], [1, 2.5]),
        (list[int], [[1]]),
        (list[int], [None]),
        (float | list[float], [[1.0]]),
        (tuple[int, int], [1]),
        (tuple[int, int], [1, 2, 3]),
        (Literal["first", "last"], "middle"),
        (Literal[1], True),
        (torch.Tensor | None, [1, 2]),
        (dict[str, Any], "a"),
        (Image.Image, "a.png"),
    ],
)
def test_what_does_not_fit(kind: Any, value: Any) -> None:
    with pytest.raises(Misfit):
        fitted(value, Keyword("name", kind, EMPTY))


def test_without_an_annotation_the_default_tells() -> None:
    assert fitted(2, Keyword("scale", EMPTY, 1.0)) == 2.0
    assert fitted(None, Keyword("scale", float, None)) is None
    with pytest.raises(Misfit):
        fitted("2", Keyword("scale", EMPTY, 1.0))
    with pytest.raises(Misfit):
        fitted(1, Keyword("flag", EMPTY, False))


def test_types_in_words() -> None:
    assert described(float | list[float] | None) == "a number or a list, each a number"
    assert described(Literal["a", "b"]) == "one of 'a', 'b'"
    assert described(torch.Tensor | None) == ""


# -- names ------------------------------------------------------------------------------------------


def test_options_go_under_their_names() -> None:
    found = given(SDXL, guidance_rescale=1, clip_skip=2, original_size=[64, 32], prompt_2="blue")
    assert found == {
        "guidance_rescale": 1.0,
        "clip_skip": 2,
        "original_size": (64, 32),
        "prompt_2": "blue",
    }
    assert isinstance(found["guidance_rescale"], float)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("prompt", "prompt"),
        ("negative_prompt", "negative_prompt"),
        ("height", "height"),
        ("width", "width"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance"),
        ("num_images_per_prompt", "images"),
        ("batch_size", "images"),
        ("generator", "seed"),
        ("output_type", "format"),
    ],
)
def test_what_has_a_field_of_its_own(name: str, field: str) -> None:
    assert f"use the request's {field}" in refusal(SDXL, options={name: 1})


@pytest.mark.parametrize(
    "name",
    [
        "latents",
        "prompt_embeds",
        "negative_pooled_prompt_embeds",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "cross_attention_kwargs",
        "ip_adapter_image_embeds",
    ],
)
def test_what_only_makes_sense_inside_a_process(name: str) -> None:
    assert name in SDXL.keywords
    assert "cannot be set by a request" in refusal(SDXL, options={name: True})


def test_images_are_inputs() -> None:
    assert "send it with the request's inputs" in refusal(INPAINTING, options={"mask_image": "a.png"})


def test_unknown_names_get_a_hint() -> None:
    assert "did you mean guidance_rescale?" in refusal(SDXL, options={"guidance_rescal": 1})
    assert "it takes clip_skip, " in refusal(SDXL, options={"zzz": 1})
    assert "takes no option 'self'" in refusal(SDXL, options={"self": 1})
    assert "takes no option 'kwargs'" in refusal(SDXL, options={"kwargs": 1})


def test_the_message_says_what_is_wanted() -> None:
    message = refusal(SDXL, options={"original_size": "big"})
    assert message == (
        "option original_size of StableDiffusionXLPipeline must be a list, each a whole number, not 'big'"
    )


def test_missing_fields_and_options_are_named() -> None:
    assert "takes no prompt" in refusal(DDPM, prompt="a cat")
    assert "takes no guidance" in refusal(DDPM, prompt="", guidance=2.0)
    assert "takes no option 'eta'" in refusal(DDPM, prompt="", options={"eta": 0.5})
    assert "needs class_labels; set it in the request's options" in refusal(DIT, prompt="")


# -- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "options", "said"),
    [
        (WAN, {"num_frames": MAX_FRAMES + 1}, f"{MAX_FRAMES} is the most"),
        (WAN, {"max_sequence_length": 1 << 20}, "4096 is the most"),
        (SDXL, {"timesteps": [1] * (MAX_STEPS + 1)}, f"{MAX_STEPS} are allowed"),
        (SDXL, {"sigmas": [1.0] * (MAX_STEPS + 1)}, f"{MAX_STEPS} are allowed"),
        (SDXL, {"prompt_2": ["a", "b"]}, "must be text"),
        (SDXL, {"clip_skip": -(2**40)}, "is the most"),
        (
            read_call(diffusers.KandinskyV22CombinedPipeline),
            {"prior_num_inference_steps": MAX_STEPS + 1},
            f"{MAX_STEPS} is the most",
        ),
        (DIT, {"class_labels": [1, 2, 3]}, "has 3 items for 1 images"),
    ],
)
def test_options_do_not_get_around_the_limits(call: CallFacts, options: dict[str, Any], said: str) -> None:
    prompt = "a" if "prompt" in call.keywords else ""
    assert said in refusal(call, options=options, prompt=prompt)


def test_within_the_limits() -> None:
    assert given(WAN, num_frames=MAX_FRAMES) == {"num_frames": MAX_FRAMES}
    found = call_arguments(asked(prompt="", images=2, options={"class_labels": [1, 2]}), DIT)
    assert found["class_labels"] == [1, 2]


def test_every_batch_keyword_is_the_field_images() -> None:
    names = {"num_images_per_prompt": SDXL, "num_videos_per_prompt": WAN, "batch_size": DDPM}
    for name, call in names.items():
        assert call_arguments(asked(images=3, prompt=""), call)[name] == 3
    assert "makes one image at a time" in refusal(
        read_call(diffusers.StableDiffusionLatentUpscalePipeline), images=2, guidance=None
    )


def test_each_call_has_a_generator_of_its_own() -> None:
    first, second = (call_arguments(asked(), SDXL)["generator"] for _ in range(2))
    assert first is not second
    assert torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=second))


# -- output types -----------------------------------------------------------------------------------


def test_which_output_type_is_asked_for() -> None:
    def asked_for(call: CallFacts, **params: Any) -> Any:
        return call_arguments(asked(prompt="", **params), call)["output_type"]

    assert asked_for(SDXL) == "pt"
    assert asked_for(WAN) == "pt"
    assert asked_for(DDPM) == "pil", "it converts by hand"
    assert asked_for(SDXL, format="latent") == "latent"
    assert asked_for(INPAINTING) == "pt"
    assert asked_for(INPAINTING, options={"padding_mask_crop": 8}) == "pil", "the crop is pasted in PIL"
    assert "gives no latents" in refusal(DDPM, prompt="", format="latent")
    assert "makes no video" in refusal(SDXL, format="mp4")


@pytest.mark.parametrize(
    ("call", "options", "expected"),
    [
        (WAN, {}, 8.0),
        (WAN, {"fps": 12}, 12.0),
        (WAN, {"frame_rate": 12.5}, 12.5),
        (read_call(diffusers.LTXPipeline), {}, 25.0),
        (read_call(diffusers.LTXPipeline), {"frame_rate": 30}, 30.0),
    ],
)
def test_frames_per_second(call: CallFacts, options: dict[str, Any], expected: float) -> None:
    assert frames_per_second(asked(options=options), call) == expected


@pytest.mark.parametrize("rate", [0, -1, 1000, "fast", True, math.nan])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(BadRequest, match="must be more than 0"):
        frames_per_second(asked(options={"fps": rate}), WAN)


# -- all of diffusers -------------------------------------------------------------------------------


def test_every_pipeline_can_be_read() -> None:
    """Nobody's signature surprises us: no option takes a tensor, a picture, a callback or a field's place."""
    for name in ("AnimateDiff", "AuraFlow", "CogVideoX", "Flux", "HunyuanDiT", "Kandinsky", "Kandinsky3",
                 "LTXCondition", "Lumina2", "PixArtAlpha", "QwenImage", "Sana", "StableCascadeDecoder",
                 "StableDiffusion3", "StableVideoDiffusion", "LTXI2VLongMultiPrompt"):  # fmt: skip
        pipeline_class = getattr(diffusers, f"{name}Pipeline")
        call = read_call(pipeline_class)
        written = set(inspect.signature(pipeline_class.__call__).parameters) - {"self", "kwargs"}
        assert set(call.keywords) == written
        options = set(option_names(call))
        assert options <= written - set(call.image_names)
        assert not options & {
            "prompt",
            "height",
            "width",
            "generator",
            "output_type",
            "return_dict",
            "latents",
        }
        assert not any("callback" in option for option in options)


# -- on the stage -----------------------------------------------------------------------------------


def test_options_on_the_stage_equal_plain_keywords(tmp_path_factory: pytest.TempPathFactory) -> None:
    family = Family(tmp_path_factory.mktemp("family"))
    family.add("xl", tiny.stable_diffusion_xl(1))
    rig = Rig(family.store)
    options = {"guidance_rescale": 0.7, "crops_coords_top_left": (8, 8), "prompt_2": "blue"}
    try:
        rig.serve("xl")
        generator = torch.Generator("cpu").manual_seed(7)
        plain = family._plain("xl")(
            "a red circle", num_inference_steps=2, generator=generator, **options
        ).images
        found = pixels(rig.run("xl", options=options | {"crops_coords_top_left": [8, 8]}))
        assert found == [plain[0].tobytes()] != pixels(rig.run("xl"))
        ended = rig.fail("xl", options={"guidance_rescale": "much"})
        assert ended.code is ErrorCode.BAD_REQUEST
        assert "must be a number" in ended.message
        ended = rig.fail("xl", steps=None, options={"timesteps": [900, 500, 100]}, scheduler="deis")
        assert ended.code is ErrorCode.BAD_REQUEST, "what the pipeline itself refuses is the caller's, too"
    finally:
        rig.close()
