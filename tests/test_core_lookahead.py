"""While one request runs, the next ones' weights are on their way; and what has to go for them."""

import pytest

from core_kit import (
    QUIET,
    ScriptedLoaders,
    ScriptedStage,
    World,
    blob,
    busy_world,
    by_hand,
    loading,
    model,
    on_stage,
)
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.policy import PolicySettings
from understudyd.core.types import Outcome

# -- lookahead ----------------------------------------------------------------------------------------


def test_the_queue_is_loaded_in_its_order_while_a_request_runs() -> None:
    loaders = ScriptedLoaders(count=1)
    with busy_world(20, *(model(n, 2) for n in "abcde"), loaders=loaders) as world:
        for name in "abcde":
            world.ask(name)
        world.run()
        assert world.loaded == ["a.0", "b.0", "c.0", "d.0", "e.0"]
        starts = {load.blob: at for at, load in world.log if isinstance(load, ac.StartLoad)}
        decks = {deck.model: at for at, deck in world.log if isinstance(deck, ac.PutOnDeck)}
        assert starts["b.0"] < decks["b"] and starts["c.0"] < decks["b"]
        times = [at for at, deck in world.log if isinstance(deck, ac.PutOnDeck)]
        # a run takes 5 s and a load 2 s: after the first load the stage never waits
        assert times[-1] - times[0] <= 5.0 * 4


def test_lookahead_counts_models_that_are_not_ready() -> None:
    world = by_hand(
        20, *((n, 1) for n in "abcd"), policy=PolicySettings(lookahead=2, prefetch=False), loaders=4
    )
    on_stage(world, "a")
    world.ask("a")  # on deck
    for name in "bcd":
        world.ask(name)
    assert loading(world) == ["b", "c"]
    world.tell(ev.LoadFinished(min(world.ledger.loads)))
    world.tell(ev.ViewsBuilt(*min(world.ledger.views)))
    assert loading(world) == ["c"]  # `b` is not ready before its small parts are
    world.tell(ev.ModelPrepared("b"))
    assert loading(world) == ["c", "d"]


def test_small_parts_are_prepared_while_the_weights_load() -> None:
    world = by_hand(8, ("a", 2))
    world.ask("a")
    kinds = [type(action) for _, action in world.log]
    assert kinds == [ac.AcceptRequest, ac.PrepareModel, ac.StartLoad]


def test_on_demand_mode_loads_only_when_the_stage_is_free() -> None:
    policy = PolicySettings(order="fcfs", lookahead=0, prefetch=False)
    with busy_world(20, *(model(n, 2) for n in "abc"), policy=policy) as world:
        for name in "abc":
            world.ask(name)
        world.run()
        assert world.ran == ["a", "b", "c"]
        loads = [at for at, action in world.log if isinstance(action, ac.StartLoad)]
        decks = [at for at, action in world.log if isinstance(action, ac.PutOnDeck)]
        assert all(deck + 5.0 <= load for deck, load in zip(decks, loads[1:]))


# -- eviction -----------------------------------------------------------------------------------------


def arena_of_three(policy: PolicySettings) -> World:
    """`on` runs and is on deck; `a`, `b` and `c` are resident and fill the arena; no loader lives."""
    world = by_hand(7, ("on", 1), ("a", 2), ("b", 2), ("c", 2), ("d", 2), policy=policy)
    on_stage(world, "on")
    for name in "abc":
        world.make_resident(name)
    world.ask("on")
    world.tell(ev.LoaderLost(0, "killed"))
    world.tell(ev.LoaderReaped(0))
    return world


def test_room_is_taken_from_what_the_queue_needs_last() -> None:
    world = arena_of_three(PolicySettings(max_skips=0, prefetch=False))  # strictly by arrival
    for name in "adbc":
        world.ask(name)
    world.tell(ev.LoaderReady(1))
    assert world.ledger.evictions == ["c.0"] and loading(world) == ["d"]


