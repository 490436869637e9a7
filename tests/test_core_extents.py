"""The arena's map against brute force over every byte."""

from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from understudyd.core.extents import ArenaMap, Extent
from understudyd.core.states import ExtentState, IllegalEvent
from understudyd.core.windows import Window, cheapest_window

PAGE = 4096
MODEST = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def arena(pages: int) -> ArenaMap:
    return ArenaMap(pages * PAGE)


def filled(pages: int, *sizes: int) -> tuple[ArenaMap, list[Extent]]:
    """An arena with extents of so many pages one after another, the rest free."""
    held = arena(pages)
    extents = []
    for i, size in enumerate(sizes):
        extent = held.allocate(size * PAGE, f"blob{i}")
        assert extent is not None
        extents.append(extent)
    return held, extents


def release(held: ArenaMap, *extents: Extent) -> None:
    for extent in extents:
        held.release(extent, 0.0, "test")
        held.check()


def test_sizes_are_rounded_up_to_pages_and_the_arena_down() -> None:
    held = ArenaMap(3 * PAGE + 17)
    assert held.size_bytes == 3 * PAGE
    extent = held.allocate(PAGE + 1, "a")
    assert extent is not None and extent.size_bytes == 2 * PAGE
    empty = held.allocate(0, "b")
    assert empty is not None and empty.size_bytes == PAGE
    assert held.allocate(1, "c") is None
    held.check()


def test_an_arena_without_memory_holds_nothing() -> None:
    held = ArenaMap(100)
    held.check()
    assert held.allocate(1, "a") is None
    assert cheapest_window(held, 1, []) is None


def test_best_fit_takes_the_smallest_gap_that_fits() -> None:
    held, (a, _, c, _, e, _) = filled(12, 3, 1, 1, 1, 2, 1)
    release(held, a, c, e)
    assert [size // PAGE for _, size in held.gaps()] == [3, 1, 2, 3]
    for pages, offset in ((1, 4), (2, 6), (3, 0)):
        extent = held.allocate(pages * PAGE, "new")
        assert extent is not None and extent.offset == offset * PAGE
    held.check()


def test_gaps_coalesce_on_both_sides() -> None:
    held, (a, b, c, _) = filled(8, 2, 2, 2, 2)
    release(held, a, c)
    assert held.gaps() == [(0, 2 * PAGE), (4 * PAGE, 2 * PAGE)]
    release(held, b)
    assert held.gaps() == [(0, 6 * PAGE)]
    assert held.free_bytes == held.largest_gap_bytes == 6 * PAGE


def test_generations_never_come_again() -> None:
    held = arena(1)
    generations = []
    for _ in range(3):
        extent = held.allocate(PAGE, "a")
        assert extent is not None
        generations.append(extent.generation)
        release(held, extent)
    assert generations == sorted(set(generations))


def test_leased_extents_cannot_be_released() -> None:
    held, (a,) = filled(2, 1)
    a.life.to(ExtentState.READY, 0.0)
    a.life.to(ExtentState.LEASED, 0.0)
    a.leases = 1
    with pytest.raises(IllegalEvent, match="cannot become free"):
        held.release(a, 0.0, "greed")
    held.check()


def test_the_cheapest_window_joins_neighbours_and_gaps() -> None:
    held, extents = filled(8, 2, 2, 2, 2)
    release(held, extents[2])
    window = cheapest_window(held, 4 * PAGE, [(1.0, extents[0]), (2.0, extents[3]), (5.0, extents[1])])
    assert window == Window(4 * PAGE, 4 * PAGE, (extents[3],), (2.0,), 2.0)


def test_no_window_leads_over_what_must_stay() -> None:
    held, extents = filled(6, 2, 2, 2)
    prices = [(0.0, extents[0]), (0.0, extents[2])]
    assert cheapest_window(held, 4 * PAGE, prices) is None
    window = cheapest_window(held, 2 * PAGE, prices)
    assert window is not None and extents[1] not in window.victims


@st.composite
def arenas(draw: st.DrawFn) -> tuple[ArenaMap, list[Extent]]:
    """An arena after a life of allocations and releases."""
    held, live = arena(draw(st.integers(1, 24))), []
    for pages, victim in draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30)), max_size=25)):
        extent = held.allocate(pages * PAGE, "x")
        if extent is not None:
            live.append(extent)
        if live and victim % 2:
            held.release(live.pop(victim % len(live)), 0.0, "test")
    held.check()
    return held, live


def pages_of(extent: Extent) -> set[int]:
    return set(range(extent.offset // PAGE, extent.end // PAGE))


@MODEST
@given(arenas(), st.integers(1, 8))
def test_allocation_agrees_with_a_map_of_single_pages(
    made: tuple[ArenaMap, list[Extent]], pages: int
) -> None:
    held, live = made
    taken = set().union(*(pages_of(e) for e in live))
    assert sum(len(pages_of(e)) for e in live) == len(taken), "live extents overlap"
    total = held.size_bytes // PAGE
    runs, start = [], 0
    for page in [*sorted(taken), total]:
        runs.append((page - start, start))
        start = page + 1
    fitting = [run for run in runs if run[0] >= pages]
    extent = held.allocate(pages * PAGE, "new")
    if not fitting:
        assert extent is None
    else:
        assert extent is not None and extent.offset // PAGE == min(fitting)[1]
    assert held.free_bytes // PAGE == total - len(taken) - (pages if extent is not None else 0)
    held.check()


@MODEST
@given(arenas(), st.integers(1, 10), st.data())
def test_the_cheapest_window_is_the_cheapest_of_all(
    made: tuple[ArenaMap, list[Extent]], pages: int, data: st.DataObject
) -> None:
    held, live = made
    price = {id(e): data.draw(st.sampled_from([None, 0.0, 0.25, 1.0, 1e6, 3e6])) for e in live}
    if held.largest_gap_bytes >= pages * PAGE:
        return  # nothing need be cleared, and nobody asks
    priced = [(p, e) for e in live if (p := price[id(e)]) is not None]
    window = cheapest_window(held, pages * PAGE, sorted(priced, key=lambda found: found[0]))
    best = None
    for start in range(held.size_bytes // PAGE - pages + 1):
        hit = [e for e in live if pages_of(e) & set(range(start, start + pages))]
        costs = [price[id(e)] for e in hit]
        if None not in costs:
            cost = sum(c for c in costs if c is not None)
            best = cost if best is None else min(best, cost)
    if best is None:
        assert window is None
        return
    assert window is not None and window.cost == pytest.approx(best)
    assert sum(price[id(e)] or 0.0 for e in window.victims) == pytest.approx(best)
    release(held, *window.victims)
    assert held.allocate(pages * PAGE, "new") is not None


@MODEST
@given(arenas(), st.lists(st.integers(1, 6), max_size=4), st.data())
def test_would_fit_predicts_what_allocate_does(
    made: tuple[ArenaMap, list[Extent]], sizes: list[int], data: st.DataObject
) -> None:
    held, live = made
    kept = {id(e) for e in live if data.draw(st.booleans())}
    predicted = held.would_fit([s * PAGE for s in sizes], lambda e: id(e) in kept)
    release(held, *(e for e in live if id(e) not in kept))
    assert predicted == all(held.allocate(s * PAGE, "new") is not None for s in sizes)
    held.check()


def test_check_sees_what_is_wrong() -> None:
    """The invariants are worth something only if they fail."""
    for one, other in combinations(range(3), 2):
        held, extents = filled(6, 2, 2, 2)
        extents[one].offset = extents[other].offset
        with pytest.raises(AssertionError):
            held.check()
