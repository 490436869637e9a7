"""A model is replaced while it is used: what runs finishes on the old bytes, what waits gets the new ones."""

import pytest

from core_kit import QUIET, ScriptedLoaders, ScriptedStage, World, blob, busy_world, model, on_stage
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.policy import PolicySettings
from understudyd.core.states import IllegalEvent
from understudyd.core.types import ErrorCode, Outcome, Tier

A = model("a", 2)
A1 = model("a", 2, edition=1)
A2 = model("a", 2, edition=2)


def kinds(actions: list[ac.Action]) -> list[type]:
    return [type(action) for action in actions]


def by_hand(pages: int = 8, *more: ev.ModelAdded, policy: PolicySettings = QUIET) -> World:
    world = World(pages, models=[A], policy=policy)
    world.tell(ev.LoaderReady(1))
    for event in more:
        world.tell(event)
    return world


def test_an_idle_model_is_prepared_first_and_swapped_then() -> None:
    world = by_hand()
    world.make_resident("a")
    assert world.tell(ev.ModelReplaced(A1)) == [ac.PrepareModel("a@1")]
    assert world.machine.residency.models["a"].info == A, "the old one serves until the new one is prepared"
    actions = world.tell(ev.ModelPrepared("a@1"))
    assert actions[:1] == [ac.AdoptEdition("a", "a@1")]
    assert kinds(actions[1:]) == [ac.DropViews, ac.ForgetModel, ac.RetireEdition]
    assert snapshot.arena(world.machine).free_bytes == snapshot.arena(world.machine).size_bytes


def test_running_and_on_deck_finish_on_the_old_bytes_and_waiting_ones_get_the_new() -> None:
    with busy_world(8, A) as world:
        running, deck, waiting = (world.ask("a") for _ in range(3))
        world.run(for_s=4.0)
        assert set(world.ledger.leases) == {running, deck}
        world.tell(ev.ModelReplaced(A1))
        world.run()
        assert {world.answer(r) for r in (running, deck, waiting)} == {None}
        assert world.ran == ["a", "a", "a@1"]
        (retired,) = world.of(ac.RetireEdition)
        assert retired == ac.RetireEdition("a", "a"), "once, when its last lease has ended"


def test_requests_do_not_wait_for_the_new_ones_preparation() -> None:
    """The old edition goes on as long as the new one's tokenizers are built, however long that takes."""
    world = by_hand()
    first = on_stage(world, "a")
    world.tell(ev.ModelReplaced(A1))
    second = world.ask("a")
    assert world.ledger.deck == {second} and world.ran == ["a", "a"]
    world.tell(ev.RunEnded(first, Outcome.FINISHED))
    world.tell(ev.RunStarted(second))
    assert world.of(ac.AdoptEdition) == []
    third = world.ask("a")
    world.tell(ev.RunEnded(second, Outcome.FINISHED))
    assert world.ran == ["a", "a", "a"] and world.ledger.deck == {third}


def test_what_never_served_is_swapped_at_once() -> None:
    world = by_hand()
    request = world.ask("a")
    assert kinds(world.tell(ev.ModelReplaced(A1)))[:1] == [ac.AdoptEdition]
    assert world.ledger.preparing == {"a", "a@1"}, "the request waits for the new one"
    (cancelled,) = world.of(ac.CancelLoad)
    world.tell(ev.LoadCancelled(cancelled.load_id))
    assert world.loaded == ["a.0", "a@1.0"], "what nobody uses any more is not loaded to its end"
    assert kinds(world.tell(ev.ModelPrepared("a"))) == [ac.ForgetModel, ac.RetireEdition]
    world.tell(ev.ModelPrepared("a@1"))
    world.tell(ev.LoadFinished(2))
    world.tell(ev.ViewsBuilt("a@1.0", 2))
    assert world.ledger.deck == {request}


def test_shared_bytes_stay_where_they_are() -> None:
    vae = blob("vae", 2)
    with busy_world(8, model("a", vae, 2)) as world:
        world.ask("a")
        world.run()
        world.tell(ev.ModelReplaced(model("a", vae, 2, edition=1)))
        world.run()
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None
        assert world.loaded == ["vae", "a.1", "a@1.1"]


def test_the_same_bytes_again_load_nothing_and_forgive_everything() -> None:
    """This is how an operator repairs a model whose file was damaged."""
    loaders = ScriptedLoaders(faults={"a.0": [ErrorCode.MODEL_CORRUPT] * 2})
    with busy_world(8, A, loaders=loaders) as world:
        request = world.ask("a")
        world.run()
        assert world.answer(request) is ErrorCode.MODEL_CORRUPT
        world.tell(ev.ModelReplaced(model("a", *A.blobs, edition=1)))
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None
        loads = len(world.loaded)
        world.tell(ev.ModelReplaced(model("a", *A.blobs, edition=2)))
        world.run()
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None and len(world.loaded) == loads


def test_an_edition_that_cannot_be_prepared_changes_nothing() -> None:
    with busy_world(8, A, stage=ScriptedStage(broken=frozenset({"a@1"}))) as world:
        world.ask("a")
        world.run()
        world.tell(ev.ModelReplaced(A1))
        requests = [world.ask("a"), world.ask("a")]
        world.run()
        assert {world.answer(r) for r in requests} == {None}
        assert world.of(ac.RejectEdition) == [ac.RejectEdition("a", "a@1", "as told")]
        assert world.ran == ["a"] * 3 and world.loaded == ["a.0"]


