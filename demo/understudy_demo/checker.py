"""Does a picture show what was asked for? Plain image statistics, no network.

What the checker knows about a style (which colours its red shapes and blue grounds come out as, how its
triangles look once cut out) it measures on pictures that the project draws in that style, with the
same code that it then judges with.
"""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from understudy_demo.drawing import MARGIN, SIDE, Pixels, compose, distance, texture_signs
from understudy_demo.regions import Mask, Region, dilated, eroded, filled, median, regions
from understudy_demo.styles import PINK, draw
from understudy_demo.wishes import COLOURS, SHAPES, SIZES, TEXTURES, Wish, sample_wish

_SMALLEST_REGION = 16  # pixels: less is dust
_FOREIGN_SLACK = 12  # pixels of a third colour, thin lines left out, beyond what a style itself has
_BORDERS = {"sticker": ((250, 250, 250), (20, 20, 20)), "dogear": (PINK, (30, 30, 30)), "vignette": (PINK,)}
"""What a style adds in colours of its own, which are no shape's."""
_STENCIL_SIDE = 24
_DRAWN_EACH = 4
_PER_PIXEL = 0.02  # what a pixel's difference in side counts, in shares of a cut-out
_PAIRS = (("red", "white"), ("white", "blue"), ("black", "yellow"), ("green", "black"), ("yellow", "purple"))


def check(picture: Pixels, wish: Wish, style: str) -> tuple[str, ...]:
    """What of the wish a picture of a model that paints in `style` does not show: nothing if it passes.

    `picture` is SIDE x SIDE x 3, 0 to 255. Each fault is a few words for people.
    """
    known = _knowledge(style)
    calm = median(np.asarray(picture, np.float32))
    ground, colour = known.colours_of(calm)
    found = known.cut_out(calm, ground, colour)
    looks = [known.look_of(region) for region in found]
    shapes, sizes = [shape for shape, _ in looks], [size for _, size in looks]
    texture = known.texture_of(calm, found)
    faults = {
        f"{len(found)} shapes": len(found) != wish.count,
        f"colour {colour}": colour != wish.colour,
        f"shape {', '.join(sorted(set(shapes)))}": set(shapes) != {wish.shape},
        f"size {', '.join(sorted(set(sizes)))}": set(sizes) != {wish.size},
        f"background {ground}": wish.background not in (None, ground),
        f"texture {texture}": texture != wish.texture,
        f"another colour on {ground}": known.foreign_pixels(calm, ground, colour) > known.most_foreign,
        "another place": wish.place is not None and wish.place not in [_place(region) for region in found],
    }
    return tuple(fault for fault, is_there in faults.items() if is_there)


def _place(region: Region) -> str:
    dx, dy = region.x - SIDE / 2, region.y - SIDE / 2
    if max(abs(dx), abs(dy)) < 4:
        return "middle"
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


@dataclass(frozen=True, slots=True)
class _Knowledge:
    """A style's colours as RGB rows in the order of COLOURS, its cut-out shapes, its textures' strengths."""

    grounds: Pixels
    figures: Pixels
    stencils: Mapping[tuple[str, str], Pixels]
    sides: Mapping[tuple[str, str], float]
    strengths: Mapping[str, tuple[float, float]]
    borders: Pixels
    most_foreign: float = 0.0

    def colours_of(self, calm: Pixels) -> tuple[str, str]:
        """The most common colour near the border, and inside of what is neither that nor a thin line."""
        ground = int(np.bincount(_nearest(calm[_INSIDE & ~_HEART], self.grounds)).argmax())
        shown = self.figures.copy()
        shown[ground] = self.grounds[ground]
        nearest = _nearest(calm, shown)
        areas = [int((eroded(nearest == c) & _INSIDE).sum()) for c in range(len(COLOURS))]
        areas[ground] = -1
        return COLOURS[ground], COLOURS[int(np.argmax(areas))]

    def cut_out(self, calm: Pixels, ground: str, colour: str) -> list[Region]:
        """What is nearer to the shapes' colour than to the background's, holes filled."""
        below, above = self.grounds[COLOURS.index(ground)], self.figures[COLOURS.index(colour)]
        apart = np.square(self.borders - above).sum(-1) > 60**2
        mask = _nearest(calm, np.concatenate([[above, below], self.borders[apart]])) == 0
        if len(self.borders):
            mask = dilated(eroded(mask)) & mask  # a border's soft edge passes through every colour
        return regions(filled(mask & _INSIDE), _SMALLEST_REGION)

    def foreign_pixels(self, calm: Pixels, ground: str, colour: str) -> int:
        """How many pixels are of a third colour, where that is more than a line."""
        below, above = self.grounds[COLOURS.index(ground)], self.figures[COLOURS.index(colour)]
        nearest = _nearest(calm, np.concatenate([self.figures, [below, above]]))
        others = np.ones_like(nearest, bool)
        for own in (COLOURS.index(ground), COLOURS.index(colour), len(COLOURS), len(COLOURS) + 1):
            others &= nearest != own
        return int((eroded(others) & _INSIDE).sum())

    def look_of(self, region: Region) -> tuple[str, str]:
        """The shape whose cut-outs in this style differ least, in outline and side; the size next in side."""
        stencil = region.stencil(_STENCIL_SIDE)

        def difference(look: tuple[str, str]) -> float:
            apart = float(np.abs(stencil - self.stencils[look]).mean())
            return apart + _PER_PIXEL * abs(region.side - self.sides[look])

        shape, _ = min(self.stencils, key=difference)
        return shape, min(SIZES, key=lambda size: abs(region.side - self.sides[shape, size]))

    def texture_of(self, calm: Pixels, found: Sequence[Region]) -> str:
        """The texture with which the background's brightness goes up and down, if it does."""
        free = _free(found)
        shares = {}
        for texture, (without, with_it) in self.strengths.items():
            shares[texture] = (_strength(calm, free, texture) - without) / (with_it - without)
        best = max(shares, key=lambda texture: shares[texture])
        return best if shares[best] > 0.5 else "plain"


