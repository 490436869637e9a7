"""What goes wrong with a load, a loader, views or parts, and what the machine does about it."""

import pytest

from core_kit import ScriptedLoaders, ScriptedStage, World, blob, busy_world, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.policy import PolicySettings
from understudyd.core.states import BlobState, IllegalEvent
from understudyd.core.types import ErrorCode, Outcome

A, B = model("a", 2), model("b", 2)
FAILED, CORRUPT = ErrorCode.LOAD_FAILED, ErrorCode.MODEL_CORRUPT


def starts_of(world: World, key: str) -> list[float]:
    return [at for at, action in world.log if isinstance(action, ac.StartLoad) and action.blob == key]


# -- loads that fail ----------------------------------------------------------------------------------


def test_a_failed_load_is_tried_again_after_growing_pauses() -> None:
    loaders = ScriptedLoaders(seconds={"a.0": 1.0}, faults={"a.0": [FAILED, FAILED]})
    with busy_world(8, A, loaders=loaders) as world:
        request = world.ask("a")
        world.run()
        first, second, third = starts_of(world, "a.0")
        assert (second - first, third - second) == (pytest.approx(1.1), pytest.approx(1.4))
        assert world.answer(request) is None


def test_after_three_failures_those_who_wait_are_told_and_the_next_one_gets_new_tries() -> None:
    loaders = ScriptedLoaders(faults={"a.0": [FAILED] * 3})
    with busy_world(8, A, B, loaders=loaders) as world:
        waiting, other = [world.ask("a"), world.ask("a")], world.ask("b")
        world.run(for_s=15.0)
        assert [world.answer(r) for r in waiting] == [FAILED, FAILED]
        assert "as told" in world.ledger.answers[waiting[0]].message
        assert world.answer(other) is None
        again = world.ask("a")
        assert len(starts_of(world, "a.0")) == 4  # at once: somebody asks
        world.run()
        assert world.answer(again) is None


def test_wrong_bytes_get_one_second_chance() -> None:
    with busy_world(8, A, loaders=ScriptedLoaders(faults={"a.0": [CORRUPT]})) as world:
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None


def test_a_lost_loader_is_not_held_against_the_bytes() -> None:
    loaders = ScriptedLoaders(faults={"a.0": ["crash", CORRUPT]})
    with busy_world(8, A, loaders=loaders) as world:
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None


def test_a_damaged_blob_is_left_alone_until_its_model_is_added_anew() -> None:
    vae = blob("vae", 1)
    loaders = ScriptedLoaders(faults={"vae": [CORRUPT, CORRUPT]})
    with busy_world(8, model("a", vae, 1), model("b", vae, 1), loaders=loaders) as world:
        requests = [world.ask("a"), world.ask("b")]
        world.run()
        assert [world.answer(r) for r in requests] == [CORRUPT, CORRUPT]
        assert world.answer(world.ask("b")) is CORRUPT
        assert len(starts_of(world, "vae")) == 2
        world.tell(ev.ModelRemoved("a"))
        assert world.answer(world.ask("b")) is CORRUPT  # its bytes are as wrong as before
        world.tell(ev.ModelAdded(model("a", vae, 1)))  # the store has written the blob again
        request = world.ask("b")
        world.run()
        assert world.answer(request) is None


def test_damaged_models_are_neither_prefetched_nor_loaded_for_a_pin_or_a_wish() -> None:
    loaders = ScriptedLoaders(faults={"a.0": [CORRUPT] * 9})
    with busy_world(8, A, loaders=loaders, policy=PolicySettings()) as world:
        world.ask("a")
        world.tell(ev.PinChanged("a", pinned=True))
        world.tell(ev.LoadWanted("a"))
        world.run()
        assert world.machine.residency.blobs["a.0"].state is BlobState.DAMAGED
        assert not world.machine.wanted
        world.tell(ev.LoadWanted("a"))
        world.run()
        assert not world.machine.wanted and len(starts_of(world, "a.0")) == 2


# -- loaders that die ---------------------------------------------------------------------------------


def test_a_lost_loaders_extent_is_quarantined_until_it_is_reaped_and_the_grace_is_over() -> None:
    world = World(2, models=[A], grace_s=3.0)
    world.tell(ev.LoaderReady(1))
    world.tell(ev.LoaderReady(2))
    world.ask("a")
    world.tell(ev.LoaderLost(1, "no heartbeat"))
    world.clock.now_s += 100.0
    world.tell(ev.Ticked())
    assert snapshot.arena(world.machine).quarantined_bytes == A.blobs[0].size_bytes
    assert not world.ledger.loads  # the other loader is idle, but there is no other room
    world.tell(ev.LoaderReaped(1))
    assert world.machine.next_deadline_s(world.now_s) == world.now_s + 3.0
    world.clock.now_s += 3.0
    assert [type(a) for a in world.tell(ev.Ticked())] == [ac.StartLoad]


def test_a_reaped_loader_ends_the_quarantine_of_its_own_extents_only() -> None:
    world = World(4, models=[A, B], grace_s=1.0)
    for loader_id in (1, 2):
        world.tell(ev.LoaderReady(loader_id))
    world.ask("a")
    world.ask("b")
    for loader_id in (1, 2):
        world.tell(ev.LoaderLost(loader_id, "killed"))
    world.tell(ev.LoaderReaped(2))
    world.clock.now_s += 10.0
    world.tell(ev.Ticked())
    assert [h.blob for h in world.ledger.held] == ["a.0"]


def test_the_load_of_a_lost_loader_goes_to_another() -> None:
    loaders = ScriptedLoaders(count=2, faults={"a.0": ["crash"]})
    with busy_world(8, A, loaders=loaders) as world:
        request = world.ask("a")
        world.run()
        first, second = world.of(ac.StartLoad)
        assert first.loader_id != second.loader_id and first.offset != second.offset
        assert world.answer(request) is None


