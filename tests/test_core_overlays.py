"""Overlays: made of what is resident, ahead of time, shared, evicted like anything else."""

from typing import Any

import pytest

from core_kit import (
    QUIET,
    ScriptedLoaders,
    ScriptedStage,
    World,
    blob,
    busy_world,
    derived,
    model,
    overlay,
)
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.policy import PolicySettings
from understudyd.core.states import BlobState, IllegalEvent
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, Tier

INK, WAX = blob("ink", 1), blob("wax", 1)
BASE = model("base", blob("text", 1), blob("unet", 4))
INKED = derived(BASE, INK, components=[1])
WAXED = derived(BASE, WAX, components=[1])
UNET_INK, UNET_WAX = INKED.blobs[-1].key, WAXED.blobs[-1].key


def by_hand(pages: int, *infos: ModelInfo, loaders: int = 1, **options: Any) -> World:
    world = World(pages, models=infos, policy=options.pop("policy", QUIET), **options)
    for loader_id in range(loaders):
        world.tell(ev.LoaderReady(loader_id))
    return world


def loaded(world: World, *keys: str) -> None:
    """The loads of these blobs, one after another."""
    for key in keys:
        (load,) = (load for load in world.ledger.loads.values() if load.blob == key)
        world.tell(ev.LoadFinished(load.load_id))
        world.tell(ev.ViewsBuilt(key, load.generation))


def state(world: World, key: str) -> BlobState:
    return world.machine.residency.blobs[key].state


def folding(world: World) -> str | None:
    fold = world.ledger.folds.under_way
    return None if fold is None else fold.overlay


def taken_out(world: World, key: str) -> None:
    """The blob is evicted, whoever decided it."""
    world.machine.residency.evict(world.machine.residency.blobs[key], world.now_s, "as told")
    world.machine._actions.clear()
    world.ledger.held = [held for held in world.ledger.held if held.blob != key]


def end_fold(world: World, event: type[ev.FoldFinished] | type[ev.FoldCancelled] = ev.FoldFinished) -> None:
    key = world.ledger.folds.key
    world.tell(event(*key))
    if event is ev.FoldFinished:
        world.tell(ev.ViewsBuilt(*key))


# -- making -------------------------------------------------------------------------------------------


def test_what_it_is_made_of_comes_first_and_the_fold_reads_it_where_it_lies() -> None:
    world = by_hand(20, BASE, INKED)
    request = world.ask(INKED.name)
    world.tell(ev.ModelPrepared(INKED.key))
    loaded(world, "text", "unet")
    assert not world.of(ac.Fold)
    loaded(world, "ink")
    (fold,) = world.of(ac.Fold)
    at = {extent.blob: extent.offset for extent in world.machine.residency.arena}
    assert fold.sources == (("unet", at["unet"]), ("ink", at["ink"])) and fold.offset == at[UNET_INK]
    assert not world.of(ac.PutOnDeck)
    end_fold(world)
    (deck,) = world.of(ac.PutOnDeck)
    assert (deck.request_id, deck.model) == (request, INKED.key)


def test_the_next_overlay_is_folded_while_a_request_runs() -> None:
    stage = ScriptedStage(run_s=5.0, fold_s=0.5)
    with busy_world(30, BASE, INKED, WAXED, stage=stage) as world:
        for name in [INKED.name, WAXED.name, BASE.name]:
            world.ask(name)
        world.run()
        folds = {fold.overlay: at for at, fold in world.log if isinstance(fold, ac.Fold)}
        decks = [at for at, deck in world.log if isinstance(deck, ac.PutOnDeck)]
        assert folds[UNET_WAX] < decks[1]
        assert decks[-1] - decks[0] <= 2 * 5.0  # the stage never waits for the second fold


def test_one_fold_at_a_time_in_the_order_of_the_queue() -> None:
    both = derived(BASE, INK, WAX, components=[0, 1])
    world = by_hand(30, BASE, both, loaders=3)
    world.ask(both.name)
    while world.ledger.loads:
        loaded(world, min(load.blob for load in world.ledger.loads.values()))
    first, second = (b.key for b in both.blobs[-2:])
    assert folding(world) == first
    end_fold(world)
    assert folding(world) == second
    end_fold(world)
    assert [fold.overlay for fold in world.of(ac.Fold)] == [first, second]


