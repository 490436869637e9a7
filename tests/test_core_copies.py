"""The host tier in the core: which blobs keep a copy, where loads come from, and what rests when."""

import pytest

from core_kit import QUIET, ScriptedLoaders, World, blob, busy_world, model, on_stage
from core_ledger import PAGE
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.policy import PolicySettings
from understudyd.core.types import ErrorCode, Outcome, Tier


def tier(world: World, name: str) -> Tier:
    return snapshot.model(world.machine, name).tier


def sources(world: World) -> list[tuple[str, str]]:
    """Every load so far: which blob, and from where to where."""
    ways = {(True, True): "disk > arena + pool", (True, False): "disk > arena", (False, True): "disk > pool"}
    return [
        (
            load.blob,
            "pool > arena" if load.from_pool else ways[load.offset is not None, load.pool_offset is not None],
        )
        for load in world.of(ac.StartLoad)
    ]


def evicted(world: World, name: str) -> None:
    world.tell(ev.EvictWanted(name))
    world.run()


def test_a_load_leaves_a_copy_and_the_next_one_comes_from_there() -> None:
    with busy_world(4, model("a", 2), pool_pages=4) as world:
        world.ask("a")
        world.run()
        assert tier(world, "a") is Tier.BOUND
        evicted(world, "a")
        assert tier(world, "a") is Tier.HOST
        again = world.ask("a")
        world.run()
        assert world.answer(again) is None
        assert sources(world) == [("a.0", "disk > arena + pool"), ("a.0", "pool > arena")]
        view = snapshot.host_pool(world.machine)
        assert (view.copies, view.ready_bytes, view.in_use_bytes, view.free_bytes) == (
            1,
            2 * PAGE,
            0,
            2 * PAGE,
        )


def test_without_a_pool_nothing_changes() -> None:
    with busy_world(4, model("a", 2)) as world:
        world.ask("a")
        world.run()
        evicted(world, "a")
        assert tier(world, "a") is Tier.DISK and sources(world) == [("a.0", "disk > arena")]


def test_a_blob_too_large_for_the_pool_goes_straight_to_the_arena() -> None:
    with busy_world(8, model("a", 6), pool_pages=4) as world:
        world.ask("a")
        world.run()
        assert sources(world) == [("a.0", "disk > arena")]


def test_what_waits_without_room_is_fetched_meanwhile() -> None:
    """The arena is leased from end to end; what comes next is brought as far as the host pool."""
    world = World(4, pool_pages=8, models=[model("on", 4), model("next", 3)], policy=QUIET)
    world.tell(ev.LoaderReady(1))
    running = on_stage(world, "on")
    world.ask("next")
    assert sources(world)[-1] == ("next.0", "disk > pool")
    world.tell(ev.LoadFinished(min(world.ledger.loads)))
    assert tier(world, "next") is Tier.HOST
    for event in (ev.RunEnded(running, Outcome.FINISHED), ev.ImagesEncoded(running), ev.LeaseEnded(running)):
        world.tell(event)
    assert sources(world)[-1] == ("next.0", "pool > arena")


