"""The host pool that outlives its daemon: what is written down, what the next machine believes of it."""

import pytest

from core_kit import QUIET, ScriptedLoaders, World, blob, busy_world, model
from core_ledger import PAGE
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.legacy import legacy
from understudyd.core.policy import PolicySettings
from understudyd.core.states import IllegalEvent
from understudyd.core.types import ErrorCode

INFOS = [model("a", 2), model("b", 2), model("c", 2)]


def loads(world: World) -> list[tuple[str, bool, bool]]:
    """Every load so far: its blob, whether it comes from the pool, whether it checks it."""
    return [(load.blob, load.from_pool, load.must_verify) for load in world.of(ac.StartLoad)]


def found_world(
    found: ev.CopiesFound, *, pages: int = 8, faults: dict[str, list[ErrorCode]] | None = None
) -> World:
    """A machine that is told of copies before it has a loader."""
    world = busy_world(pages, *INFOS, pool_pages=8, loaders=None)
    world.tell(found)
    world.loaders = ScriptedLoaders(faults=faults or {})
    world.loaders.start(world)
    return world


def test_a_life_s_copies_are_the_next_life_s() -> None:
    with busy_world(4, *INFOS, pool_pages=8) as first:
        for name in ("a", "b", "c"):
            first.ask(name)
        first.run()
        left = legacy(first.machine)
    assert {kept.blob for kept in left.copies} == {"a.0", "b.0", "c.0"}
    assert set(left.models) == {"b", "c"}, "what is in the arena"
    with found_world(left, pages=4) as second:
        second.run()
        assert loads(second) == [(f"{name}.0", True, True) for name in left.models], "in the order of value"
        assert second.resident_models() == {"b", "c"}
        answer = second.ask("a")
        second.run()
        assert second.answer(answer) is None
        assert loads(second)[-1] == ("a.0", True, True)


def test_a_copy_is_checked_once() -> None:
    with found_world(ev.CopiesFound((ev.KeptCopy("a.0", 0, 2 * PAGE),))) as world:
        for _ in range(2):
            world.ask("a")
            world.run()
            world.tell(ev.EvictWanted("a"))
        assert loads(world) == [("a.0", True, True), ("a.0", True, False)]


def test_a_copy_that_is_wrong_is_dropped_and_read_anew() -> None:
    found = ev.CopiesFound((ev.KeptCopy("a.0", 0, 2 * PAGE),))
    with found_world(found, faults={"a.0": [ErrorCode.LOAD_FAILED]}) as world:
        answer = world.ask("a")
        world.run()
        assert world.answer(answer) is None
        assert loads(world) == [("a.0", True, True), ("a.0", False, False)]


@pytest.mark.parametrize(
    "kept",
    [
        ev.KeptCopy("stranger", 0, 2 * PAGE),
        ev.KeptCopy("a.0", 0, PAGE),
        ev.KeptCopy("a.0", 7 * PAGE, 2 * PAGE),
        ev.KeptCopy("a.0", -PAGE, 2 * PAGE),
        ev.KeptCopy("a.0", 100, 2 * PAGE),
    ],
)
def test_nonsense_is_left_out(kept: ev.KeptCopy) -> None:
    with found_world(ev.CopiesFound((kept,), ("a",))) as world:
        assert world.machine.residency.copies.pool.free_bytes == 8 * PAGE
        world.run()
        assert loads(world) == [], "nothing is read from disk for what somebody once used"


def test_of_two_copies_in_one_place_the_first_stays() -> None:
    found = ev.CopiesFound((ev.KeptCopy("a.0", 0, 2 * PAGE), ev.KeptCopy("b.0", PAGE, 2 * PAGE)))
    with found_world(found) as world:
        assert [extent.blob for extent in world.machine.residency.copies.pool] == ["a.0"]


def test_no_more_comes_back_than_there_is_room_for() -> None:
    copies = tuple(ev.KeptCopy(f"{name}.0", i * 2 * PAGE, 2 * PAGE) for i, name in enumerate("abc"))
    with found_world(ev.CopiesFound(copies, ("c", "gone", "a", "b")), pages=5) as world:
        world.run()
        assert world.loaded == ["c.0", "a.0"]


def test_who_waits_is_written_down_first() -> None:
    vae = blob("vae", 1)
    infos = [model("on", vae, 1), model("idle", vae, 1), model("next", vae, 1)]
    world = World(4, pool_pages=8, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    world.make_resident("idle")
    world.make_resident("on")
    world.tell(ev.RunStarted(world.ask("on")))
    world.ask("next")
    assert legacy(world.machine).models == ("on", "next", "idle")
    kept = {copy.blob for copy in legacy(world.machine).copies}
    assert kept == {"vae", "idle.1", "on.1"}, "what is being filled is nothing yet"


def test_found_copies_come_first_or_not_at_all() -> None:
    with busy_world(4, *INFOS, pool_pages=8) as world:
        world.ask("a")
        world.run()
        with pytest.raises(IllegalEvent, match="in use"):
            world.machine.handle(ev.CopiesFound(()), world.now_s)


def test_an_operator_drops_the_cache() -> None:
    with busy_world(4, *INFOS, pool_pages=8) as world:
        for name in ("a", "b"):
            world.ask(name)
        world.run()
        assert len(legacy(world.machine).copies) == 2
        world.tell(ev.CopiesDropWanted())
        assert legacy(world.machine).copies == ()
        assert world.resident_models() == {"a", "b"}, "the arena is another matter"


def test_settings_change_at_once() -> None:
    policy = PolicySettings(lookahead=1, prefetch=False)
    infos = [model(name, 1) for name in ("on", "x", "y")]
    world = World(8, models=infos, policy=policy, max_waiting=2)
    for loader in (1, 2):
        world.tell(ev.LoaderReady(loader))
    world.make_resident("on")
    world.tell(ev.RunStarted(world.ask("on")))
    for name in ("x", "y"):
        world.ask(name)
    assert len(world.ledger.loads) == 1
    world.tell(ev.SettingsChanged(PolicySettings(lookahead=4, prefetch=False), max_waiting=1))
    assert len(world.ledger.loads) == 2
    assert world.answer(world.ask("on")) is ErrorCode.QUEUE_FULL


def test_who_is_cancelled_is_told_why() -> None:
    world = World(4, models=[model("a", 1)], policy=QUIET)
    request = world.ask("a")
    world.tell(ev.RequestCancelled(request, ErrorCode.DRAINING, "the daemon stops"))
    answer = world.ledger.answers[request]
    assert (answer.code, answer.message) == (ErrorCode.DRAINING, "the daemon stops")
