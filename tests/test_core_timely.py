"""The stage does not wait for a long load while a short one would do, nor shares what it waits for."""

import itertools

from core_kit import World, blob, model
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