def test_what_is_ready_is_expected_to_run_first_and_stays() -> None:
    world = arena_of_three(QUIET)
    for name in "adbc":
        world.ask(name)
    world.tell(ev.LoaderReady(1))
    assert world.ledger.evictions == [] and loading(world) == []


def test_nobody_evicts_what_an_earlier_request_needs() -> None:
    world = by_hand(5, ("on", 1), ("a", 2), ("b", 2), ("c", 2))
    on_stage(world, "on")
    world.make_resident("a")
    world.make_resident("b")
    world.ask("on")  # on deck
    for name in "abc":
        world.ask(name)
    assert not world.ledger.evictions and not world.ledger.loads
    (deck,) = world.machine.on_deck
    world.tell(ev.RunEnded("r1", Outcome.FINISHED))
    world.tell(ev.LeaseEnded("r1"))
    world.tell(ev.RunStarted(deck))  # `a` is on deck: leased; `b` is earlier than `c`
    assert not world.ledger.evictions


def test_who_presses_looks_for_room_again_when_another_becomes_ready() -> None:
    shared = blob("shared", 2)
    policy = PolicySettings(order="fcfs", prefetch=False)
    world = by_hand(3, ("on", 1), ("late", shared), ("first", 2), ("a", shared), policy=policy)
    on_stage(world, "on")
    world.make_resident("late")
    world.ask("a")
    world.ask("late")
    world.ask("first", priority=1)
    assert not world.ledger.evictions  # `late` would lose it, but `a`, who has parts to prepare, is sooner
    world.tell(ev.ModelPrepared("a"))
    assert world.ledger.evictions == ["shared"] and loading(world) == ["first"]


def test_without_a_queue_history_says_what_is_worth_least() -> None:
    stage = ScriptedStage(run_s=0.1)
    with busy_world(6, *(model(n, 2) for n in "abcd"), stage=stage) as world:
        for name in "aaaaabcbcaa":
            world.ask(name)
            world.run()
        world.ask("d")
        world.run()
        assert world.ledger.evictions == ["b.0"]  # rarer than `a`, longer ago than `c`


def test_a_blob_that_several_models_share_is_worth_what_they_are_worth_together() -> None:
    vae = blob("vae", 2)
    infos = [model("a", vae, 1), model("b", vae, 1), model("c", 2), model("d", 2)]
    with busy_world(6, *infos, stage=ScriptedStage(run_s=0.1)) as world:
        for name in "ccababc":  # c three times, a and b twice each
            world.ask(name)
            world.run()
        world.ask("d")
        world.run()
        assert "vae" not in world.ledger.evictions


def test_leased_blobs_stay_until_the_device_has_done_with_them() -> None:
    world = by_hand(2, ("a", 2), ("b", 2))
    request = on_stage(world, "a")
    world.ask("b")
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    world.tell(ev.ImagesEncoded(request))  # the answer is out, the device still reads
    assert not world.ledger.loads
    world.tell(ev.LeaseEnded(request))
    assert loading(world) == ["b"]


# -- prefetch -----------------------------------------------------------------------------------------


def arrived(world: World) -> None:
    """What is being loaded is resident."""
    world.tell(ev.LoadFinished(min(world.ledger.loads)))
    world.tell(ev.ViewsBuilt(*min(world.ledger.views)))


def serve(world: World, name: str) -> None:
    """A request for a model that is resident, from its receipt to its answer."""
    world.make_resident(name)
    request = world.ask(name)
    for event in (
        ev.RunStarted(request),
        ev.RunEnded(request, Outcome.FINISHED),
        ev.ImagesEncoded(request),
        ev.LeaseEnded(request),
    ):
        world.tell(event)


def test_prefetching_fills_free_memory_by_likelihood_and_evicts_nothing() -> None:
    world = by_hand(4, ("a", 2), ("b", 2), ("c", 2), policy=PolicySettings())
    for name in "abbc":
        serve(world, name)
    evicted = list(world.ledger.evictions)
    world.tell(ev.EvictWanted("c"))
    assert world.ledger.evictions == [*evicted, "c.0"]
    assert loading(world) == ["a"]  # `c` was sent away by an operator, `b` is there
    arrived(world)
    assert world.resident_models() == {"a", "b"} and not world.ledger.loads


