"""Where a blob goes in the arena: beside what its model still lacks, if that costs no more.

A model whose blobs lie side by side leaves one gap when it goes, large enough for the next model. Blobs that
each go where it is cheapest for them alone end up scattered, and while they are leased what is free between
them may be too short for the largest blob of another model: room for two models then holds one.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from understudyd.core.extents import ArenaMap, Priced, Window

Candidates = Callable[[], Iterable[Priced]]
"""What may be evicted, the cheapest first."""

_ROUNDING = 1.0 + 1e-9
_SCARCE_MODELS = 3
"""Where fewer would fit, what is free beside a leased one must be in one piece: side by side at any price."""


def cheapest(
    arena: ArenaMap, size_bytes: int, beside: Sequence[int], candidates: Candidates
) -> tuple[Window | None, int]:
    """What to clear for a blob that no gap has room for, and how many bytes shall be free behind it.

    `beside` are the sizes of the other blobs that the model lacks. Where one run of neighbours for all of
    them is dearer than one for each, the blob gets one for itself. None: there is no room.
    """
    if beside:
        room_bytes = sum(map(arena.rounded, beside))
        need = arena.rounded(size_bytes) + room_bytes
        is_scarce = arena.size_bytes < _SCARCE_MODELS * need
        limit = math.inf if is_scarce else _apart(arena, (size_bytes, *beside), candidates) * _ROUNDING
        together = arena.cheapest_window(need, candidates(), limit)
        if together is not None:
            return together, room_bytes
    return arena.cheapest_window(size_bytes, candidates()), 0


def _apart(arena: ArenaMap, sizes_bytes: Iterable[int], candidates: Candidates) -> float:
    """What room for each costs, found without a look at the others; infinite when one finds none."""
    cost, gap_bytes = 1e-9, arena.largest_gap_bytes
    for size_bytes in sizes_bytes:
        if arena.rounded(size_bytes) <= gap_bytes:
            continue
        window = arena.cheapest_window(size_bytes, candidates())
        if window is None:
            return math.inf
        cost += window.cost
    return cost