def test_a_second_replacement_overtakes_the_first() -> None:
    world = by_hand()
    world.make_resident("a")
    world.tell(ev.ModelReplaced(A1))
    assert world.tell(ev.ModelReplaced(A2)) == [ac.PrepareModel("a@2")]
    assert kinds(world.tell(ev.ModelPrepared("a@2")))[0] is ac.AdoptEdition
    assert world.tell(ev.ModelPrepared("a@1")) == [ac.ForgetModel("a@1"), ac.RetireEdition("a", "a@1")]
    assert world.machine.residency.models["a"].info == A2


def test_pin_wish_and_history_stay_with_the_name() -> None:
    with busy_world(8, A, model("b", 2)) as world:
        world.tell(ev.PinChanged("a", True))
        for _ in range(3):
            world.ask("a")
        world.run()
        chance = snapshot.model(world.machine, "a").chance
        world.tell(ev.ModelReplaced(A1))
        world.run()
        view = snapshot.model(world.machine, "a")
        assert view.pinned and view.chance == pytest.approx(chance)
        assert view.tier is Tier.RESIDENT, "pinned: loaded without being asked for; and not what is bound"
        forecast = world.machine.forecast
        assert forecast.chance("a@1.0") == pytest.approx(chance) and forecast.chance("a.0") == 0.0
        world.tell(ev.LoadWanted("b"))
        world.run()
        world.tell(ev.PinChanged("a", False))


def test_a_wish_is_granted_with_the_new_bytes() -> None:
    with busy_world(8, A, loaders=ScriptedLoaders(count=1)) as world:
        world.tell(ev.LoadWanted("a"))
        world.tell(ev.ModelReplaced(A1))
        world.run()
        assert not world.machine.wanted and world.resident_models() == {"a"}
        assert world.ledger.resident() == ["a@1.0"]


def test_removed_with_a_successor_on_its_way() -> None:
    world = by_hand()
    request = on_stage(world, "a")
    world.tell(ev.ModelReplaced(A1))
    world.tell(ev.ModelRemoved("a"))
    assert world.answer(world.ask("a")) is ErrorCode.UNKNOWN_MODEL
    world.tell(ev.ModelPrepared("a@1"))
    assert world.of(ac.AdoptEdition) == [] and world.of(ac.RetireModel) == []
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    world.tell(ev.LeaseEnded(request))
    world.tell(ev.ImagesEncoded(request))
    assert world.of(ac.RetireModel) == [ac.RetireModel("a")]
    world.assert_back_to_baseline()


def test_removed_while_an_old_edition_still_runs() -> None:
    """The name is gone at once; the old edition's bytes only when the device has done with them."""
    world = by_hand()
    request = on_stage(world, "a")
    world.tell(ev.ModelReplaced(A1))
    world.tell(ev.ModelPrepared("a@1"))
    assert kinds(world.tell(ev.ModelRemoved("a")))[-1] is ac.RetireModel
    assert world.ledger.resident() == ["a.0"]
    world.tell(ev.ModelAdded(A2))
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    assert kinds(world.tell(ev.LeaseEnded(request))) == [ac.DropViews, ac.ForgetModel, ac.RetireEdition]


def test_the_stage_holds_nothing_of_the_new_one() -> None:
    """Until it has run, nobody is told that its weights are bound."""
    world = by_hand()
    request = on_stage(world, "a")
    world.tell(ev.ModelReplaced(A1))
    world.tell(ev.ModelPrepared("a@1"))
    assert world.machine.on_stage is None
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    world.tell(ev.LeaseEnded(request))
    assert world.machine.on_stage is None


def test_out_of_reach_fails_who_waits_and_is_tried_again_for_who_asks() -> None:
    """A store that is a mount may be away: no prefetching may wear itself out meanwhile."""
    world = by_hand(policy=PolicySettings(prefetch=True))
    request = world.ask("a")
    world.tell(ev.ModelPreparationFailed("a", "the mount is away", is_lasting=False))
    assert world.answer(request) is ErrorCode.LOAD_FAILED
    world.tell(ev.LoadFinished(1))
    world.tell(ev.Ticked())
    assert world.ledger.preparing == set()
    world.ask("a")
    assert world.ledger.preparing == {"a"}
    world.tell(ev.ModelPrepared("a"))
    assert not world.machine.residency.models["a"].was_out_of_reach


@pytest.mark.parametrize("event", [ev.ModelReplaced(A), ev.ModelReplaced(model("nobody", 1))])
def test_only_a_new_edition_of_a_known_model_replaces(event: ev.ModelReplaced) -> None:
    world = by_hand()
    with pytest.raises(IllegalEvent):
        world.machine.handle(event, world.now_s)


def test_a_smaller_edition_finds_room_that_the_larger_did_not() -> None:
    """Nothing that found no room before the swap is remembered after it."""
    with busy_world(8, model("a", 6), model("b", 6)) as world:
        world.ask("a")
        world.run(for_s=8.0)
        waiting = world.ask("b")
        world.run(for_s=0.5)
        assert world.loaded == ["a.0"]
        world.tell(ev.ModelReplaced(model("b", 2, edition=1)))
        world.run(for_s=0.2)
        assert world.loaded == ["a.0", "b@1.0"], "beside a, which still runs"
        world.run()
        assert world.answer(waiting) is None
