"""Room where there seems to be none: what pins leave between them, and how ready extents are moved."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from core_kit import QUIET, ScriptedLoaders, World, busy_world, loading, model, on_stage
from core_ledger import PAGE
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.extents import ArenaMap
from understudyd.core.policy import PolicySettings
from understudyd.core.states import ExtentState
from understudyd.core.types import ErrorCode, Outcome


def places(world: World) -> list[tuple[str, int]]:
    return [(held.blob, held.start // PAGE) for held in world.ledger.held]


def pinned_in_the_middle(*infos: object, pages: int = 8) -> World:
    """`pinned` holds pages 3 and 4; the rest is free."""
    world = busy_world(pages, model("filler", 3), model("pinned", 2), *infos)  # type: ignore[arg-type]
    for name in ("filler", "pinned"):
        world.tell(ev.LoadWanted(name))
        world.run()
    world.tell(ev.PinChanged("pinned", pinned=True))
    world.tell(ev.EvictWanted("filler"))
    assert places(world) == [("pinned.0", 3)]
    return world


def test_what_is_pinned_moves_out_of_the_way() -> None:
    with pinned_in_the_middle(model("a", 4), model("b", 2)) as world:
        large, small = world.ask("a"), world.ask("b")
        world.run()
        assert (world.answer(large), world.answer(small)) == (None, None)
        (move,) = world.of(ac.MoveExtent)
        assert (move.blob, move.offset, move.to_offset, move.size_bytes) == (
            "pinned.0",
            3 * PAGE,
            0,
            2 * PAGE,
        )
        drop = next(view for view in world.of(ac.DropViews) if view.blob == move.blob)
        build = next(view for view in world.of(ac.BuildViews) if view.generation == move.generation)
        assert drop.generation < move.generation and build.offset == 0


def test_a_pinned_model_runs_again_after_it_was_moved() -> None:
    with pinned_in_the_middle(model("a", 4)) as world:
        world.ask("a")
        world.run()
        again = world.ask("pinned")
        world.run()
        assert world.answer(again) is None and world.loaded.count("pinned.0") == 1


def test_no_more_is_evicted_than_must_be() -> None:
    """Free bytes suffice once they are in one place: who is resident stays so."""
    with pinned_in_the_middle(model("near", 1), model("a", 4), pages=8) as world:
        world.tell(ev.LoadWanted("near"))
        world.run()
        world.ask("a")
        world.run()
        assert {"pinned", "near", "a"} <= world.resident_models()


def test_a_failed_move_costs_a_load_and_nothing_else() -> None:
    world = pinned_in_the_middle(model("a", 4))
    world.stage = None
    request = world.ask("a")
    ((key, generation),) = world.ledger.moves
    world.tell(ev.MoveFailed(key, generation, "the copy went wrong"))
    assert world.answer(request) == "none yet"
    assert loading(world)[0] == "a"


def test_a_model_removed_while_it_moves_leaves_nothing() -> None:
    world = pinned_in_the_middle(model("a", 4))
    world.stage = None
    world.ask("a")
    ((key, generation),) = world.ledger.moves
    world.tell(ev.ModelRemoved("pinned"))
    world.tell(ev.ExtentMoved(key, generation))
    assert "pinned.0" not in world.machine.residency.blobs


def test_nothing_moves_while_it_is_leased() -> None:
    world = pinned_in_the_middle(model("a", 4))
    world.stage = None
    world.tell(ev.PinChanged("pinned", pinned=True))
    running = world.ask("pinned")
    world.tell(ev.RunStarted(running))
    world.ask("a")
    assert not world.ledger.moves
    for event in (ev.RunEnded(running, Outcome.FINISHED), ev.ImagesEncoded(running), ev.LeaseEnded(running)):
        world.tell(event)
    assert world.ledger.moves


def test_a_models_own_blobs_may_block_each_other_and_are_moved() -> None:
    """`a` needs 4 + 4 of 8 pages, but its first blob lands in the middle while others are leased."""
    infos = [model("left", 2), model("right", 2), model("a", 4, 4)]
    world = World(8, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    left = on_stage(world, "left")
    world.ask("a")
    world.tell(ev.LoadFinished(2))
    world.tell(ev.ViewsBuilt("a.0", 2))
    world.tell(ev.ModelPrepared("a"))
    assert places(world) == [("left.0", 0), ("a.0", 2)]
    for event in (ev.RunEnded(left, Outcome.FINISHED), ev.ImagesEncoded(left), ev.LeaseEnded(left)):
        world.tell(event)
    ((key, generation),) = world.ledger.moves
    world.tell(ev.ExtentMoved(key, generation))
    world.tell(ev.ViewsBuilt(*min(world.ledger.views)))
    assert loading(world) == ["a"] and world.loaded.count("a.0") == 1
    world.tell(ev.LoadFinished(min(world.ledger.loads)))
    world.tell(ev.ViewsBuilt(*min(world.ledger.views)))
    assert world.ledger.deck


def test_what_pins_keep_out_for_good_is_refused() -> None:
    with pinned_in_the_middle(model("a", 7), model("b", 2)) as world:
        hopeless, fine = world.ask("a"), world.ask("b")
        world.run()
        assert world.answer(hopeless) is ErrorCode.MODEL_TOO_LARGE
        assert world.answer(fine) is None


def test_pins_that_come_while_it_waits_may_make_it_hopeless() -> None:
    infos = [model("one", 4), model("two", 4), model("a", 6)]
    world = World(8, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    for name in ("one", "two"):
        world.make_resident(name)
    running = world.ask("one")
    world.tell(ev.RunStarted(running))
    waiting = world.ask("a")
    for name in ("one", "two"):
        world.tell(ev.PinChanged(name, pinned=True))
    for event in (ev.RunEnded(running, Outcome.FINISHED), ev.ImagesEncoded(running), ev.LeaseEnded(running)):
        world.tell(event)
    assert world.answer(waiting) is ErrorCode.MODEL_TOO_LARGE


# -- the map ------------------------------------------------------------------------------------------


def laid_out(*pages: int) -> ArenaMap:
    """Ready extents of so many pages; a negative number is a gap."""
    held = ArenaMap(sum(map(abs, pages)) * PAGE)
    extents = [held.allocate(abs(size) * PAGE, f"b{i}") for i, size in enumerate(pages)]
    for extent, size in zip(extents, pages, strict=True):
        assert extent is not None
        extent.life.to(ExtentState.READY, 0.0)
        if size < 0:
            held.release(extent, 0.0, "a gap")
    return held


def slide(held: ArenaMap, size_bytes: int) -> list[str]:
    """Moves, one by one, until there is such a gap; the blobs that were moved."""
    moved = []
    while held.largest_gap_bytes < size_bytes:
        extent = held.next_slide(size_bytes, lambda extent: extent.blob != "b0")
        if extent is None:
            return []
        size, before = extent.size_bytes, extent.offset
        held.begin_slide(extent, 0.0)
        held.check()
        assert extent.offset < before and extent.end == before + size
        held.end_slide(extent, size, 0.0)
        held.check()
        moved.append(extent.blob)
        assert len(moved) < 50, "no end"
    return moved


def test_the_fewest_bytes_are_moved() -> None:
    assert slide(laid_out(-2, 9, -2, 1, -2), 4 * PAGE) == ["b3"]
    assert slide(laid_out(-1, 3, -1, 2, -2, 5), 4 * PAGE) == ["b1", "b3"]
    assert slide(laid_out(1, -1, 2, 3, -2), 3 * PAGE) == ["b2", "b3"]


def test_what_may_not_move_bounds_a_run() -> None:
    held = laid_out(4, -2, 1, -1)
    assert slide(held, 3 * PAGE) == ["b2"]
    held = ArenaMap(5 * PAGE)
    gap, fixed = held.allocate(2 * PAGE, "gap"), held.allocate(PAGE, "b0")
    assert gap is not None and fixed is not None
    fixed.life.to(ExtentState.READY, 0.0)
    held.release(gap, 0.0, "a gap")
    assert slide(held, 3 * PAGE) == []


@given(st.lists(st.integers(-5, 5).filter(bool), min_size=1, max_size=12), st.integers(1, 30))
def test_moving_finds_a_gap_whenever_the_free_bytes_suffice(pages: list[int], wanted: int) -> None:
    held = laid_out(-1, *pages)
    enough = held.free_bytes >= wanted * PAGE
    content = [extent.blob for extent in held]
    slide(held, wanted * PAGE)
    assert (held.largest_gap_bytes >= wanted * PAGE) is enough
    assert [extent.blob for extent in held] == content


def test_only_ready_extents_start_to_move() -> None:
    held = laid_out(-1, 2)
    (extent,) = held
    extent.life.to(ExtentState.LEASED, 0.0)
    extent.leases = 1
    with pytest.raises(Exception, match="cannot become moving"):
        held.begin_slide(extent, 0.0)
    held.check()
    assert extent.offset == PAGE


def test_what_finds_no_room_beside_pinned_models_is_given_up() -> None:
    """Else what is likely were loaded into the room made for it, and evicted again, for ever."""
    models = [model("pinned", 5), model("wanted", 2, 4), model("likely", 1)]
    with busy_world(10, *models, policy=PolicySettings(), loaders=ScriptedLoaders(1)) as world:
        world.ask("likely")
        world.run()
        world.ask("pinned")
        world.run(for_s=6.0)
        assert world.machine.on_stage == "pinned"
        world.tell(ev.LoadWanted("wanted"))
        world.tell(ev.PinChanged("pinned", pinned=True))
        world.run(max_events=300)
        assert not world.machine.wanted and "pinned" in world.machine.residency.ready