def test_a_blob_that_kills_its_loaders_is_given_up_and_others_are_served() -> None:
    loaders = ScriptedLoaders(count=2, faults={"a.0": ["crash"] * 3})
    with busy_world(8, A, B, loaders=loaders) as world:
        killer, other = world.ask("a"), world.ask("b")
        world.run(for_s=60.0)
        assert world.answer(killer) is FAILED
        assert "signal 9" in world.ledger.answers[killer].message
        assert world.answer(other) is None


@pytest.mark.parametrize("why", ["pinned", "prefetched"])
def test_what_nobody_waits_for_does_not_wear_the_loaders_out(why: str) -> None:
    """A blob that kills loaders rests longer and longer: else it would kill one every second for ever."""
    loaders = ScriptedLoaders(faults={"a.0": ["crash"] * 1000})
    policy = PolicySettings(prefetch=why == "prefetched")
    world = busy_world(8, A, loaders=loaders, policy=policy)
    world.ask("a")
    if why == "pinned":
        world.tell(ev.PinChanged("a", pinned=True))
    world.run(for_s=3600.0)
    assert 6 <= len(starts_of(world, "a.0")) <= 3 * 8


def test_no_loader_for_a_while_then_one() -> None:
    world = busy_world(8, A, loaders=ScriptedLoaders(count=0))
    request = world.ask("a")
    world.run()
    assert world.answer(request) == "none yet"
    world.tell(ev.LoaderReady(5))
    world.finish()
    assert world.answer(request) is None


def test_a_loader_that_dies_before_it_was_ready_is_nothing_to_the_core() -> None:
    with busy_world(8, A) as world:
        assert world.tell(ev.LoaderLost(77, "exec failed")) == []
        assert world.tell(ev.LoaderReaped(77)) == []


def test_a_loader_cannot_be_reaped_before_it_is_lost_nor_be_ready_twice() -> None:
    with busy_world(8, A) as world:
        with pytest.raises(IllegalEvent, match="loader 0"):
            world.machine.handle(ev.LoaderReaped(0), world.now_s)
        with pytest.raises(IllegalEvent, match="loader 0 is known already"):
            world.machine.handle(ev.LoaderReady(0), world.now_s)


def test_a_load_whose_model_is_removed_meanwhile_ends_quietly_when_its_loader_dies() -> None:
    world = World(4, models=[A], grace_s=1.0)
    world.tell(ev.LoaderReady(1))
    world.tell(ev.LoadWanted("a"))
    world.tell(ev.ModelPrepared("a"))
    world.tell(ev.ModelRemoved("a"))
    assert world.ledger.told_to_stop == {1}
    world.tell(ev.LoaderLost(1, "killed"))
    world.tell(ev.LoaderReaped(1))
    world.clock.now_s += 1.0
    world.tell(ev.Ticked())
    world.assert_back_to_baseline()


# -- views, parts, runs -------------------------------------------------------------------------------


def test_views_that_cannot_be_built_count_as_a_failed_load() -> None:
    world = World(4, models=[A])
    world.tell(ev.LoaderReady(1))
    request = world.ask("a")
    for attempt in range(1, 4):
        world.tell(ev.LoadFinished(attempt))
        world.tell(ev.ViewsFailed("a.0", attempt, "a shape that does not fit"))
        world.clock.now_s += 1.0
        world.tell(ev.Ticked())
    assert world.answer(request) is FAILED
    assert len(world.of(ac.DropViews)) == 3 and not world.ledger.held


def test_parts_that_cannot_be_built_fail_the_model_for_good() -> None:
    stage = ScriptedStage(broken=frozenset("a"))
    with busy_world(8, A, B, stage=stage) as world:
        world.tell(ev.LoadWanted("a"))
        request, other = world.ask("a"), world.ask("b")
        world.run()
        assert world.answer(request) is ErrorCode.INTERNAL
        assert world.ledger.answers[request].message == "as told"
        assert not world.machine.wanted
        refused = world.ask("a")
        assert world.answer(refused) is ErrorCode.INTERNAL
        assert "as told" in world.ledger.answers[refused].message
        assert world.answer(other) is None


def test_a_failed_run_fails_its_request_alone() -> None:
    stage = ScriptedStage(faults={"r1": ErrorCode.OUT_OF_MEMORY})
    with busy_world(8, A, stage=stage) as world:
        unlucky, lucky = world.ask("a"), world.ask("a")
        world.run()
        assert world.answer(unlucky) is ErrorCode.OUT_OF_MEMORY
        assert world.answer(lucky) is None


def test_images_that_cannot_be_encoded_are_an_error_of_ours() -> None:
    world = World(4, models=[A])
    world.tell(ev.LoaderReady(1))
    world.make_resident("a")
    request = world.ask("a")
    world.tell(ev.RunStarted(request))
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    world.tell(ev.EncodingFailed(request, "no space"))
    assert world.answer(request) is ErrorCode.INTERNAL


def test_a_model_that_cannot_be_prepared_is_refused_with_the_reason_alone() -> None:
    world = World(8, models=[A])
    world.ask("a")
    world.tell(ev.ModelPreparationFailed("a", "no such class", is_lasting=True))
    refused = world.ledger.answers[world.ask("a")]
    assert (refused.code, refused.message) == (ErrorCode.INTERNAL, "a could not be prepared: no such class")


def test_an_illegal_event_tells_the_story() -> None:
    with busy_world(8, A) as world:
        request = world.ask("a")
        world.run(for_s=4.0)
        with pytest.raises(IllegalEvent, match=r"waiting@.*chosen.*on_deck.*running"):
            world.machine.handle(ev.ImagesEncoded(request), world.now_s)
