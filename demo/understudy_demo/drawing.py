"""Draws wishes: the pictures that the demo's models learn from and that its checker is measured on.

Shapes are signed distance fields (negative inside, in pixels; the standard technique, see Inigo Quilez,
"2D distance functions"), so that edges are smooth and styles can follow a shape's outline.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from understudy_demo.wishes import COLOURS, Wish

Pixels = NDArray[np.float32]
"""Heights x widths x 3, 0 to 255; or heights x widths."""

SIDE = 64
MARGIN = 5
RADII = {"small": 8.2, "medium": 11.0, "big": 19.0}
RGB = {
    "red": (212, 44, 40),
    "orange": (242, 138, 24),
    "yellow": (250, 218, 62),
    "green": (42, 150, 74),
    "blue": (48, 112, 222),
    "purple": (124, 40, 152),
    "white": (246, 246, 244),
    "black": (26, 26, 30),
}
_TEXTURE_CONTRAST = 20.0
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5


@dataclass(frozen=True, slots=True)
class Scene:
    """A wish with nothing left open. `centres` are (x, y) in pixels, `radius` is half a shape's width."""

    wish: Wish
    background: str
    centres: tuple[tuple[float, float], ...]
    radius: float


@dataclass(frozen=True, slots=True)
class Layers:
    """A scene as styles see it: `distance` to the nearest shape, its colour, the textured background."""

    distance: Pixels
    colour: Pixels
    background: Pixels


def compose(wish: Wish, rng: random.Random) -> Scene:
    """Decide what the wish leaves open: background colour, places, a little of the size."""
    background = wish.background or rng.choice([c for c in COLOURS if c != wish.colour])
    radius = RADII[wish.size] * rng.uniform(0.94, 1.06)
    return Scene(wish, background, _centres(wish, radius, rng), radius)


def _centres(wish: Wish, radius: float, rng: random.Random) -> tuple[tuple[float, float], ...]:
    low, high = MARGIN + radius, SIDE - MARGIN - radius
    if wish.place is not None:
        return (_placed(wish.place, low, high, rng),)
    while True:
        points: list[tuple[float, float]] = []
        for _ in range(40):
            point = (rng.uniform(low, high), rng.uniform(low, high))
            if all(max(abs(point[0] - x), abs(point[1] - y)) > 2 * radius + 3 for x, y in points):
                points.append(point)
            if len(points) == wish.count:
                return tuple(points)


def _placed(place: str, low: float, high: float, rng: random.Random) -> tuple[float, float]:
    middle = SIDE / 2
    near = low + rng.uniform(0, 0.25) * (middle - low)
    far = high - rng.uniform(0, 0.25) * (high - middle)
    across = middle + rng.uniform(-3, 3)
    match place:
        case "left":
            return near, across
        case "right":
            return far, across
        case "top":
            return across, near
        case _:
            return across, far


def layers(scene: Scene) -> Layers:
    """The scene's parts, without a style."""
    return Layers(
        distance=distance(scene),
        colour=np.array(RGB[scene.wish.colour], np.float32),
        background=_ground(RGB[scene.background], scene.wish.texture),
    )


def distance(scene: Scene) -> Pixels:
    """Signed distance in pixels from each pixel's centre to the nearest shape; negative inside."""
    fields = []
    for x, y in scene.centres:
        field = _UNIT_SHAPES[scene.wish.shape]((_X - x) / scene.radius, (_Y - y) / scene.radius)
        fields.append(field * scene.radius)
    nearest: Pixels = np.min(fields, axis=0)
    return nearest


def shifted(scene: Scene, dx: float, dy: float) -> Scene:
    """The same scene, moved."""
    return replace(scene, centres=tuple((x + dx, y + dy) for x, y in scene.centres))


def _ground(rgb: tuple[int, int, int], texture: str) -> Pixels:
    plain = np.broadcast_to(np.array(rgb, np.float32), (SIDE, SIDE, 3))
    if texture == "plain":
        return plain.copy()
    sign = texture_signs(texture)
    middle = np.clip(plain, 30 + _TEXTURE_CONTRAST, 255 - _TEXTURE_CONTRAST)
    textured: Pixels = (middle + _TEXTURE_CONTRAST * sign[..., None]).astype(np.float32)
    return textured


def texture_signs(texture: str) -> Pixels:
    """Where a texture lightens (1) and darkens (-1) its background."""
    is_light = (_X + _Y) % 12 < 6 if texture == "striped" else np.hypot(_X % 8 - 4, _Y % 8 - 4) < 2.3
    return np.where(is_light, 1.0, -1.0).astype(np.float32)


def _circle(x: Pixels, y: Pixels) -> Pixels:
    return np.hypot(x, y) - 1


def _square(x: Pixels, y: Pixels) -> Pixels:
    return np.maximum(np.abs(x), np.abs(y)) - 0.92


def _triangle(x: Pixels, y: Pixels) -> Pixels:
    slope = np.array((1.8, 1.0), np.float32) / np.hypot(1.8, 1.0)
    return np.maximum(np.abs(x) * slope[0] - (y + 0.95) * slope[1] * 1.0, y - 0.85)


def _cross(x: Pixels, y: Pixels) -> Pixels:
    across, up = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(across - 1, up - 0.37)


def _star(x: Pixels, y: Pixels) -> Pixels:
    """Five points, one up: the angle is folded into one half of one point, whose edge is a straight line."""
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    length = np.hypot(x, y)
    px, py = length * np.cos(angle), length * np.sin(angle)
    tip, notch = np.array((1.12, 0.0)), 0.5 * np.array((np.cos(sector), np.sin(sector)))
    along = notch - tip
    normal = np.array((-along[1], along[0])) / np.hypot(*along)
    return -((px - tip[0]) * normal[0] + (py - tip[1]) * normal[1])


_UNIT_SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
}