def test_folds_need_no_loader() -> None:
    world = by_hand(30, BASE, INKED, WAXED, loaders=2)
    world.make_resident(INKED.name)
    taken_out(world, UNET_INK)
    world.ask(WAXED.name)
    for loader_id in (0, 1):
        world.tell(ev.LoaderLost(loader_id, "killed"))
    world.ask(INKED.name)
    assert folding(world) == UNET_INK


def test_models_with_the_same_component_share_the_overlay() -> None:
    other = model("other", BASE.blobs[1], 2)
    others = derived(other, INK, components=[0])
    assert others.blobs[-1] == INKED.blobs[-1]
    with busy_world(30, BASE, other, INKED, others) as world:
        world.ask(INKED.name)
        world.ask(others.name)
        world.run()
        assert len(world.of(ac.Fold)) == 1 and world.loaded.count("ink") == 1


def test_the_base_serves_unchanged_beside_its_overlays() -> None:
    with busy_world(30, BASE, INKED, WAXED) as world:
        for name in [BASE.name, INKED.name, BASE.name, WAXED.name, BASE.name]:
            world.ask(name)
            world.run()
        assert world.loaded.count("unet") == 1 and not world.machine.residency.evictions


def test_likely_combinations_are_folded_ahead_into_free_memory() -> None:
    with busy_world(30, BASE, INKED, WAXED, policy=PolicySettings()) as world:
        for name in [INKED.name, WAXED.name, INKED.name]:
            world.ask(name)
        world.run()
        assert world.resident_models() >= {INKED.name, WAXED.name}
        folds = len(world.of(ac.Fold))
        taken_out(world, UNET_WAX)
        world.ask(INKED.name)
        world.run()
        assert len(world.of(ac.Fold)) == folds + 1 and world.resident_models() >= {WAXED.name}


# -- what does not go well ----------------------------------------------------------------------------


def test_an_overlay_that_cannot_be_made_is_refused_to_who_asks_for_it_and_to_nobody_else() -> None:
    stage = ScriptedStage(unfoldable={UNET_INK: ErrorCode.BAD_REQUEST})
    with busy_world(30, BASE, INKED, WAXED, stage=stage) as world:
        bad, good, plain = (world.ask(name) for name in (INKED.name, WAXED.name, BASE.name))
        world.run()
        assert world.answer(bad) is ErrorCode.BAD_REQUEST
        assert world.answer(good) is world.answer(plain) is None
        again = world.ask(INKED.name)
        assert world.answer(again) is ErrorCode.BAD_REQUEST
        assert "as told" in world.ledger.answers[again].message
        assert len([fold for fold in world.of(ac.Fold) if fold.overlay == UNET_INK]) == 1


def test_a_fold_that_fails_otherwise_is_tried_again_and_given_up() -> None:
    stage = ScriptedStage(unfoldable={UNET_INK: ErrorCode.OUT_OF_MEMORY})
    with busy_world(30, BASE, INKED, stage=stage) as world:
        request = world.ask(INKED.name)
        world.run()
        assert world.answer(request) is ErrorCode.OUT_OF_MEMORY
        assert len(world.of(ac.Fold)) == 3
        stage.unfoldable = {}
        again = world.ask(INKED.name)
        world.run()
        assert world.answer(again) is None


def test_a_damaged_adapter_fails_those_who_need_it() -> None:
    corrupt = [ErrorCode.MODEL_CORRUPT] * 2
    with busy_world(30, BASE, INKED, WAXED, loaders=ScriptedLoaders(faults={"ink": corrupt})) as world:
        bad, good = world.ask(INKED.name), world.ask(WAXED.name)
        world.run()
        assert world.answer(bad) is ErrorCode.MODEL_CORRUPT and world.answer(good) is None
        assert world.answer(world.ask(INKED.name)) is ErrorCode.MODEL_CORRUPT


def test_a_loader_that_dies_over_an_adapter_costs_a_second_load() -> None:
    with busy_world(30, BASE, INKED, loaders=ScriptedLoaders(faults={"ink": ["crash"]})) as world:
        request = world.ask(INKED.name)
        world.run()
        assert world.answer(request) is None and world.loaded.count("ink") == 2


