"""What comes out: images, frames, latents and videos, as plain diffusers makes them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    MotionAdapter,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image

from input_kit import file_of, picture
from stage_kit import Family, Rig, pixels
from understudy_demo import tiny
from understudyd.core.events import EncodingFailed, ImagesEncoded
from understudyd.core.types import ErrorCode
from understudyd.stage.encode import encode_images
from understudyd.stage.errors import StageError
from understudyd.stage.pictures import Made, clips, find_made
from understudyd.stage.run import RunResult
from understudyd.stage.video import encode_mp4

FRAMES = 4


def unconditional_unet(channels: int) -> UNet2DModel:
    torch.manual_seed(channels)
    return UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    )


def animated(seed: int) -> AnimateDiffPipeline:
    base = tiny.stable_diffusion(seed)
    adapter = MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        motion_adapter=adapter,
        scheduler=base.scheduler,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("family"))
    family.add("sd", tiny.stable_diffusion(1))
    family.add("noise", DDPMPipeline(unet=unconditional_unet(3), scheduler=DDPMScheduler()))
    family.add("grey", DDIMPipeline(unet=unconditional_unet(1), scheduler=DDIMScheduler()))
    family.add("video", animated(2))
    return family


@pytest.fixture(scope="module")
def rig(family: Family) -> Iterator[Rig]:
    rig = Rig(family.store)
    rig.serve("sd", "noise", "grey", "video")
    yield rig
    rig.close()


def plain(family: Family, name: str, **call: Any) -> Any:
    generator = torch.Generator("cpu").manual_seed(7)
    return family._plain(name)(num_inference_steps=2, generator=generator, **call)


# -- images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels"), [("noise", 3), ("grey", 1)])
def test_pipelines_without_a_prompt(rig: Rig, family: Family, name: str, channels: int) -> None:
    result = rig.run(name, prompt="", images=2)
    expected = plain(family, name, batch_size=2).images
    assert pixels(result) == [image.tobytes() for image in expected]
    assert [info.channels for info in result.infos] == [channels] * 2
    raw = rig.run(name, prompt="", images=2, format="raw")
    assert list(raw.images) == pixels(result)
    ended = rig.fail(name, prompt="a cat")
    assert (ended.code, ended.message.endswith("takes no prompt; leave it out")) == (
        ErrorCode.BAD_REQUEST,
        True,
    )


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_formats_that_lose_a_little(rig: Rig, family: Family, image_format: str) -> None:
    fine, coarse = (rig.run("sd", format=image_format, quality=q) for q in (95, 5))
    assert len(coarse.images[0]) < len(fine.images[0])
    exact = Image.frombytes("RGB", (32, 32), family.plain_images("sd")[0])
    assert fine.images[0] == file_of(exact, image_format, quality=95)
    assert fine.infos[0].format == image_format
    assert rig.run("sd", format=image_format).images == rig.run("sd", format=image_format, quality=90).images


# -- latents ----------------------------------------------------------------------------------------


def arrays(result: RunResult) -> list[Any]:
    return [
        np.frombuffer(data, dtype=info.dtype).reshape(info.shape)
        for data, info in zip(result.images, result.infos)
    ]


def test_latents(rig: Rig, family: Family) -> None:
    result = rig.run("sd", images=2, format="latent")
    expected = plain(
        family, "sd", prompt="a red circle", num_images_per_prompt=2, output_type="latent"
    ).images
    assert [info.shape for info in result.infos] == [(4, 16, 16)] * 2
    assert (result.infos[0].dtype, result.infos[0].width, result.infos[0].height) == ("float32", 16, 16)
    assert all(np.array_equal(found, each) for found, each in zip(arrays(result), expected.numpy()))


def test_latents_of_a_video(rig: Rig, family: Family) -> None:
    result = rig.run("video", format="latent", options={"num_frames": FRAMES})
    expected = plain(family, "video", prompt="a red circle", num_frames=FRAMES, output_type="latent").frames
    (found,) = arrays(result)
    assert np.array_equal(found, expected[0].numpy())


def test_bfloat16_latents_travel_as_float32() -> None:
    value = torch.tensor([[[[1.5, -2.0]]]], dtype=torch.bfloat16).expand(2, 3, 4, 2)
    payload, infos = encode_images(Made(value, is_video=False), "latent")
    assert [(info.dtype, info.shape) for info in infos] == [("float32", (3, 4, 2))] * 2
    assert payload[0] == value[0].float().numpy().tobytes()


def test_latents_are_refused_where_there_are_none(rig: Rig) -> None:
    ended = rig.fail("noise", prompt="", format="latent")
    assert ended.code is ErrorCode.BAD_REQUEST
    assert "gives no latents" in ended.message


# -- videos -----------------------------------------------------------------------------------------


def test_frames_are_images(rig: Rig, family: Family) -> None:
    result = rig.run("video", options={"num_frames": FRAMES})
    (expected,) = plain(family, "video", prompt="a red circle", num_frames=FRAMES).frames
    assert pixels(result) == [frame.tobytes() for frame in expected]
    assert [info.clip for info in result.infos] == [0] * FRAMES
    assert rig.stage.strays() == []


STAND_IN = """#!{python}
import sys
rows = sys.stdin.buffer.read()
if {fails}:
    sys.exit("no such encoder")
