"""Input images: what a file's header says, and what callers may give."""

import io
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
from hypothesis import given, settings
from PIL import Image

from understudy import CallerError
from understudy.image_header import HeaderError, ImageHeader, read_header
from understudy.inputs import inputs_from
from understudy.request import compose, parts_of
from understudy.wire import InputInfo


def picture(mode: str = "RGB", size: tuple[int, int] = (5, 3)) -> Image.Image:
    """A gradient, so that rows and columns cannot be mixed up unseen."""
    width, height = size
    grey = Image.frombytes(
        "L", size, bytes((x * 40 + y * 7) % 256 for y in range(height) for x in range(width))
    )
    image = Image.merge("RGB", [grey, grey.point(lambda v: 255 - v), grey]).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(100)
    return image


def as_file(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


FILES = [
    ("PNG", "1", {}, 1),
    ("PNG", "L", {}, 1),
    ("PNG", "LA", {}, 4),
    ("PNG", "P", {}, 3),
    ("PNG", "RGB", {}, 3),
    ("PNG", "RGBA", {}, 4),
    ("JPEG", "L", {}, 1),
    ("JPEG", "RGB", {}, 3),
    ("JPEG", "RGB", {"progressive": True}, 3),
    ("JPEG", "RGB", {"comment": b"c" * 3000, "exif": b"Exif\0\0" + b"e" * 3000}, 3),
    ("JPEG", "CMYK", {}, 3),
    ("WEBP", "RGB", {}, 3),
    ("WEBP", "RGB", {"lossless": True}, 3),
    ("WEBP", "RGBA", {"lossless": True}, 4),
    ("WEBP", "RGBA", {}, 4),
    ("WEBP", "RGB", {"exif": b"Exif\0\0" + b"e" * 30}, 3),
]


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (300, 17)])
@pytest.mark.parametrize(("kind", "mode", "how", "channels"), FILES)
def test_the_header_of_what_pillow_writes(
    kind: str, mode: str, how: dict[str, Any], channels: int, size: tuple[int, int]
) -> None:
    data = as_file(picture(mode, size), kind, **how)
    assert read_header(data) == ImageHeader(kind.lower(), *size, channels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_off_anywhere_is_no_crash(kind: str) -> None:
    data = as_file(picture(), kind)
    whole = read_header(data)
    for end in range(len(data)):
        try:
            assert read_header(data[:end]) == whole
        except HeaderError as error:
            assert str(error)


def test_what_is_no_image_to_send() -> None:
    animation = as_file(picture(), "WEBP", save_all=True, append_images=[picture("L").convert("RGB")])
    jpeg = as_file(picture(), "JPEG")
    for data, says in (
        (b"", "no PNG, JPEG or WebP"),
        (as_file(picture(), "GIF"), "no PNG, JPEG or WebP"),
        (animation, "animation"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIB", 13, b"IHDR", 0, 4, 8) + b"\x02" + bytes(12), "0x4"),
        (
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIB", 13, b"IHDR", 4, 4, 8) + b"\x05" + bytes(12),
            "colour type",
        ),
        (b"RIFF\0\0\0\0WEBPXXXX" + bytes(40), "no image chunk"),
        (jpeg[:2] + b"\xff\xe0\x00\x02" * 100_000 + jpeg[2:], "no frame header"),  # found in no time
        (b"\xff\xd8" + b"\xff" * 1_000_000, "no frame header"),
    ):
        with pytest.raises(HeaderError, match=says):
            read_header(data)


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFFxxxxWEBPVP8X"]
    ),
    rest=st.binary(max_size=60),
)
def test_hostile_bytes_give_a_header_or_a_typed_error(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except HeaderError:
        return
    assert header.width >= 1 and header.height >= 1 and header.channels in (1, 3, 4)


# -- what callers give ---------------------------------------------------------------------------------------


def raw(channels: int, name: str = "image") -> InputInfo:
    return InputInfo(name=name, format="raw", width=5, height=3, channels=channels)


def test_bytes_and_paths_travel_as_they_are(tmp_path: Path) -> None:
    data = as_file(picture(), "WEBP")
    path = tmp_path / "any-name.xyz"
    path.write_bytes(data)
    for image in (data, bytearray(data), path, str(path)):
        inputs = inputs_from({"image": image})
        assert inputs.infos == (InputInfo(name="image", format="webp", width=5, height=3, channels=3),)
        assert inputs.payload == (data,)


@pytest.mark.parametrize(
    ("mode", "becomes", "channels"),
    [
        ("RGB", "RGB", 3),
        ("L", "L", 1),
        ("RGBA", "RGBA", 4),
        ("1", "L", 1),
        ("P", "RGB", 3),
        ("LA", "RGBA", 4),
    ],
)
def test_pillow_images_travel_as_rows(mode: str, becomes: str, channels: int) -> None:
    image = picture(mode)
    inputs = inputs_from({"image": image})
    assert inputs.infos == (raw(channels),)
    assert inputs.payload == (image.convert(becomes).tobytes(),)


def test_arrays_travel_as_rows() -> None:
    image = picture()
    array = numpy.asarray(image)
    for given_array, channels, expected in (
        (array, 3, image.tobytes()),
        (numpy.asfortranarray(array), 3, image.tobytes()),
        (array[:, :, 0], 1, array[:, :, 0].tobytes()),
        (array[:, :, :1], 1, array[:, :, :1].tobytes()),
        (array[:, :, 0] > 100, 1, ((array[:, :, 0] > 100) * 255).astype("uint8").tobytes()),
    ):
        inputs = inputs_from({"image": given_array})
        assert inputs.infos == (raw(channels),) and inputs.payload == (expected,)


def test_lists_keep_their_order() -> None:
    images = [picture(), picture("L"), picture("RGBA")]
    inputs = inputs_from({"image": images, "mask_image": picture("1")})
    assert [(info.name, info.channels) for info in inputs.infos] == [
        ("image", 3), ("image", 1), ("image", 4), ("mask_image", 1),
    ]  # fmt: skip
    assert inputs.payload[1] == picture("L").tobytes()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"no image", "give a PNG, JPEG or WebP file"),
        ("/no/such/file.png", "cannot read /no/such/file.png: No such file"),
        (picture("F"), "convert it to L, RGB or RGBA"),
        (numpy.zeros((3, 5, 3), "float32"), "astype"),
        (numpy.zeros((3, 5, 2), "uint8"), r"\[3, 5, 2\]"),
        (numpy.zeros((2, 3, 5, 3), "uint8"), "several are a list"),
        (numpy.zeros(64 * 2**20 + 1, "uint8").reshape(-1, 1), "limit is"),
        (5, "type int"),
        ([picture()] * 17, "16 at most"),
    ],
    ids=["bytes", "path", "mode", "float", "channels", "batch", "size", "int", "count"],
)
def test_what_is_no_input(image: Any, says: str) -> None:
    with pytest.raises(CallerError, match=says):
        inputs_from({"image": image})