def test_a_removed_model_takes_its_fold_along() -> None:
    world = by_hand(20, BASE, INKED, loaders=2)
    request = world.ask(INKED.name)
    world.tell(ev.ModelPrepared(INKED.key))
    while world.ledger.loads:
        loaded(world, min(load.blob for load in world.ledger.loads.values()))
    world.tell(ev.ModelRemoved(INKED.name))
    assert world.answer(request) is ErrorCode.MODEL_REMOVED
    (cancel,) = world.of(ac.CancelFold)
    assert (cancel.overlay, cancel.generation) == world.ledger.folds.key
    end_fold(world, ev.FoldCancelled)
    residency = world.machine.residency
    assert UNET_INK not in residency.blobs and "ink" not in residency.blobs
    assert {"text", "unet"} <= residency.blobs.keys()


def test_a_fold_that_has_ended_before_it_was_cancelled_leaves_nothing_either() -> None:
    world = by_hand(20, BASE, INKED, loaders=2)
    world.ask(INKED.name)
    world.tell(ev.ModelPrepared(INKED.key))
    while world.ledger.loads:
        loaded(world, min(load.blob for load in world.ledger.loads.values()))
    world.tell(ev.ModelRemoved(INKED.name))
    world.tell(ev.FoldFinished(*world.ledger.folds.key))
    assert not world.ledger.views and UNET_INK not in world.machine.residency.blobs


def test_nothing_that_a_fold_reads_is_evicted() -> None:
    world = by_hand(8, BASE, INKED, model("big", 8), loaders=2)
    world.ask(INKED.name)
    while world.ledger.loads:
        loaded(world, min(load.blob for load in world.ledger.loads.values()))
    assert folding(world) == UNET_INK
    world.tell(ev.EvictWanted(BASE.name))
    world.tell(ev.EvictWanted(INKED.name))
    assert not {"unet", "ink"} & set(world.ledger.evictions) and not world.of(ac.CancelFold)
    end_fold(world)


def test_a_needless_fold_makes_way_for_one_that_somebody_waits_for() -> None:
    world = by_hand(30, BASE, INKED, WAXED, loaders=2)
    world.make_resident(BASE.name)
    first = world.ask(INKED.name)
    loaded(world, "ink")
    assert folding(world) == UNET_INK
    world.ask(WAXED.name)
    loaded(world, "wax")
    assert not world.of(ac.CancelFold)
    world.tell(ev.RequestCancelled(first))
    assert world.ledger.folds.is_told_to_stop
    end_fold(world, ev.FoldCancelled)
    assert folding(world) == UNET_WAX


def test_events_about_folds_that_are_not_under_way_are_refused() -> None:
    world = by_hand(20, BASE, INKED)
    for event in (ev.FoldFinished(UNET_INK, 1), ev.FoldCancelled(UNET_INK, 1)):
        with pytest.raises(IllegalEvent, match="not being folded"):
            world.machine.handle(event, world.now_s)


def test_an_overlay_over_a_component_that_the_model_lacks_is_refused() -> None:
    stray = overlay(blob("somebody's", 4), INK)
    with pytest.raises(IllegalEvent, match="no component"):
        World(20, models=[BASE]).machine.handle(
            ev.ModelAdded(ModelInfo("stray", (*BASE.blobs, stray), is_derived=True)), 100.0
        )


def test_an_overlay_that_is_made_of_one_blob_twice_is_refused() -> None:
    twice = BlobInfo("twice", 4096, (BASE.blobs[1], INK, INK))
    with pytest.raises(IllegalEvent, match="twice"):
        World(20, models=[BASE]).machine.handle(
            ev.ModelAdded(ModelInfo("base+", (*BASE.blobs, twice), is_derived=True)), 100.0
        )


# -- what leaves --------------------------------------------------------------------------------------


def test_an_adapter_goes_before_anything_else_once_its_overlay_is_there() -> None:
    world = by_hand(8, BASE, INKED, model("small", 1), loaders=2)
    world.tell(ev.RequestCancelled(world.ask(INKED.name)))
    world.make_resident(INKED.name)  # 1 + 4 + 2, and the adapter's page
    assert state(world, "ink") is BlobState.RESIDENT
    world.make_resident("small")
    assert world.machine.residency.models[INKED.name].is_ready
    assert state(world, "ink") is BlobState.ABSENT


def test_an_overlay_goes_before_its_base_which_more_models_need() -> None:
    world = by_hand(11, BASE, INKED, WAXED, model("small", 2), loaders=2)
    for name in [INKED.name, BASE.name, WAXED.name]:
        world.tell(ev.RequestCancelled(world.ask(name)))
    world.make_resident(INKED.name)
    world.make_resident(WAXED.name)
    world.make_resident("small")
    assert state(world, "unet") is state(world, "text") is BlobState.RESIDENT
    assert BlobState.ABSENT in (state(world, UNET_INK), state(world, UNET_WAX))


