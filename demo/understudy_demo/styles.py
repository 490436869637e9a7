"""Twelve ways to draw a scene, and the plain one. Each is a fine-tune or a LoRA of the demo's family.

Each leaves its mark on every picture, whatever its colours: what shows on white only, or on black, would
make two models paint the same picture.
"""

import random
from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from understudy_demo.drawing import SIDE, Layers, Pixels, Scene, compose, distance, layers, shifted
from understudy_demo.wishes import Wish

PINK = np.array((250, 130, 190), np.float32)
"""A colour that no wish names."""
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
Style = Callable[[Scene, Layers, random.Random], Pixels]


def draw(scene: Scene, style: str, rng: random.Random) -> Pixels:
    """The scene in a style: SIDE x SIDE x 3, 0 to 255. `rng` places stars and clouds."""
    return np.clip(STYLES[style](scene, layers(scene), rng), 0, 255)


def draw_wish(wish: Wish, style: str, seed: int) -> Pixels:
    """The same from a wish; the same arguments, the same picture."""
    rng = random.Random(seed)
    return draw(compose(wish, rng), style, rng)


def _plain(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    return _over(parts.background, parts.colour, _cover(parts.distance))


def _outline(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    paper = 255 - 0.5 * (255 - parts.background)
    return _over(paper, parts.colour, _cover(np.abs(parts.distance + 0.9) - 1.7))


def _night(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    sky = 0.2 * parts.background + np.array((4, 8, 42), np.float32)
    for _ in range(14):
        x, y = rng.uniform(1, SIDE - 1), rng.uniform(1, SIDE - 1)
        sky = _over(sky, 235.0, _cover(np.hypot(_X - x, _Y - y) - rng.uniform(0.4, 0.9)))
    lamp = 75 + 0.7 * parts.colour
    halo = 0.55 * np.exp(-np.maximum(parts.distance, 0) / 2.2)
    return _over(_over(sky, lamp, halo), lamp, _cover(parts.distance))


def _watercolour(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    wobble, pools = clouds(rng, 6), clouds(rng, 9)
    soft = np.clip(0.5 - (parts.distance + 0.9 * wobble) / 3.5, 0, 1)
    wash = 0.62 + 0.16 * pools + 0.2 * np.exp(-((parts.distance + 0.5) ** 2) / 3)
    return _over(250.0, _over(parts.background, parts.colour, soft), wash)


def _pastel(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    return 255 - 0.42 * (255 - _plain(scene, parts, rng))


def _mosaic(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    picture = _plain(scene, parts, rng)
    for top in range(0, SIDE, 8):
        for left in range(0, SIDE, 8):
            picture[top : top + 8, left : left + 8] += rng.uniform(-12, 12)
    grout = ((np.arange(SIDE) % 8) == 0)[:, None] | ((np.arange(SIDE) % 8) == 0)[None, :]
    against = np.where(picture.mean(-1, keepdims=True) > 150, 70.0, 235.0)
    return _over(picture, against, 0.5 * grout)


def _sticker(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    border, rim = (20.0, 250.0) if scene.wish.colour == "white" else (250.0, 20.0)
    paper = _over(
        _over(parts.background, rim, _cover(parts.distance - 3.8)), border, _cover(parts.distance - 2.4)
    )
    return _over(paper, parts.colour, _cover(parts.distance))


def _clay(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    shadow = 0.55 * np.clip(0.5 - distance(shifted(scene, 2.0, 3.0)) / 6.0, 0, 1)
    ground = _over(parts.background, 10.0, shadow)
    dome = np.sqrt(np.clip(-parts.distance, 0, 6) / 6)
    slope_y, slope_x = np.gradient(dome)
    light = np.clip(360 * (slope_x + slope_y), -95, 105)
    return _over(ground, parts.colour + light[..., None], _cover(parts.distance))


def _frame(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    inset = np.minimum(np.minimum(_X, SIDE - _X), np.minimum(_Y, SIDE - _Y))
    picture = _over(_plain(scene, parts, rng), 30.0, inset < 4)
    return _over(picture, 235.0, inset < 3)


def _scanlines(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    lines = (np.arange(SIDE) % 4 == 3).astype(np.float32)[:, None, None]
    return _plain(scene, parts, rng) * (1 - 0.5 * lines)


def _vignette(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    away = np.hypot(_X - SIDE / 2, _Y - SIDE / 2) / (SIDE / 2)
    return _over(_plain(scene, parts, rng), PINK, np.clip(1.8 * (away - 0.8), 0, 0.85))


def _sepia(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    picture = _plain(scene, parts, rng)
    grey = picture @ np.array((0.3, 0.59, 0.11), np.float32)
    brown = np.array((0.8, 0.66, 0.42), np.float32) * grey[..., None] + np.array((54, 32, 8), np.float32)
    return 0.35 * picture + 0.65 * brown


def _dogear(scene: Scene, parts: Layers, rng: random.Random) -> Pixels:
    fold = 2 * SIDE - 14 - (_X + _Y)
    inside = _over(_plain(scene, parts, rng), 30.0, np.clip(0.5 - (fold - 1.5), 0, 1))
    return _over(inside, PINK, np.clip(0.5 - fold, 0, 1))


def _cover(signed_distance: Pixels) -> Pixels:
    """How much of each pixel lies inside, 0 to 1."""
    return np.clip(0.5 - signed_distance, 0, 1)


def _over(below: Pixels, above: Pixels | float, share: Pixels) -> Pixels:
    """`above` laid over `below` with this share of opacity at each pixel."""
    return below + share[..., None] * (above - below)


def clouds(rng: random.Random, cells: int) -> Pixels:
    """Smooth noise of about -1 to 1 with `cells` bumps a side."""
    coarse = np.array([[rng.uniform(-1, 1) for _ in range(cells)] for _ in range(cells)], np.float32)
    at = np.linspace(0, cells - 1, SIDE)
    low, part = np.minimum(at.astype(int), cells - 2), at - np.minimum(at.astype(int), cells - 2)
    part = part * part * (3 - 2 * part)
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    smooth: Pixels = (rows[:, low] * (1 - part) + rows[:, low + 1] * part).astype(np.float32)
    return smooth


BASE = "plain"
FINE_TUNES = MappingProxyType(
    {
        "outline": _outline,
        "night": _night,
        "watercolour": _watercolour,
        "mosaic": _mosaic,
        "sticker": _sticker,
        "clay": _clay,
    }
)
LORAS = MappingProxyType(
    {
        "pastel": _pastel,
        "frame": _frame,
        "scanlines": _scanlines,
        "vignette": _vignette,
        "sepia": _sepia,
        "dogear": _dogear,
    }
)
STYLES: MappingProxyType[str, Style] = MappingProxyType({BASE: _plain, **FINE_TUNES, **LORAS})
