"""Where a blob goes in the arena: beside what its model still lacks, if that costs no more.

A model whose blobs lie side by side leaves one gap when it goes, large enough for the next model. Blobs that
each go where it is cheapest for them alone end up scattered, and while they are leased what is free between
them may be too short for the largest blob of another model: room for two models then holds one.
"""

from collections.abc import Iterable, Sequence

from understudyd.core.extents import ArenaMap
from understudyd.core.windows import Priced, Wanted, Window, cheapest_window, find_windows

_ROUNDING = 1.0 + 1e-9
_SCARCE_MODELS = 3
"""Where fewer would fit, what is free beside a leased one must be in one piece: side by side at any price."""


def cheapest(
    arena: ArenaMap, size_bytes: int, beside: Sequence[int], candidates: Iterable[Priced]
) -> tuple[Window | None, int]:
    """What to clear for a blob that no gap has room for, and how many bytes shall be free behind it.

    `beside` are the sizes of the other blobs that the model lacks. Where one run of neighbours for all of
    them is dearer than one for each, the blob gets one for itself. None: there is no room.
    """
    if not beside:
        return cheapest_window(arena, size_bytes, candidates), 0
    alone = Wanted(arena.rounded(size_bytes))
    room_bytes = sum(map(arena.rounded, beside))
    together = Wanted(alone.size_bytes + room_bytes)
    is_scarce = arena.size_bytes < _SCARCE_MODELS * together.size_bytes
    gap_bytes = arena.largest_gap_bytes
    others = [Wanted(need) for need in map(arena.rounded, beside) if need > gap_bytes]
    apart = [alone, *others] if alone.size_bytes > gap_bytes else others

    def ceiling() -> float:
        apart_cost = sum([want.ceiling for want in apart])
        if not is_scarce:
            together.ceiling = min(together.ceiling, (apart_cost + 1e-9) * _ROUNDING)
        return max([want.ceiling for want in (*apart, together)])

    find_windows(arena, [*apart, together], candidates, ceiling)
    window = together.window
    if window is not None and window.cost <= together.ceiling:
        return window, room_bytes
    return alone.window, 0