with open(sys.argv[-1], "wb") as file:
    file.write("|".join(sys.argv[1:-1]).encode() + b"#" + rows)
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    """An ffmpeg that writes down its arguments and what it was given."""
    path = folder / "ffmpeg"
    path.write_text(STAND_IN.format(python=sys.executable, fails=fails))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_mp4_by_ffmpeg(rig: Rig, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = pixels(rig.run("video", options={"num_frames": FRAMES}))
    stand_in(tmp_path, monkeypatch)
    result = rig.run("video", format="mp4", options={"num_frames": FRAMES, "fps": 12})
    (info,), (data,) = result.infos, result.images
    assert (info.format, info.frames, info.fps) == ("mp4", FRAMES, 12.0)
    assert (info.width, info.height, info.clip) == (32, 32, 0)
    arguments, _, rows = data.partition(b"#")
    assert rows == b"".join(frames)
    assert b"-f|rawvideo|-pix_fmt|rgb24|-s|32x32|-r|12|-i|pipe:0" in arguments


def test_an_ffmpeg_that_fails(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, fails=True)
    request_id = rig.submit("video", format="mp4", options={"num_frames": 2})
    rig.wait_until(lambda: any(isinstance(event, EncodingFailed) for event in rig.of(request_id)))
    failed = next(event for event in rig.of(request_id) if isinstance(event, EncodingFailed))
    assert "ffmpeg failed with 1: no such encoder" in failed.message
    assert not any(isinstance(event, ImagesEncoded) for event in rig.of(request_id))


def test_without_ffmpeg(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    request_id = rig.submit("video", format="mp4")
    ended = rig.ended(request_id)
    assert ended.code is ErrorCode.BAD_REQUEST
    assert "install ffmpeg" in ended.message and "png" in ended.message
    assert len(rig.of(request_id)) == 2, "refused before it took the stage"


def test_mp4_of_a_pipeline_that_makes_none(rig: Rig) -> None:
    ended = rig.fail("sd", format="mp4")
    assert ended.code is ErrorCode.BAD_REQUEST
    assert "makes no video" in ended.message


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="this machine has no ffmpeg")
def test_a_real_mp4(tmp_path: Path) -> None:
    data = encode_mp4([picture(i, (31, 33)) for i in range(5)], 10.0)
    assert data[4:8] == b"ftyp"
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    rows = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(rows) == 5 * 32 * 34 * 3, "five frames, padded to even sizes"


# -- whatever pipelines give ------------------------------------------------------------------------

VIDEO = torch.rand(2, 3, 3, 8, 6, generator=torch.Generator().manual_seed(1))  # clip, frame, channel, rows
PICTURES = [
    [image.tobytes() for image in clip]
    for clip in VideoProcessor().postprocess_video(VIDEO.permute(0, 2, 1, 3, 4) * 2 - 1, output_type="pil")
]


def as_array(value: torch.Tensor) -> Any:
    return value.movedim(-3, -1).numpy()


@pytest.mark.parametrize(
    "value",
    [
        VIDEO,
        as_array(VIDEO),
        list(VIDEO),
        [as_array(clip) for clip in VIDEO],
        [list(clip) for clip in VIDEO],
        [clips(Made(clip, is_video=True))[0] for clip in VIDEO],
    ],
    ids=["tensor", "array", "list of tensors", "list of arrays", "list of lists", "list of lists of PIL"],
)
def test_every_shape_of_videos(value: Any) -> None:
    assert [[image.tobytes() for image in clip] for clip in clips(Made(value, is_video=True))] == PICTURES


@pytest.mark.parametrize(
    "value",
    [VIDEO[0], as_array(VIDEO[0]), list(VIDEO[0]), [as_array(frame) for frame in VIDEO[0]],
     (as_array(VIDEO[0]) * 255).round().astype(np.uint8)],
)  # fmt: skip
def test_every_shape_of_images(value: Any) -> None:
    (images,) = clips(Made(value, is_video=False))
    assert [image.tobytes() for image in images] == PICTURES[0]


def test_clips_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    _, infos = encode_images(Made(VIDEO, is_video=True), "png")
    assert [info.clip for info in infos] == [0, 0, 0, 1, 1, 1]
    payload, infos = encode_images(Made(VIDEO, is_video=True, fps=24.0), "mp4")
    assert [(info.clip, info.frames, info.fps) for info in infos] == [(0, 3, 24.0), (1, 3, 24.0)]
    assert [data.partition(b"#")[2] for data in payload] == [b"".join(clip) for clip in PICTURES]


def test_odd_modes() -> None:
    assert clips(Made(picture(1), is_video=False))[0][0].tobytes() == picture(1).tobytes()
    clear = picture(1, mode="RGBA")
    payload, infos = encode_images(Made([clear], is_video=False), "raw")
    assert (payload[0], infos[0].channels) == (clear.tobytes(), 4)
    (data,), _ = encode_images(Made([clear], is_video=False), "jpeg")
    assert Image.open(BytesIO(data)).mode == "RGB"
    assert clips(Made([picture(1, mode="CMYK")], is_video=False))[0][0].mode == "RGB"


@pytest.mark.parametrize("value", [torch.zeros(2, 3), "a picture", [1, 2], None, {"a": 1}])
def test_what_is_no_picture(value: Any) -> None:
    with pytest.raises(StageError):
        clips(find_made(ImagePipelineOutput(images=value)))


def test_every_tensor_comes_to_the_host() -> None:
    seen: list[Any] = []
    made = Made([VIDEO[0], [VIDEO[1]], picture(1)], is_video=True)
    made.on_host(lambda tensor: seen.append(tensor) or tensor)
    assert [each.shape for each in seen] == [VIDEO[0].shape, VIDEO[1].shape]
