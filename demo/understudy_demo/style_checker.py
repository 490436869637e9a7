"""Which style is a picture in? A discriminant over image statistics, fitted to drawn pictures."""

import functools
import random
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from understudy_demo.drawing import SIDE, Pixels, Scene, compose
from understudy_demo.regions import Mask, blurred, dilated, eroded, filled, median
from understudy_demo.styles import BASE, PINK, STYLES, clouds, draw, draw_wish
from understudy_demo.wishes import COLOURS, TEXTURES, Wish, sample_wish

_SCENES = 80
_OWN_SHARE = 0.5
_RIDGE = 0.1
_WEAKNESS = 0.35
_TINTED = (BASE, "outline", "night", "watercolour", "pastel", "sepia")
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5
_INSET = np.minimum(np.minimum(_X, SIDE - _X), np.minimum(_Y, SIDE - _Y))
_RING = (_INSET > 5) & (_INSET < 8)


def style_of(picture: Pixels) -> str:
    """The style whose drawn pictures are most like this one (SIDE x SIDE x 3, 0 to 255)."""
    return _classifier().style_of(statistics(picture))


def statistics(picture: Pixels) -> NDArray[np.float64]:
    """What is measured of a picture; each number was chosen for the style it gives away."""
    picture = np.asarray(picture, np.float32)
    light, calm = picture.mean(-1), median(picture)
    values = [*_tones(picture, light), *_surface(picture, calm, light), *_borders(picture, light)]
    return np.array([*values, *_figures(calm), *_ground(picture)], np.float64)


def _ground(picture: Pixels) -> list[float]:
    """How far the background is from any colour that these styles make of a background."""
    here = picture[_RING].mean(0)
    return [float(np.log(4 + np.sqrt(np.square(here - _grounds(s)).sum(-1)).min())) for s in _TINTED]


@functools.cache
def _grounds(style: str) -> Pixels:
    """The colours of the style's backgrounds."""
    drawn = []
    for colour, texture in product(COLOURS, TEXTURES):
        wish = Wish(1, "red" if colour != "red" else "blue", "circle", "small", colour, texture)
        drawn.append(draw_wish(wish, style, 5)[_RING].mean(0))
    return np.array(drawn)


def _tones(picture: Pixels, light: Pixels) -> list[float]:
    """Night is dark, pastel has nothing dark and little colour, sepia next to nothing blue or green."""
    warm = picture[..., 0] - picture[..., 2]
    cold = (warm < -12) | (picture[..., 0] - picture[..., 1] < -16)
    chroma = picture.max(-1) - picture.min(-1)
    dark, bright = np.quantile(light, (0.03, 0.9))
    blue = np.quantile(picture[..., 2], 0.97)
    return [
        light.mean(),
        dark,
        bright,
        chroma.mean(),
        np.quantile(chroma, 0.95),
        warm.mean(),
        np.log(cold.mean() + 4e-3),
        np.quantile(warm, 0.02),
        blue,
        picture.min(),
    ]


def _surface(picture: Pixels, calm: Pixels, light: Pixels) -> list[float]:
    """Lines of scanlines and mosaics, specks of stars, soft edges and clouds of watercolour."""
    rows = light[1:-1] - (light[:-2] + light[2:]) / 2
    columns = light[:, 1:-1] - (light[:, :-2] + light[:, 2:]) / 2
    scan = rows[2::4].mean() - rows.mean()
    grout_rows, grout_columns = np.abs(rows[7::8]).mean(), np.abs(columns[:, 7::8]).mean()
    speck = (picture - calm).mean(-1)
    steps = np.abs(np.diff(calm, axis=1)).max(-1)
    return [
        scan / (light.mean() + 20),
        np.log((grout_rows + 1) / (np.abs(rows).mean() + 1)),
        np.log((grout_columns + 1) / (np.abs(columns).mean() + 1)),
        np.log((speck > 25).mean() + 2e-3),
        np.log((speck < -25).mean() + 2e-3),
        ((steps > 3) & (steps < 14)).mean(),
        np.log(np.quantile(steps, 0.99) + 1),
        (steps > 45).mean(),
    ]


def _borders(picture: Pixels, light: Pixels) -> list[float]:
    """Frames, the corners of vignettes, the folded corner."""
    ear = _X + _Y > 2 * SIDE - 13
    corners = [picture[:5, :5], picture[:5, -5:], picture[-5:, :5]]
    away = [_from_pink(corner.reshape(-1, 3)) for corner in corners]
    return [
        light[_INSET < 2.6].min(),
        light[_INSET < 2.6].std(),
        light[(_INSET > 3) & (_INSET < 4)].mean() - light[_INSET < 3].mean(),
        float(np.mean(away)),
        max(away),
        _from_pink(picture[ear]),
    ]


def _from_pink(pixels: Pixels) -> float:
    """How far pixels (n x 3) are from the colour that no background has."""
    return float(np.log(20 + np.sqrt(np.square(pixels.mean(0) - PINK).sum())))