def prefetching(world: World, name: str) -> None:
    """`name` is being prefetched: it was asked for once, and there is room and a loader."""
    world.tell(ev.RequestCancelled(world.ask(name)))
    assert loading(world)[-1] == name


@pytest.mark.parametrize("is_used", [True, False])
def test_a_guess_is_counted_once_when_it_is_used_or_leaves_in_vain(is_used: bool) -> None:
    world = by_hand(4, ("a", 2), ("b", 2), ("c", 2), policy=PolicySettings())
    residency = world.machine.residency
    for name in "abbc":
        serve(world, name)
    assert (residency.guesses_used, residency.guesses_wasted) == (0, 0), "all were asked for"
    world.tell(ev.EvictWanted("c"))
    assert loading(world) == ["a"], "it is likely now"
    arrived(world)
    if is_used:
        serve(world, "a")
        serve(world, "a")
    world.tell(ev.EvictWanted("a"))
    assert (residency.guesses_used, residency.guesses_wasted) == (int(is_used), int(not is_used))


def test_a_prefetch_is_cancelled_when_something_that_waits_finds_no_loader() -> None:
    world = by_hand(8, ("a", 2), ("b", 2), policy=PolicySettings())
    prefetching(world, "a")
    request = world.ask("b")
    assert world.ledger.told_to_stop == {1}
    world.tell(ev.LoadCancelled(1))
    assert loading(world) == ["b"] and world.answer(request) == "none yet"


def test_a_prefetch_is_cancelled_when_something_that_waits_finds_no_room() -> None:
    world = by_hand(3, ("a", 2), ("b", 2), policy=PolicySettings(), loaders=2)
    prefetching(world, "a")
    world.ask("b")
    assert world.ledger.told_to_stop == {1}
    world.tell(ev.LoadCancelled(1))
    assert loading(world) == ["b"]


def test_a_cancelled_load_that_finishes_anyway_is_used() -> None:
    world = by_hand(8, ("a", 2), ("b", 2), policy=PolicySettings())
    prefetching(world, "a")
    world.ask("b")
    world.tell(ev.LoadFinished(1))
    assert world.ledger.views.keys() == {("a.0", 1)}
    assert loading(world) == ["b"]


@pytest.mark.parametrize("event", [ev.LoadWanted("a"), ev.PinChanged("a", pinned=True)])
def test_what_an_operator_asked_for_is_not_cancelled_for_the_queue(event: ev.Event) -> None:
    """It is under way and will be done; cancelled, it would be begun again and again."""
    world = by_hand(8, ("a", 2), ("b", 2))
    world.tell(event)
    world.ask("b")
    assert loading(world) == ["a"] and not world.ledger.told_to_stop


def test_a_wish_that_is_dropped_makes_room_for_the_next_one_at_once() -> None:
    world = World(6, models=[model("on", 1), model("a", 3, 1), model("b", 4)], policy=QUIET)
    world.tell(ev.LoaderReady(0))
    on_stage(world, "on")
    for name in "ab":
        world.tell(ev.LoadWanted(name))
    for _ in range(2):
        world.tell(ev.LoadFinished(min(world.ledger.loads)))
        world.tell(ev.ViewsBuilt(*min(world.ledger.views)))
    assert not world.ledger.loads  # `b` is not to evict what was wanted before
    world.tell(ev.ModelPreparationFailed("a", "no tokenizer"))
    assert loading(world) == ["b"]


def test_a_load_that_somebody_waits_for_is_not_cancelled_for_another() -> None:
    world = by_hand(8, ("a", 2), ("b", 2), policy=PolicySettings(lookahead=1))
    world.ask("a")
    world.ask("b", priority=9)
    assert not world.ledger.told_to_stop
