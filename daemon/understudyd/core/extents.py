"""The map of the arena: who owns which bytes.

Best fit with coalescing; what to clear when no gap is large enough is found by `windows.py`. Every byte
belongs to exactly one extent or one gap; `check` proves it.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from understudyd.core.states import EXTENT_TABLE, ExtentState, Lifecycle

ALIGN_BYTES = 4096


@dataclass(eq=False, slots=True)
class Extent:
    """A piece of the arena or the host pool that holds, or will hold, one blob.

    Unless it `is_proved`, nobody has checked its bytes since another daemon wrote them. `before` and `after`
    are its neighbours, be there a gap between or not; the ends of the whole are such, too.
    """

    offset: int
    size_bytes: int
    blob: str
    generation: int
    life: Lifecycle[ExtentState]
    leases: int = 0
    is_proved: bool = True
    before: "Extent" = field(init=False, repr=False)
    after: "Extent" = field(init=False, repr=False)

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.size_bytes

    @property
    def state(self) -> ExtentState:
        """Where it is in its life."""
        return self.life.state


@dataclass(slots=True)
class ArenaMap:
    """Extents and gaps of `[0, size_bytes)`, both sorted by offset. `releases` counts new gaps."""

    size_bytes: int
    align_bytes: int = ALIGN_BYTES
    _extents: dict[int, Extent] = field(default_factory=dict)
    _offsets: list[int] = field(default_factory=list)
    _gaps: dict[int, int] = field(default_factory=dict)
    _gap_offsets: list[int] = field(default_factory=list)
    _gap_sizes: list[tuple[int, int]] = field(default_factory=list)
    _generation: int = 0
    releases: int = 0
    _bottom: Extent = field(init=False, repr=False)
    _top: Extent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.size_bytes -= self.size_bytes % self.align_bytes
        life = Lifecycle("an end of the arena", ExtentState.FREE, EXTENT_TABLE)
        self._bottom, self._top = Extent(0, 0, "", 0, life), Extent(self.size_bytes, 0, "", 0, life)
        self._bottom.before = self._top.before = self._bottom
        self._bottom.after = self._top.after = self._top
        if self.size_bytes > 0:
            self._add_gap(0, self.size_bytes)

    # -- reading ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Extent]:
        """All extents by offset."""
        return (self._extents[o] for o in self._offsets)

    @property
    def extent_count(self) -> int:
        """How many pieces are owned."""
        return len(self._offsets)

    @property
    def free_bytes(self) -> int:
        """Bytes that belong to no extent."""
        return sum(self._gaps.values())

    @property
    def largest_gap_bytes(self) -> int:
        """The largest blob that fits without eviction."""
        return self._gap_sizes[-1][0] if self._gap_sizes else 0

    def gaps(self) -> list[tuple[int, int]]:
        """`(offset, size_bytes)` of every gap, by offset."""
        return [(o, self._gaps[o]) for o in self._gap_offsets]

    def bytes_in(self, *states: ExtentState) -> int:
        """Bytes of the extents in these states."""
        return sum(e.size_bytes for e in self._extents.values() if e.state in states)

    def rounded(self, size_bytes: int) -> int:
        """What a blob of this size takes; an empty one too has an address of its own."""
        return -(-max(size_bytes, 1) // self.align_bytes) * self.align_bytes

    # -- changing -----------------------------------------------------------------------------------

    def allocate(self, size_bytes: int, blob: str, room_bytes: int = 0) -> Extent | None:
        """A FILLING extent in the smallest gap that fits and has so much room behind it, or None."""
        need = self.rounded(size_bytes)
        fitting = bisect_left(self._gap_sizes, (need + room_bytes, 0))
        if fitting == len(self._gap_sizes):
            return None
        _, offset = self._gap_sizes[fitting]
        return self._cut(offset, offset, need, blob)

    def allocate_at(self, offset: int, size_bytes: int, blob: str) -> Extent | None:
        """A FILLING extent in this very place, or None unless all of it is free."""
        need = self.rounded(size_bytes)
        i = bisect_right(self._gap_offsets, offset) - 1
        if i < 0 or offset % self.align_bytes:
            return None
        gap = self._gap_offsets[i]
        if offset + need > gap + self._gaps[gap]:
            return None
        return self._cut(gap, offset, need, blob)

    def _cut(self, gap: int, offset: int, need: int, blob: str) -> Extent:
        """Take a piece out of the gap that begins at `gap`."""
        end = gap + self._drop_gap(gap)
        if offset > gap:
            self._add_gap(gap, offset - gap)
        if end > offset + need:
            self._add_gap(offset + need, end - offset - need)
        self._generation += 1
        life = Lifecycle(f"extent {offset}+{need}", ExtentState.FILLING, EXTENT_TABLE)
        extent = Extent(offset, need, blob, self._generation, life)
        self._extents[offset] = extent
        place = bisect_left(self._offsets, offset)
        self._offsets.insert(place, offset)
        extent.before = self._extents[self._offsets[place - 1]] if place else self._bottom
        extent.after = extent.before.after
        extent.before.after = extent.after.before = extent
        return extent

    def release(self, extent: Extent, now_s: float, why: str) -> None:
        """The extent's bytes become a gap, merged with its neighbours."""
        extent.life.to(ExtentState.FREE, now_s, why)
        extent.before.after, extent.after.before = extent.after, extent.before
        self.releases += 1
        del self._extents[extent.offset]
        del self._offsets[bisect_left(self._offsets, extent.offset)]
        start, end = extent.offset, extent.end
        i = bisect_left(self._gap_offsets, start)
        if i < len(self._gap_offsets) and self._gap_offsets[i] == end:
            end += self._drop_gap(end)
        if i > 0:
            before = self._gap_offsets[i - 1]
            if before + self._gaps[before] == start:
                self._drop_gap(before)
                start = before
        self._add_gap(start, end - start)

    def begin_slide(self, extent: Extent, now_s: float) -> None:
        """Start moving a READY extent down: it takes the gap before it, which must be there, into possession.

        Until `end_slide` it owns its old and its new place. It gets a new generation.
        """
        extent.life.to(ExtentState.MOVING, now_s, "moving down")
        offset = self._gap_before(extent)
        assert offset is not None
        del self._extents[extent.offset]
        del self._offsets[bisect_left(self._offsets, extent.offset)]
        extent.size_bytes += self._drop_gap(offset)
        extent.offset = offset
        self._generation += 1
        extent.generation = self._generation
        self._extents[offset] = extent
        insort(self._offsets, offset)

    def end_slide(self, extent: Extent, size_bytes: int, now_s: float) -> None:
        """The extent is READY at its new place and `size_bytes` long again; the rest is a gap."""
        extent.life.to(ExtentState.READY, now_s, "moved")
        self.releases += 1
        freed_bytes, extent.size_bytes = extent.size_bytes - size_bytes, size_bytes
        gap_bytes = freed_bytes
        if extent.end + freed_bytes in self._gaps:
            gap_bytes += self._drop_gap(extent.end + freed_bytes)
        self._add_gap(extent.end, gap_bytes)

    def next_slide(self, size_bytes: int, is_movable: Callable[[Extent], bool]) -> Extent | None:
        """The extent to move down next so that, move by move, a gap of `size_bytes` comes about.

        Of all runs of gaps and movable extents with gaps enough, the one with the fewest bytes to move; None
        when there is none. After each move its rest is the cheapest, so asking again finishes the same run.
        """
        need = self.rounded(size_bytes)
        best: tuple[int, Extent] | None = None
        pieces = list(self._pieces())
        for i, (_, size, extent) in enumerate(pieces):
            if extent is not None:
                continue
            gaps_bytes, moved_bytes, first = size, 0, None
            for _, size, extent in pieces[i + 1 :]:
                if gaps_bytes >= need or (extent is not None and not is_movable(extent)):
                    break
                if extent is None:
                    gaps_bytes += size
                else:
                    moved_bytes += size
                    first = first or extent
            if gaps_bytes >= need and first is not None and (best is None or moved_bytes < best[0]):
                best = (moved_bytes, first)
        return None if best is None else best[1]

    def _gap_before(self, extent: Extent) -> int | None:
        i = bisect_left(self._gap_offsets, extent.offset)
        if i == 0:
            return None
        offset = self._gap_offsets[i - 1]
        return offset if offset + self._gaps[offset] == extent.offset else None

    def would_fit(self, sizes_bytes: Iterable[int], kept: Callable[[Extent], bool]) -> bool:
        """Whether `allocate` would place all these, one after another, if only `kept` extents were left."""
        gaps, start = [], 0
        for extent in self:
            if kept(extent):
                gaps.append((extent.offset - start, start))
                start = extent.end
        gaps.append((self.size_bytes - start, start))
        for need in map(self.rounded, sizes_bytes):
            best = min((gap for gap in gaps if gap[0] >= need), default=None)
            if best is None:
                return False
            gaps.remove(best)
            gaps.append((best[0] - need, best[1] + need))
        return True

    # -- invariants ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Every byte has one owner, gaps are merged, leases and states agree."""
        assert self._offsets == sorted(self._extents)
        assert self._gap_offsets == sorted(self._gaps)
        assert self._gap_sizes == sorted((size, offset) for offset, size in self._gaps.items())
        pieces = [*((e.offset, e.size_bytes, e) for e in self), *((o, s, None) for o, s in self.gaps())]
        position, was_gap = 0, False
        for offset, size, extent in sorted(pieces, key=lambda piece: piece[0]):
            assert offset == position, f"hole or overlap at {position}, next piece at {offset}"
            assert size > 0 and size % self.align_bytes == 0
            assert not (extent is None and was_gap), f"unmerged gaps at {offset}"
            if extent is not None:
                assert (extent.leases > 0) == (extent.state is ExtentState.LEASED), extent
                assert extent.state is not ExtentState.FREE, extent
            position, was_gap = offset + size, extent is None
        assert position == self.size_bytes, f"{self.size_bytes - position} bytes unaccounted for"
        chain = [self._bottom, *self, self._top]
        assert all(one.after is other and other.before is one for one, other in pairwise(chain))

    # -- inside -------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[int, int, Extent | None]]:
        """Extents and gaps together, by offset: where one ends, the next begins."""
        offset = 0
        while offset < self.size_bytes:
            extent = self._extents.get(offset)
            size = extent.size_bytes if extent is not None else self._gaps[offset]
            yield offset, size, extent
            offset += size

    def _add_gap(self, offset: int, size: int) -> None:
        self._gaps[offset] = size
        insort(self._gap_offsets, offset)
        insort(self._gap_sizes, (size, offset))

    def _drop_gap(self, offset: int) -> int:
        del self._gap_offsets[bisect_left(self._gap_offsets, offset)]
        size = self._gaps.pop(offset)
        del self._gap_sizes[bisect_left(self._gap_sizes, (size, offset))]
        return size