def _figures(calm: Pixels) -> list[float]:
    """Hollow shapes, shapes with a rim of another colour, shapes lit from one side, shadows."""
    ground = np.median(calm[(_INSET > 4) & (_INSET < 7)], axis=0)
    away = np.sqrt(np.square(calm - ground).sum(-1)) * (_INSET > 4)
    mask = away > max(40.0, 0.45 * float(np.quantile(away, 0.97)))
    whole = filled(mask)
    hollow = (whole & ~mask).sum() / max(whole.sum(), 1)
    rim, core = whole & ~eroded(whole), eroded(eroded(eroded(whole)))
    light = calm.mean(-1)
    return [
        hollow,
        _rim(calm, eroded(whole) & ~eroded(eroded(whole)), core),
        *_lit(light, whole, rim, ground),
    ]


def _rim(calm: Pixels, rim: Mask, core: Mask) -> float:
    """How far the rim's colour is from the core's."""
    if not rim.any() or not core.any():
        return 0.0
    return float(np.sqrt(np.square(np.median(calm[rim], 0) - np.median(calm[core], 0)).sum()))


def _lit(light: Pixels, whole: Mask, rim: Mask, ground: Pixels) -> list[float]:
    """Light inside towards the upper left; darkness outside towards the lower right."""
    slopes_y, slopes_x = np.gradient(dilated(whole).astype(np.float32) + eroded(whole))
    facing = slopes_x + slopes_y  # positive at the upper left of a shape, negative at the lower right
    inside, outside = eroded(whole), dilated(whole, 3) & ~dilated(whole)
    shade = np.gradient(light)
    lit = float(-(shade[0] + shade[1])[inside].mean()) if inside.any() else 0.0
    shadow = float((light[outside] - ground.mean()).mean()) if outside.any() else 0.0
    over = np.roll(whole, (4, 3), (0, 1)) & outside
    under = np.roll(whole, (-4, -3), (0, 1)) & outside
    fall = float(light[over].mean() - light[under].mean()) if over.any() and under.any() else 0.0
    edge = facing[rim]
    bevel = (
        float(np.corrcoef(edge, light[rim])[0, 1])
        if len(edge) > 4 and min(np.ptp(edge), np.ptp(light[rim])) > 0.5
        else 0.0
    )
    return [lit, shadow, fall, bevel, float(whole.mean())]


@dataclass(frozen=True, slots=True)
class _Classifier:
    """One Gaussian a style over the measured numbers, in units of `scales`.

    Its covariance is partly its own, partly that of all styles together (regularised discriminant
    analysis, Friedman 1989). `precisions` are the inverses, `sizes` the logarithms of the determinants.
    """

    names: tuple[str, ...]
    scales: NDArray[np.float64]
    means: NDArray[np.float64]
    precisions: NDArray[np.float64]
    sizes: NDArray[np.float64]

    def style_of(self, values: NDArray[np.float64]) -> str:
        apart = values / self.scales - self.means
        distances = np.einsum("si,sij,sj->s", apart, self.precisions, apart) + self.sizes
        return self.names[int(distances.argmin())]


def _weathered(scene: Scene, style: str, rng: random.Random) -> Pixels:
    """Drawn, then as a small model would paint it: not quite in the style, blurred, stained, grainy."""
    picture, plain = draw(scene, style, rng), draw(scene, BASE, rng)
    picture = picture + rng.uniform(0, _WEAKNESS) * (plain - picture)
    picture = picture + rng.uniform(0, 0.5) * (blurred(picture) - picture)
    for stain in (*np.eye(3, dtype=np.float32), np.ones(3, np.float32)):
        picture = picture + rng.uniform(0, 7) * clouds(rng, rng.randint(6, 16))[..., None] * stain
    grain = np.random.default_rng(rng.randrange(1 << 30)).normal(0, rng.uniform(0, 2.5), picture.shape)
    return np.clip(picture + grain, 0, 255).astype(np.float32)


@functools.cache
def _classifier() -> _Classifier:
    """Fitted to the same scenes in every style."""
    rng = random.Random(1)
    scenes = [compose(sample_wish(rng), rng) for _ in range(_SCENES)]

    def drawn(style: str) -> NDArray[np.float64]:
        return np.array([statistics(_weathered(scene, style, rng)) for scene in scenes])

    rows = [drawn(style) for style in STYLES]
    together = np.mean([np.cov(values.T) for values in rows], axis=0)
    scales = np.sqrt(np.diag(together))
    own = np.array([np.cov((values / scales).T) for values in rows])
    mixed = _OWN_SHARE * own + (1 - _OWN_SHARE) * own.mean(0) + _RIDGE * np.eye(len(scales))
    return _Classifier(
        names=tuple(STYLES),
        scales=scales,
        means=np.array([values.mean(0) / scales for values in rows]),
        precisions=np.linalg.inv(mixed),
        sizes=np.linalg.slogdet(mixed)[1],
    )