def _without_border(width: int) -> Mask:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[width:-width, width:-width] = True
    return mask


_INSIDE, _HEART = _without_border(MARGIN - 1), _without_border(MARGIN + 2)


def _nearest(pixels: Pixels, rows: Pixels) -> np.ndarray:
    return np.asarray(np.square(pixels[..., None, :] - rows).sum(-1).argmin(-1))


def _free(found: Sequence[Region]) -> Mask:
    """The background, well away from shapes and borders."""
    taken = np.any([region.mask for region in found], axis=0) if found else np.zeros((SIDE, SIDE), bool)
    return _INSIDE & ~dilated(taken, 4)


def _strength(calm: Pixels, free: Mask, texture: str) -> float:
    """How many levels the brightness rises with the texture's sign."""
    if not free.any():
        return 0.0
    light, sign = calm.mean(-1)[free], texture_signs(texture)[free]
    sign = sign - sign.mean()
    return float(light @ sign / max(float(sign @ sign), 1.0))


@functools.cache
def _knowledge(style: str) -> _Knowledge:
    """Measured on drawn pictures: every colour, shape, size and texture several times."""
    rng = random.Random(0)
    grounds, figures = np.zeros((2, len(COLOURS), 3), np.float32)
    for index, colour in enumerate(COLOURS):
        grounds[index], figures[index] = _colours_drawn(colour, style, rng)
    borders = np.array(_BORDERS.get(style, ()), np.float32).reshape(-1, 3)
    known = _Knowledge(grounds, figures, {}, {}, _strengths_drawn(style, rng), borders)
    cut = {
        (shape, size): _cut_out_drawn(known, shape, size, style, rng) for shape in SHAPES for size in SIZES
    }
    return replace(
        known,
        stencils={key: np.mean([r.stencil(_STENCIL_SIDE) for r in found], 0) for key, found in cut.items()},
        sides={key: float(np.mean([region.side for region in found])) for key, found in cut.items()},
        most_foreign=_foreign_drawn(known, style, rng) + _FOREIGN_SLACK,
    )


def _foreign_drawn(known: _Knowledge, style: str, rng: random.Random) -> float:
    """How much of a third colour a style's own pictures seem to have: shades, shadows, blurred edges."""

    def foreign() -> int:
        wish = sample_wish(rng)
        scene = compose(wish, rng)
        return known.foreign_pixels(median(draw(scene, style, rng)), scene.background, wish.colour)

    return float(np.quantile([foreign() for _ in range(60)], 0.98))


def _colours_drawn(colour: str, style: str, rng: random.Random) -> tuple[Pixels, Pixels]:
    """The colour as a background and as a shape."""
    others = [other for other in COLOURS if other != colour]
    below, above = [], []
    for _ in range(_DRAWN_EACH):
        scene = compose(Wish(1, rng.choice(others), "square", "big", colour), rng)
        below.append(median(draw(scene, style, rng))[_INSIDE & (distance(scene) > 4)])
        for size in ("small", "medium"):
            scene = compose(Wish(1, colour, "square", size, rng.choice(others)), rng)
            depth = distance(scene)
            above.append(median(draw(scene, style, rng))[(depth < -1) & (depth > -2.6)])
    return np.median(np.concatenate(below), 0), np.median(np.concatenate(above), 0)


def _strengths_drawn(style: str, rng: random.Random) -> dict[str, tuple[float, float]]:
    """Of each texture, where it is not and where it is."""

    def strength(texture: str, painted: str) -> float:
        colour, ground = rng.choice((("red", "blue"), ("white", "green"), ("black", "orange")))
        scene = compose(Wish(1, colour, "circle", "small", ground, painted), rng)
        return _strength(median(draw(scene, style, rng)), _INSIDE & (distance(scene) > 5), texture)

    def mean(texture: str, painted: str) -> float:
        return float(np.mean([strength(texture, painted) for _ in range(2 * _DRAWN_EACH)]))

    return {texture: (mean(texture, "plain"), mean(texture, texture)) for texture in TEXTURES[1:]}


def _cut_out_drawn(known: _Knowledge, shape: str, size: str, style: str, rng: random.Random) -> list[Region]:
    found: list[Region] = []
    for colour, ground in _PAIRS:
        scene = compose(Wish(1, colour, shape, size, ground), rng)
        found += known.cut_out(median(draw(scene, style, rng)), ground, colour)[:1]
    return found
