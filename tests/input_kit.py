"""Shared by the tests of tasks and inputs: pictures, and how they travel with a request."""

import random
from io import BytesIO
from typing import Any

from PIL import Image

from understudy.wire import InputInfo

Input = tuple[InputInfo, bytes]


def picture(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    """Noise of this mode, the same for every call."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(seed).randbytes(size[0] * size[1] * bands))


def mask(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """The left half."""
    found = Image.new("L", size)
    found.paste(255, (0, 0, size[0] // 2, size[1]))
    return found


def file_of(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def sent(name: str, image: Image.Image, image_format: str = "raw", **changes: Any) -> Input:
    """One image as a request carries it."""
    data = image.tobytes() if image_format == "raw" else file_of(image, image_format)
    described = {"width": image.width, "height": image.height, "channels": len(image.getbands())} | changes
    return InputInfo(name=name, format=image_format, **described), data
