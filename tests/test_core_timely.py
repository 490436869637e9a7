"""The stage does not wait for a long load while a short one would do, nor shares what it waits for."""

import itertools

from core_kit import ScriptedLoaders, World, blob, busy_world, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.policy import PolicySettings

POLICY = PolicySettings(prefetch=False)


def loads_of(world: World) -> list[str]:
    return [load.blob for load in world.of(ac.StartLoad)]


def two_models(order: str = "resident_first", loaders: int = 1) -> World:
    """One loader at work on something else, so that both models wait when it is free."""
    models = [model("first", blob("long", 20)), model("second", blob("short", 2)), model("other", 1)]
    policy = PolicySettings(prefetch=False, order=order)  # type: ignore[arg-type]
    world = World(40, models=models, policy=policy)
    for loader_id in range(loaders):
        world.tell(ev.LoaderReady(loader_id))
    return world


def test_what_is_ready_soonest_comes_first_while_the_stage_is_idle() -> None:
    world = two_models()
    for name in ("other", "first", "second"):
        world.ask(name)
    assert loads_of(world) == ["other.0"]
    world.clock.now_s += 1.0
    world.tell(ev.LoadFinished(1))
    assert loads_of(world) == ["other.0", "short"]


def test_in_the_order_of_arrival_the_first_comes_first_all_the_same() -> None:
    world = two_models("fcfs")
    for name in ("other", "first", "second"):
        world.ask(name)
    world.clock.now_s += 1.0
    world.tell(ev.LoadFinished(1))
    assert loads_of(world) == ["other.0", "long"]


def test_what_the_stage_waits_for_has_no_company() -> None:
    world = two_models(loaders=2)
    world.ask("first")
    world.ask("second")
    assert loads_of(world) == ["long"]
    world.clock.now_s += 1.0
    world.tell(ev.LoadFinished(1))
    assert loads_of(world) == ["long", "short"]


def test_accepted_says_when_and_the_queue_adds_up() -> None:
    world = two_models()
    for _ in range(3):
        world.ask("first")
    waits = [accepted.estimated_wait_s for accepted in world.of(ac.AcceptRequest)]
    assert waits == sorted(waits) and waits[0] > 0.0
    views = snapshot.requests(world.machine, world.now_s)
    run_s = world.machine.outlook.estimates.run_s("first", 1.0)
    assert [b.starts_in_s - a.starts_in_s for a, b in itertools.pairwise(views)] == [run_s, run_s]


def crowd(seconds_per_page: float) -> World:
    """Four models lie in an arena for four; runs take 5 s, and a fifth takes two pages to load."""
    models = [model(name, 2) for name in ("a", "b", "c", "popular", "new")]
    world = busy_world(8, *models, policy=POLICY, loaders=ScriptedLoaders(seconds_per_page=seconds_per_page))
    for name in ("new", "a", "b", "c", "popular"):  # runs and loads teach it how long they take
        world.ask(name)
        world.run()
    assert world.resident_models() == {"a", "b", "c", "popular"}
    world.log.clear()
    return world


def begun_s(world: World, kind: type[ac.Action], name: str) -> float:
    return next(at_s for at_s, action in world.log if isinstance(action, kind) and name in str(action))


def test_what_is_popular_stays_until_the_turn_of_another_is_near() -> None:
    with crowd(seconds_per_page=0.5) as world:
        asked_s = world.now_s
        for name in ("a", "b", "c", "new"):
            world.ask(name)
        assert not world.loaded  # b and c are ready: 10 s of work, and 1 s is all it takes
        again = world.ask("popular", client="late")
        world.run()
        assert world.loaded == ["new.0"]
        assert asked_s + 5.0 <= begun_s(world, ac.StartLoad, "new") < asked_s + 15.0
        assert begun_s(world, ac.PutOnDeck, "'new'") <= asked_s + 15.0  # the stage does not wait for it
        assert world.answer(again) is None


def test_what_takes_long_is_loaded_at_once() -> None:
    with crowd(seconds_per_page=2.0) as world:
        for name in ("a", "b", "c", "new"):
            world.ask(name)
        assert world.loaded == ["new.0"]


def test_nothing_is_early_that_would_not_have_to_wait_anyway() -> None:
    """It is more urgent, or it presses, or it fits into free memory."""
    with crowd(seconds_per_page=0.5) as world:
        for name in ("a", "b", "c"):
            world.ask(name)
        world.ask("new", priority=1)
        assert world.loaded == ["new.0"]
    with crowd(seconds_per_page=0.5) as world:
        world.tell(ev.ModelRemoved("popular"))
        world.run()
        for name in ("a", "b", "c", "new"):
            world.ask(name)
        assert world.loaded == ["new.0"]


def test_a_run_that_goes_on_and_on_holds_nothing_up() -> None:
    """Only what waits behind it counts, since nothing happens while it runs."""
    with crowd(seconds_per_page=0.5) as world:
        world.ask("a", cost=1000.0)
        world.ask("new")
        assert world.loaded == ["new.0"]
