"""Why the machine did it: each decision is there with its numbers, and none is made otherwise for it."""

from functools import partial
from typing import Any, TypeVar

import pytest

import core_kit
from core_kit import World, blob, busy_world, by_hand, derived, model, on_stage
from understudyd.core import events as ev
from understudyd.core.decisions import (
    Chosen,
    Decision,
    Evicted,
    Folding,
    FoundNoRoom,
    Loading,
    Refused,
    Stopped,
)
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings

_D = TypeVar("_D", bound=Decision)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine here keeps its decisions."""
    monkeypatch.setattr(core_kit, "Machine", partial(Machine, decisions=1000))


def made(world: World, kind: type[_D], name: str | None = None) -> list[_D]:
    assert world.machine.decisions is not None
    return [one for one in world.machine.decisions.last(1000, name) if isinstance(one, kind)]


def test_none_is_kept_unless_asked_for() -> None:
    assert Machine(1 << 20).decisions is None


def test_whoever_is_overtaken_is_told_by_what_and_how_often() -> None:
    world = by_hand(20, ("a", 5), ("b", 5))
    running = on_stage(world, "a")
    world.ask("b", client="patient")
    world.clock.now_s += 4.0
    chosen = world.ask("a", priority=2)
    (_, last) = made(world, Chosen)
    assert (last.request, last.models, last.was_on_stage, last.waited_s) == (chosen, ("a",), True, 0.0)
    assert (last.overtook, last.most_skips, last.longest_wait_s) == (1, 1, 4.0)
    settings = world.machine.policy.settings
    assert (last.max_skips, last.max_wait_s) == (settings.max_skips, settings.max_wait_s)
    assert made(world, Chosen, "b") == [] and running == made(world, Chosen)[0].request


def test_a_load_says_for_whom() -> None:
    world = by_hand(20, ("a", 5), ("b", 5), ("c", 5), loaders=3)
    world.tell(ev.LoadWanted("b"))
    world.tell(ev.PinChanged("c", True))
    world.ask("a")
    world.ask("a")
    assert [(x.models, x.why, x.waiting) for x in made(world, Loading)] == [
        (("b",), "wanted", 0), (("c",), "pinned", 0), (("a",), "awaited", 1),
    ]  # fmt: skip
    first = made(world, Loading, "a")[0]
    assert first.chance > 0.8 and first.size_bytes == 5 * core_kit.PAGE
    assert not first.is_from_host and not first.is_to_host


def test_an_eviction_has_its_price_and_every_victims_chance() -> None:
    world = by_hand(10, ("a", 4), ("b", 4), ("c", 8))
    for name in ("a", "b"):
        world.make_resident(name)
    for _ in range(3):
        forecast = world.machine.forecast
        forecast.saw("a", "a.0", now_s=world.now_s)
    world.ask("c")
    (evicted,) = made(world, Evicted)
    assert evicted.room_for == "c.0" and set(evicted.models) == {"a", "b"}
    by_blob = {victim.blob: victim for victim in evicted.victims}
    assert by_blob["a.0"].chance == world.machine.forecast.chance("a.0") > by_blob["b.0"].chance == 0.0
    assert evicted.price == pytest.approx(sum(victim.price or 0.0 for victim in evicted.victims))
    assert evicted in made(world, Evicted, "a") and evicted in made(world, Evicted, "b")
    loads = made(world, Loading, "c")
    assert [(load.blob, load.why) for load in loads] == [("c.0", "awaited")]


def test_what_is_needed_later_says_who_waits() -> None:
    """`c` came first and has waited for long; no loader was there for it."""
    world = by_hand(10, ("a", 5), ("b", 5), ("c", 5))
    on_stage(world, "a")
    world.make_resident("b")
    world.tell(ev.LoaderLost(0, "gone"))
    world.ask("c")
    world.ask("a")
    world.ask("b")
    world.clock.now_s += 20.0
    world.tell(ev.LoaderReady(1))
    (evicted,) = made(world, Evicted)
    assert [(victim.blob, victim.waiting) for victim in evicted.victims] == [("b.0", 1)]
    assert evicted.price is not None and evicted.price > 1.0


def test_an_operator_evicts() -> None:
    world = by_hand(10, ("a", 5))
    world.make_resident("a")
    world.tell(ev.EvictWanted("a"))
    (evicted,) = made(world, Evicted)
    assert (evicted.why, evicted.room_for, evicted.price) == ("operator", "", None)


def test_no_room_says_what_there_was() -> None:
    world = by_hand(10, ("a", 6), ("b", 6))
    on_stage(world, "a")
    world.ask("b")
    (none,) = made(world, FoundNoRoom)
    assert (none.models, none.size_bytes) == (("b",), 6 * core_kit.PAGE)
    assert none.free_bytes == none.largest_gap_bytes == 4 * core_kit.PAGE


def test_a_load_that_nobody_waits_for_is_stopped() -> None:
    world = by_hand(20, ("a", 5), ("b", 5))
    first = world.ask("a")
    world.tell(ev.RequestCancelled(first))
    world.ask("b")
    (stopped,) = made(world, Stopped)
    assert (stopped.models, stopped.waiting, stopped.is_to_host) == (("a",), 0, False)
    assert made(world, Refused) == [], "whoever took it back knows why there is no image"


def test_a_fold_says_what_it_is_made_of_and_a_needless_one_that_it_was_stopped() -> None:
    ink, wax, base = blob("ink", 1), blob("wax", 1), model("base", 4)
    inked, waxed = derived(base, ink), derived(base, wax)
    world = World(20, models=[base, inked, waxed], policy=core_kit.QUIET)
    world.tell(ev.LoaderReady(1))
    world.make_resident("base")
    first = world.ask(inked.name)
    for adapter in ("ink", "wax"):
        (load,) = world.ledger.loads.values()
        world.tell(ev.LoadFinished(load.load_id))
        world.tell(ev.ViewsBuilt(adapter, load.generation))
        if adapter == "ink":
            world.ask(waxed.name)
    (fold,) = made(world, Folding)
    assert (fold.models, fold.blob, fold.made_of) == ((inked.name,), inked.blobs[-1].key, ("base.0", "ink"))
    assert (fold.why, fold.waiting, fold.size_bytes) == ("awaited", 1, 2 * core_kit.PAGE)
    world.tell(ev.RequestCancelled(first))
    (stopped,) = made(world, Stopped)
    assert (stopped.blob, stopped.models, stopped.waiting) == (fold.blob, (inked.name,), 0)


def test_refusals() -> None:
    world = by_hand(10, ("a", 5), ("large", 11))
    world.ask("nobody")
    world.ask("large", client="ann")
    late = world.ask("a", deadline_in_s=2.0)
    world.clock.now_s += 3.0
    world.tell(ev.Ticked())
    told = made(world, Refused)
    assert [(x.models[0], x.code) for x in told] == [
        ("nobody", "unknown_model"), ("large", "model_too_large"), ("a", "deadline_exceeded"),
    ]  # fmt: skip
    assert (told[1].client, told[1].waited_s) == ("ann", None)
    assert (told[2].request, told[2].waited_s) == (late, 3.0)


def test_only_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_kit, "Machine", partial(Machine, decisions=3))
    world = by_hand(10)
    for i in range(5):
        world.ask("nobody", id=f"r{i}")
    assert [one.request for one in made(world, Refused)] == ["r2", "r3", "r4"]
    assert world.machine.decisions is not None
    assert len(world.machine.decisions.last(2)) == 2 and world.machine.decisions.last(2, "x") == []


def played(**options: Any) -> World:
    shared = blob("vae", 2)
    infos = [model(f"m{i}", shared, 3 + i % 4) for i in range(12)]
    policy = PolicySettings(max_wait_s=20.0, max_skips=5)
    with busy_world(24, *infos, policy=policy, pool_pages=40, **options) as world:
        for i in range(60):
            world.ask(f"m{i * i % 12}", client=f"c{i % 3}", priority=i % 5 // 4)
            world.run(for_s=1.5)
    return world


def test_keeping_them_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    explained = played()
    monkeypatch.setattr(core_kit, "Machine", Machine)
    assert played().log == explained.log
    assert {type(one) for one in made(explained, object)} >= {Chosen, Loading, Evicted}  # type: ignore[type-var]
    ran = [one.request for one in made(explained, Chosen)]
    assert [action.request_id for action in explained.of(core_kit.ac.PutOnDeck)] == ran
    assert len(made(explained, Loading)) == len(explained.loaded)