def test_copies_that_somebody_waits_for_stay_the_others_give_way() -> None:
    infos = [model("on", 4), *(model(n, 3) for n in ("idle", "first", "second", "third"))]
    world = World(4, pool_pages=10, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    running = on_stage(world, "on")  # four pages of the pool hold its copy
    for name in ("first", "second", "third"):
        world.ask(name)
        while world.ledger.loads:
            world.tell(ev.LoadFinished(min(world.ledger.loads)))
    assert [tier(world, n) for n in ("first", "second", "third")] == [Tier.HOST] * 3
    assert snapshot.host_pool(world.machine).evictions == 1  # the copy of what is resident all the same
    assert running in world.ledger.running


def test_a_load_into_the_arena_takes_the_loader_from_a_fetch() -> None:
    infos = [model("on", 2), model("wide", 4), model("small", 1)]
    world = World(5, pool_pages=8, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    on_stage(world, "on")
    world.ask("wide")
    (fetch,) = world.ledger.loads.values()
    assert fetch.offset is None
    world.ask("small", priority=5)
    assert world.ledger.told_to_stop == {fetch.load_id}
    world.tell(ev.LoadCancelled(fetch.load_id))
    assert [load.blob for load in world.ledger.loads.values()] == ["small.0"]


def test_a_fetch_goes_on_while_there_is_no_room_anyway() -> None:
    infos = [model("on", 4), model("one", 4), model("two", 4)]
    world = World(4, pool_pages=8, models=infos, policy=QUIET)
    world.tell(ev.LoaderReady(1))
    on_stage(world, "on")
    for name in ("one", "two"):
        world.ask(name)
    world.tell(ev.Ticked())
    assert not world.ledger.told_to_stop and len(world.ledger.loads) == 1


def test_idle_loaders_fill_the_pool_with_what_is_likely_then_with_the_rest() -> None:
    infos = [model(n, 2) for n in ("stranger", "known", "on")]
    with busy_world(2, *infos, pool_pages=6, policy=PolicySettings()) as world:
        for name in ("known", "on"):
            world.ask(name)
            world.run()
        assert {tier(world, n) for n in ("stranger", "known")} == {Tier.HOST}
        assert snapshot.host_pool(world.machine).copies == 3
        assert ("stranger.0", "disk > pool") in sources(world)


def test_no_copy_is_replaced_by_a_mere_guess() -> None:
    infos = [model(n, 2) for n in ("a", "b", "c", "d")]
    with busy_world(2, *infos, pool_pages=4, policy=PolicySettings()) as world:
        world.ask("a")
        world.run()
        assert snapshot.host_pool(world.machine).evictions == 0


@pytest.mark.parametrize("code", [ErrorCode.LOAD_FAILED, "crash"])
def test_a_copy_that_fails_to_load_is_dropped_one_whose_reader_dies_is_not(code: ErrorCode | str) -> None:
    loaders = ScriptedLoaders(faults={"a.0": [None, code, None]})
    with busy_world(4, model("a", 2), pool_pages=4, loaders=loaders) as world:
        world.ask("a")
        world.run()
        evicted(world, "a")
        again = world.ask("a")
        world.run()
        assert world.answer(again) is None
        last = "pool > arena" if code == "crash" else "disk > arena + pool"
        assert [way for _, way in sources(world)] == ["disk > arena + pool", "pool > arena", last]


def test_a_dead_loaders_copy_is_quarantined_until_it_is_reaped() -> None:
    world = World(4, pool_pages=4, models=[model("a", 2)], policy=QUIET)
    world.tell(ev.LoaderReady(1))
    world.ask("a")
    world.tell(ev.LoaderLost(1, "killed"))
    assert snapshot.host_pool(world.machine).quarantined_bytes == 2 * PAGE
    world.tell(ev.LoaderReaped(1))
    world.clock.now_s += 0.9
    world.tell(ev.Ticked())
    assert snapshot.host_pool(world.machine).quarantined_bytes == 2 * PAGE
    world.clock.now_s += 0.2
    world.tell(ev.Ticked())
    assert snapshot.host_pool(world.machine).free_bytes == 4 * PAGE


def test_a_shared_copy_stays_while_a_model_is_left_that_has_it() -> None:
    vae = blob("vae", 1)
    with busy_world(8, model("a", vae, 1), model("b", vae, 1), pool_pages=8) as world:
        for name in "ab":
            world.ask(name)
        world.run()
        world.tell(ev.ModelRemoved("a"))
        world.run()
        assert {extent.blob for extent in snapshot.pool_extents(world.machine)} == {"vae", "b.1", ""}


def test_what_can_be_reloaded_from_the_pool_is_evicted_sooner() -> None:
    infos = [model("bare", 3), model("copied", 2), model("new", 2)]
    with busy_world(8, *infos, pool_pages=2) as world:
        for name in ("bare", "copied"):
            world.ask(name)
            world.run()
        machine = world.machine
        candidates = machine.policy.candidates(machine.residency, machine.demand, "new", None)
        by_blob = {extent.blob: price for price, extent in candidates}
        assert machine.forecast.chance("copied") > machine.forecast.chance("bare")
        assert by_blob["copied.0"] < by_blob["bare.0"]


# -- what rests ---------------------------------------------------------------------------------------

CRITICAL = PolicySettings(prefetch=False, pause_priority=5)


def critical_world() -> World:
    infos = [model("on", 2), model("next", 2), model("urgent", 2)]
    world = World(8, models=infos, policy=CRITICAL)
    world.tell(ev.LoaderReady(1))
    world.make_resident("on")
    return world


def rests(world: World) -> list[bool]:
    return [action.is_paused for action in world.of(ac.PauseLoads)]


def test_loads_rest_while_a_critical_request_runs() -> None:
    world = critical_world()
    request = world.ask("on", priority=5)
    assert rests(world) == []
    world.tell(ev.RunStarted(request))
    assert rests(world) == [True]
    world.ask("next")
    assert len(world.ledger.loads) == 1  # it is in the loader's hands and waits there
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    assert rests(world) == [True, False]


def test_they_go_on_when_another_critical_request_needs_one() -> None:
    world = critical_world()
    request = world.ask("on", priority=5)
    world.tell(ev.RunStarted(request))
    urgent = world.ask("urgent", priority=7)
    assert rests(world) == [True, False]
    world.tell(ev.RequestCancelled(urgent))
    assert rests(world) == [True, False, True]


def test_ordinary_requests_pause_nothing() -> None:
    world = critical_world()
    world.tell(ev.RunStarted(world.ask("on", priority=4)))
    assert rests(world) == []
