"""What the checkers say of the pictures that a daemon sent."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from understudy_demo.checker import check
from understudy_demo.members import Member
from understudy_demo.style_checker import style_of
from understudy_demo.wishes import parse
from understudy_demo.workload import Request


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of `images`, how many show all that was asked for, and how many are in a style of the asked model."""

    images: int
    shown: int
    in_style: int


def verdict(members: Sequence[Member], requests: Sequence[Request], images: Mapping[int, bytes]) -> Verdict:
    """Judge the PNGs, by the index of their requests. A mixture of styles may pass as any of its parts."""
    styles = {member.name: member.styles for member in members}
    shown = in_style = 0
    for request in requests:
        if request.index in images:
            picture = _pixels(images[request.index])
            wish, allowed = parse(request.prompt), styles[request.model]
            shown += any(not check(picture, wish, style) for style in allowed)
            in_style += style_of(picture) in allowed
    return Verdict(sum(request.index in images for request in requests), shown, in_style)


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"), np.float32)
