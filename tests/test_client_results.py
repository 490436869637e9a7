"""What a result can be turned into: files, Pillow images, arrays, clips."""

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image
from safetensors.numpy import load_file

from understudy import AsyncClient, CallerError, Client, Result, TransportError
from understudy.request import RequestFields, compose
from understudy.wire import ImageInfo
from wire_kit import TIMINGS

PICTURE = Image.merge("RGB", [Image.linear_gradient("L").resize((6, 4)), *[Image.new("L", (6, 4), 9)] * 2])
LATENT = numpy.arange(4 * 2 * 3, dtype="float16").reshape(4, 2, 3)


def info(format: str, **fields: Any) -> ImageInfo:
    return ImageInfo(**({"format": format, "width": 6, "height": 4} | fields))


def result(*images: tuple[ImageInfo, bytes]) -> Result:
    return Result(
        id="r",
        model="m",
        seed=1,
        images=[data for _, data in images],
        infos=tuple(info for info, _ in images),
        timings=TIMINGS,
        tier="resident",
        switched=False,
    )


def as_file(format: str, image: Image.Image = PICTURE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, lossless=True)
    return buffer.getvalue()


def latent() -> tuple[ImageInfo, bytes]:
    return info("latent", width=3, height=2, shape=LATENT.shape, dtype="float16"), LATENT.tobytes()


@pytest.mark.parametrize("format", ["png", "webp", "raw"])
def test_lossless_formats_are_the_same_picture(format: str) -> None:
    data = PICTURE.tobytes() if format == "raw" else as_file(format)
    made = result((info(format), data))
    assert made.pil()[0].convert("RGB").tobytes() == PICTURE.tobytes()
    assert (made.numpy()[0] == numpy.asarray(PICTURE)).all()
    made.numpy()[0][0, 0] = 0  # the caller's own copy


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_raw_rows_of_any_channels(channels: int, mode: str) -> None:
    image = PICTURE.convert(mode)
    made = result((info("raw", channels=channels), image.tobytes()))
    assert made.pil()[0].mode == mode and made.pil()[0].tobytes() == image.tobytes()
    assert made.numpy()[0].shape == (4, 6, channels)


def test_a_file_is_opened_as_what_it_was_announced_as() -> None:
    with pytest.raises(OSError):
        result((info("png"), as_file("bmp"))).pil()


def test_latents() -> None:
    made = result(latent(), latent())
    assert [(array == LATENT).all() for array in made.latents()] == [True, True]
    assert made.latents()[0].dtype == LATENT.dtype
    with pytest.raises(CallerError, match="no image"):
        made.pil()
    with pytest.raises(CallerError, match='format="latent"'):
        result((info("png"), as_file("png"))).latents()


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "object"}, {"dtype": "float32"}, {"shape": (4, 2)}, {"shape": (-4, -2, 3)}, {"dtype": ""}],
    ids=str,
)
def test_bytes_that_are_not_what_the_daemon_said(fields: dict[str, Any]) -> None:
    wrong = info("latent", **({"shape": LATENT.shape, "dtype": "float16"} | fields))
    with pytest.raises(TransportError, match="the daemon sent"):
        result((wrong, LATENT.tobytes())).latents()


@pytest.mark.parametrize(
    ("format", "name", "becomes"),
    [
        ("png", "a.png", "a.png"),
        ("png", "a", "a.png"),
        ("jpeg", "a", "a.jpg"),
        ("jpeg", "a.jpeg", "a.jpeg"),
        ("jpeg", "a.JPG", "a.JPG"),
        ("webp", "a.v2", "a.v2.webp"),
        ("mp4", "a", "a.mp4"),
    ],
)
def test_files_are_named_by_their_format(tmp_path: Path, format: str, name: str, becomes: str) -> None:
    assert result((info(format), b"data")).save(tmp_path / name) == [tmp_path / becomes]
    assert (tmp_path / becomes).read_bytes() == b"data"


@pytest.mark.parametrize(
    ("format", "name"), [("jpeg", "a.png"), ("mp4", "a.webp"), ("raw", "a.png"), ("png", "a.safetensors")]
)
def test_another_formats_name_is_refused(tmp_path: Path, format: str, name: str) -> None:
    with pytest.raises(CallerError, match="end it in"):
        result((info(format), b"data")).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_arrays_are_saved_as_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    (path,) = result(latent()).save(tmp_path / "l.safetensors")
    assert (load_file(path)["latent"] == LATENT).all()
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header["latent"]["dtype"] == "F16"
    (path,) = result((info("raw"), PICTURE.tobytes())).save(tmp_path / "rows")
    assert path.name == "rows.safetensors"
    assert (load_file(path)["image"] == numpy.asarray(PICTURE)).all()


def test_many_files_sort_by_their_numbers(tmp_path: Path) -> None:
    made = result(*[(info("png"), bytes([i])) for i in range(12)])
    paths = made.save(tmp_path / "f.png")
    assert [path.name for path in paths][:3] == ["f-00.png", "f-01.png", "f-02.png"]
    assert paths == sorted(paths) and [path.read_bytes()[0] for path in paths] == list(range(12))


def test_clips() -> None:
    frames = [(info("png", clip=clip), bytes([clip, frame])) for clip in (0, 1) for frame in range(3)]
    made = result(*frames)
    assert [clip.images for clip in made.clips] == [[b"\0\0", b"\0\1", b"\0\2"], [b"\1\0", b"\1\1", b"\1\2"]]
    assert all(i.clip == 1 for i in made.clips[1].infos) and made.clips[1].seed == made.seed
    assert len(result((info("mp4", frames=8, fps=4.0), b"x")).clips) == 1


def test_printing_shows_sizes_and_no_bytes() -> None:
    png = info("png"), b"PNG" * 1000
    assert repr(result(png)) == "Result(id='r', model='m', seed=1, 1 image: png 6x4, 2.102 s)"
    assert "3 images: png 6x4 (2 times), latent 3x2," in repr(result(png, png, latent()))


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_help_names_every_field(client: type[Client | AsyncClient]) -> None:
    text = client.generate.__doc__ or ""
    assert not {name for name in RequestFields.__annotations__ if f"`{name}`" not in text}


def test_jpg_is_another_word_for_jpeg() -> None:
    assert compose("m", "x", {"format": "jpg"}, None)[0].format == "jpeg"