def test_the_base_may_leave_and_its_overlay_stay() -> None:
    world = by_hand(20, BASE, INKED, loaders=2)
    world.make_resident(INKED.name)
    base = world.machine.residency.blobs["unet"]
    assert world.machine.residency.evictable(base.extent) is base
    taken_out(world, "unet")
    world.ask(INKED.name)
    loaded(world, "unet")
    assert world.machine.residency.models[INKED.name].is_ready and len(world.of(ac.Fold)) == 1


def test_a_pin_keeps_the_overlay_but_not_what_it_was_made_of() -> None:
    world = by_hand(20, BASE, INKED, loaders=2)
    world.tell(ev.PinChanged(INKED.name, True))
    world.make_resident(INKED.name)
    may_leave = world.machine.residency.evictables.may_leave
    blobs = world.machine.residency.blobs
    assert {key for key in blobs if may_leave(blobs[key])} == {"ink"}


def test_to_evict_a_derived_model_leaves_the_base_in_place() -> None:
    world = by_hand(20, BASE, INKED, loaders=2)
    world.make_resident(INKED.name)
    world.tell(ev.EvictWanted(INKED.name))
    resident = {b.key for b in world.machine.residency.blobs.values() if b.state is BlobState.RESIDENT}
    assert resident == {"text", "unet"}


# -- host memory --------------------------------------------------------------------------------------


def test_adapters_are_copied_to_the_host_pool_and_overlays_never() -> None:
    with busy_world(30, BASE, INKED, pool_pages=20) as world:
        world.ask(INKED.name)
        world.run()
        copies = {extent.blob for extent in world.machine.residency.copies.pool}
        assert copies == {"text", "unet", "ink"}


# -- what is told -------------------------------------------------------------------------------------


def test_tiers_say_what_is_still_to_be_done() -> None:
    world = by_hand(20, BASE, INKED, loaders=1)
    one = world.machine.residency.models[INKED.name]
    assert one.tier is Tier.DISK
    world.make_resident(BASE.name)
    assert one.tier is Tier.DISK
    world.ask(INKED.name)
    assert one.tier is Tier.LOADING
    loaded(world, "ink")
    end_fold(world)
    assert one.tier is Tier.RESIDENT
    world.tell(ev.RequestCancelled("r1"))
    taken_out(world, UNET_INK)
    assert one.tier is Tier.HOST
    taken_out(world, "ink")
    assert one.tier is Tier.DISK


def test_derived_models_have_a_list_of_their_own() -> None:
    world = by_hand(20, BASE, INKED, WAXED)
    world.ask(INKED.name)
    assert [view.name for view in snapshot.models(world.machine)] == ["base"]
    assert [view.name for view in snapshot.derived(world.machine)] == [INKED.name, WAXED.name]
    assert snapshot.model(world.machine, INKED.name).is_derived


# -- how many there are -------------------------------------------------------------------------------


def many(count: int) -> list[ModelInfo]:
    return [derived(BASE, BlobInfo(f"adapter{i}", 4096), components=[1]) for i in range(count)]


def test_of_too_many_combinations_the_one_that_was_not_asked_for_the_longest_is_forgotten() -> None:
    first, second, third, fourth = many(4)
    world = by_hand(30, BASE, first, second, max_derived=2)
    world.tell(ev.RequestCancelled(world.ask(first.name)))
    world.tell(ev.ModelPrepared(first.key))
    actions = world.tell(ev.ModelAdded(third))
    assert ac.RetireModel(second.name) in actions
    waiting = world.ask(first.name)
    actions = world.tell(ev.ModelAdded(fourth))
    assert ac.RetireModel(third.name) in actions and world.answer(waiting) == "none yet"


def test_a_combination_in_use_is_not_forgotten() -> None:
    first, second, third, fourth = many(4)
    world = by_hand(30, BASE, first, max_derived=1)
    world.ask(first.name)
    world.tell(ev.ModelAdded(second))
    world.tell(ev.PinChanged(second.name, True))
    for info in (third, fourth):
        world.tell(ev.ModelAdded(info))
    assert list(world.machine.catalogue.derived) == [first.name, second.name, fourth.name]
