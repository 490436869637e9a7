"""Input images: what is checked before anything is decoded, and what a pipeline is given."""

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
import torch
from diffusers import (
    LTXConditionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from input_kit import Input, file_of, mask, picture, sent
from stage_kit import Family, Rig, pixels
from understudy.wire import InputInfo
from understudy_demo import tiny
from understudyd.core.types import ErrorCode
from understudyd.stage import inputs as inputs_module
from understudyd.stage.calls import CallFacts, read_call
from understudyd.stage.errors import BadRequest, RunCancelled
from understudyd.stage.inputs import MAX_INPUT_PIXELS, check_inputs, decode_inputs

INPAINTING = read_call(StableDiffusionInpaintPipeline)
GUIDED = read_call(StableDiffusionControlNetPipeline)


def decoded(*inputs: Input, call: CallFacts = INPAINTING) -> dict[str, Any]:
    check_inputs(inputs, call, call.image_names, ())
    return decode_inputs(inputs, call, lambda: None)


def refusal(*inputs: Input, call: CallFacts = INPAINTING) -> str:
    with pytest.raises(BadRequest) as caught:
        decoded(*inputs, call=call)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    return str(caught.value)


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_every_format_and_channel_count(image_format: str, mode: str) -> None:
    image = picture(1, (20, 12), mode)
    if image_format == "jpeg" and mode == "RGBA":
        pytest.skip("JPEG has no transparency")
    found = decoded(sent("image", image, image_format))["image"]
    assert (found.mode, found.size) == ("RGB", (20, 12))
    if image_format in ("raw", "png"):
        assert found.tobytes() == image.convert("RGB").tobytes()
    else:
        assert abs(sum(found.tobytes()) - sum(image.convert("RGB").tobytes())) < 20 * 12 * 3 * 40


def test_a_mask_is_grey() -> None:
    found = decoded(sent("image", picture(1)), sent("mask_image", mask().convert("RGB"), "png"))
    assert found["mask_image"].mode == "L"
    assert found["mask_image"].tobytes() == mask().tobytes()


def test_images_of_one_name_are_a_list_in_their_order() -> None:
    pictures = [picture(i) for i in range(3)]
    found = decoded(*(sent("image", each) for each in pictures), call=GUIDED)
    assert [each.tobytes() for each in found["image"]] == [each.tobytes() for each in pictures]
    assert isinstance(decoded(sent("image", pictures[0]), call=GUIDED)["image"], Image.Image)


def test_a_keyword_that_takes_lists_gets_one_however_few() -> None:
    call = read_call(LTXConditionPipeline)
    assert "video" in call.image_names
    found = decoded(sent("video", picture(1)), call=call)["video"]
    assert [each.tobytes() for each in found] == [picture(1).tobytes()]


def test_a_telephone_photograph_with_pictures_behind_it() -> None:
    """Pillow takes such a JPEG for another format."""
    first, buffer = picture(1, (32, 24)), BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[picture(2, (16, 16))], quality=95)
    with Image.open(BytesIO(buffer.getvalue())) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
        expected = opened.convert("RGB").tobytes()
    info = InputInfo(name="image", format="jpeg", width=32, height=24)
    assert decoded((info, buffer.getvalue()))["image"].tobytes() == expected