# -- composing -----------------------------------------------------------------------------------------------


def test_shorthands_name_the_pipelines_arguments() -> None:
    fields = {"image": picture(), "mask": picture("L"), "control_image": picture(), "size": (64, 32)}
    message, payload = compose("m", "p", fields | {"inputs": {"ip_adapter_image": picture()}}, 9.0)
    names = [info.name for info in message.inputs]
    assert sorted(names) == ["control_image", "image", "ip_adapter_image", "mask_image"]
    assert payload[names.index("mask_image")] == picture("L").tobytes()
    assert (message.width, message.height, message.deadline_s) == (64, 32, 9.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stpes": 3}, "did you mean 'steps'"),
        ({"eta": 0.5}, "options="),
        ({"size": 64}, "pair"),
        ({"size": (64, 64), "width": 64}, "one of them"),
        ({"image": picture(), "inputs": {"image": picture()}}, "twice"),
        ({"options": [1]}, "dict"),
        ({"inputs": picture()}, "dict"),
    ],
    ids=["typo", "option", "size", "size twice", "image twice", "options", "inputs"],
)
def test_fields_that_cannot_be_meant(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(CallerError, match=says):
        compose("m", "p", fields, None)


def test_forms_of_a_request() -> None:
    assert parts_of(("m", "p")) == ("m", "p", {})
    assert parts_of({"model": "m", "seed": 1}) == ("m", "", {"seed": 1})
    for wrong in ({"prompt": "p"}, "m", ("m",), ("m", "p", "q"), 5):
        with pytest.raises(CallerError, match="model"):
            parts_of(wrong)  # type: ignore[arg-type]
