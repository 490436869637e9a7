"""Masks of pixels and the connected regions in them, with numpy alone."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Region:
    """Connected pixels; `box` is top, left, bottom, right with the last two outside."""

    mask: Mask
    box: tuple[int, int, int, int]
    area: int

    @property
    def side(self) -> float:
        """The longer side of the box, in pixels."""
        top, left, bottom, right = self.box
        return float(max(bottom - top, right - left))

    @property
    def x(self) -> float:
        """The middle of the box."""
        return (self.box[1] + self.box[3]) / 2

    @property
    def y(self) -> float:
        """The middle of the box."""
        return (self.box[0] + self.box[2]) / 2

    def stencil(self, side: int) -> Pixels:
        """What the box holds, stretched to side x side (nearest neighbour), 0 or 1."""
        top, left, bottom, right = self.box
        rows = top + ((np.arange(side) + 0.5) * (bottom - top) / side).astype(int)
        columns = left + ((np.arange(side) + 0.5) * (right - left) / side).astype(int)
        return self.mask[np.ix_(rows, columns)].astype(np.float32)


def regions(mask: Mask, smallest: int) -> list[Region]:
    """The regions (neighbours share an edge) of at least `smallest` pixels."""
    left_over = mask.copy()
    found = []
    for y, x in np.argwhere(mask):
        if left_over[y, x]:
            members = _flood(left_over, int(y), int(x))
            if len(members) >= smallest:
                found.append(_region(members, mask.shape))
    return found


def _flood(left_over: Mask, y: int, x: int) -> list[tuple[int, int]]:
    """The pixels connected to this one; they are taken out of the mask."""
    height, width = left_over.shape
    left_over[y, x] = False
    members, queue = [(y, x)], deque([(y, x)])
    while queue:
        y, x = queue.popleft()
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width and left_over[v, u]:
                left_over[v, u] = False
                members.append((v, u))
                queue.append((v, u))
    return members


def _region(members: list[tuple[int, int]], shape: tuple[int, ...]) -> Region:
    ys, xs = np.array(members).T
    mask = np.zeros(shape, bool)
    mask[ys, xs] = True
    box = (int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1)
    return Region(mask, box, len(members))


def filled(mask: Mask) -> Mask:
    """The mask with its holes filled: what the outside does not reach."""
    free = np.pad(~mask, 1, constant_values=True)
    reached, before = np.zeros_like(free), 0
    reached[0] = reached[-1] = reached[:, 0] = reached[:, -1] = True
    while (now := int(reached.sum())) > before:
        before = now
        for _ in range(4):
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            reached = grown & free
    return ~reached[1:-1, 1:-1]


def eroded(mask: Mask) -> Mask:
    """The pixels whose eight neighbours are in the mask as well."""
    return np.asarray(_neighbours(mask).all(0))


def dilated(mask: Mask, times: int = 1) -> Mask:
    """The mask and every pixel beside it."""
    for _ in range(times):
        mask = np.asarray(_neighbours(mask).any(0))
    return mask


def median(picture: Pixels) -> Pixels:
    """Each channel's median over three pixels across, then down: takes away lines and specks, keeps edges."""
    for axis in (1, 0):
        ends = [(1, 1) if other == axis else (0, 0) for other in range(picture.ndim)]
        wide = np.moveaxis(np.pad(picture, ends, mode="edge"), axis, 0)
        before, here, after = wide[:-2], wide[1:-1], wide[2:]
        low, high = np.minimum(before, here), np.maximum(before, here)
        picture = np.moveaxis(np.maximum(low, np.minimum(high, after)), 0, axis)
    return picture


def blurred(picture: Pixels) -> Pixels:
    """Each pixel the mean of 3 x 3."""
    return np.asarray(_neighbours(picture).mean(0), np.float32)


def _neighbours(values: NDArray) -> NDArray:
    """The nine shifts of an image, edges repeated."""
    height, width = values.shape[:2]
    wide = np.pad(values, [(1, 1), (1, 1), *[(0, 0)] * (values.ndim - 2)], mode="edge")
    return np.stack([wide[y : y + height, x : x + width] for y in range(3) for x in range(3)])