def test_a_photograph_is_turned_upright() -> None:
    """As diffusers' `load_image` does; the declared size is the one in the file."""
    image = picture(1, (20, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    data = file_of(image, "png", exif=exif)
    found = decoded((InputInfo(name="image", format="png", width=20, height=12), data))["image"]
    assert found.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 33}, "has 3072 bytes, not the 3168 of 33 x 32 x 3"),
        ({"channels": 4}, "has 3072 bytes, not the 4096"),
        ({"channels": 2}, "2 channels; raw images have 1, 3 or 4"),
        ({"width": 0}, "both must be at least 1"),
        ({"height": -32, "width": -32}, "both must be at least 1"),
        ({"width": 1 << 40}, f"{MAX_INPUT_PIXELS} pixels are the most"),
    ],
)
def test_raw_rows_that_are_not_what_was_declared(changes: dict[str, int], said: str) -> None:
    assert said in refusal(sent("image", picture(1), **changes))


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_file_that_is_not_what_was_declared(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    monkeypatch.setattr(Image.Image, "convert", lambda *_args: loads.append("decoded"))
    image = picture(1)
    assert "is a file of 32 x 32, declared as 31 x 32" in refusal(
        sent("image", image, image_format, width=31)
    )
    other = "png" if image_format != "png" else "jpeg"
    data = file_of(image, image_format)
    described = InputInfo(name="image", format=other, width=32, height=32)
    assert f"no readable {other} file" in refusal((described, data))
    assert loads == [], "its sizes and kind were read, not its pixels"


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_half_a_file(image_format: str) -> None:
    info, data = sent("image", picture(1, (64, 64)), image_format)
    assert f"no readable {image_format} file" in refusal((info, data[: len(data) // 2]))
    assert f"no readable {image_format} file" in refusal((info, b""))


@pytest.mark.parametrize("image_format", ["bmp", "gif", "tiff", "eps", "PNG", ""])
def test_no_other_format_is_tried(image_format: str) -> None:
    info = InputInfo(name="image", format=image_format, width=32, height=32)
    assert "use one of raw, png, jpeg, webp" in refusal((info, file_of(picture(1), "bmp")))
    if image_format not in ("PNG", ""):
        disguised = InputInfo(name="image", format="png", width=32, height=32)
        assert "no readable png" in refusal((disguised, file_of(picture(1), image_format)))


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_a_moving_picture(image_format: str) -> None:
    frames = [picture(i) for i in range(3)]
    data = file_of(frames[0], image_format, save_all=True, append_images=frames[1:])
    info = InputInfo(name="image", format=image_format, width=32, height=32)
    assert "has 3 frames" in refusal((info, data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises these pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows


@pytest.mark.parametrize("side", [5000, 12_000, 60_000])
def test_a_bomb(side: int) -> None:
    data = bomb(side, side)
    honest = InputInfo(name="image", format="png", width=side, height=side)
    assert "pixels are the most" in refusal((honest, data))
    lying = InputInfo(name="image", format="png", width=32, height=32)
    assert "input image" in refusal((lying, data))


def test_what_the_pipeline_does_not_take() -> None:
    assert "it takes image, mask_image" in refusal(sent("picture", picture(1)))
    assert "takes no input 'latents'" in refusal(sent("latents", picture(1)))
    assert "takes no input 'prompt'" in refusal(sent("prompt", picture(1)))


# -- on the stage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("family"))
    pipeline = tiny.stable_diffusion(1)
    family.add(
        "restyle", StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    )
    return family


@pytest.fixture
def rig(family: Family) -> Iterator[Rig]:
    rig = Rig(family.store)
    rig.serve("restyle")
    yield rig
    rig.close()


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg", "webp"])
def test_the_image_is_the_one_of_plain_diffusers(rig: Rig, family: Family, image_format: str) -> None:
    info, data = sent("image", picture(1), image_format)
    given = decode_inputs([(info, data)], read_call(StableDiffusionImg2ImgPipeline), lambda: None)["image"]
    generator = torch.Generator("cpu").manual_seed(7)
    plain = family._plain("restyle")("a red circle", image=given, num_inference_steps=4, generator=generator)
    assert pixels(rig.run("restyle", steps=4, inputs=((info, data),))) == [plain.images[0].tobytes()]


def test_cancelled_between_two_images(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is done off the stage, and stops at the next image."""
    decoded_names: list[str] = []
    decode = inputs_module._decode

    def decode_and_cancel(info: InputInfo, data: bytes) -> Image.Image:
        decoded_names.append(info.name)
        rig.stage.cancel_run("r1", ErrorCode.CANCELLED)
        return decode(info, data)

    monkeypatch.setattr(inputs_module, "_decode", decode_and_cancel)
    request_id = rig.submit("restyle", inputs=tuple(sent("image", picture(i)) for i in range(5)))
    assert rig.ended(request_id).code is ErrorCode.CANCELLED
    assert decoded_names == ["image"]
    assert len(rig.of(request_id)) == 2, "it was never on stage"


def test_a_checkpoint_comes_before_each_image() -> None:
    def stop() -> None:
        raise RunCancelled(ErrorCode.CANCELLED)

    with pytest.raises(RunCancelled):
        decode_inputs([sent("image", picture(1))], INPAINTING, stop)
