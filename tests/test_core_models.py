"""Models come, share, and go: nothing is dropped while it is used, nothing is kept when it is not."""

import pytest

from core_kit import ScriptedLoaders, World, blob, busy_world, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import snapshot
from understudyd.core.states import IllegalEvent
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, Outcome, Tier

A = model("a", 2)


def retired(world: World) -> list[str]:
    return [action.name for action in world.of(ac.RetireModel)]


def test_removing_an_idle_model_frees_its_memory_before_its_files_may_go() -> None:
    with busy_world(8, A) as world:
        world.ask("a")
        world.run()
        actions = world.tell(ev.ModelRemoved("a"))
        assert [type(a) for a in actions] == [ac.DropViews, ac.ForgetModel, ac.RetireModel]
        assert snapshot.arena(world.machine).free_bytes == snapshot.arena(world.machine).size_bytes


def test_removing_fails_who_waits_and_lets_finish_who_runs() -> None:
    with busy_world(8, A) as world:
        running, deck, waiting = (world.ask("a") for _ in range(3))
        world.run(for_s=4.0)
        world.tell(ev.ModelRemoved("a"))
        assert world.answer(waiting) is ErrorCode.MODEL_REMOVED
        assert world.answer(world.ask("a")) is ErrorCode.UNKNOWN_MODEL
        assert retired(world) == []
        world.run()
        assert world.answer(running) is world.answer(deck) is None
        assert retired(world) == ["a"]


def test_a_removed_model_is_retired_when_the_device_has_done_with_it_not_when_it_is_answered() -> None:
    world = World(8, models=[A])
    world.tell(ev.LoaderReady(1))
    world.make_resident("a")
    request = world.ask("a")
    world.tell(ev.RunStarted(request))
    world.tell(ev.ModelRemoved("a"))
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    world.tell(ev.ImagesEncoded(request))
    assert retired(world) == []
    world.tell(ev.LeaseEnded(request))
    assert retired(world) == ["a"]
    world.assert_back_to_baseline()


def test_a_model_removed_while_it_is_prepared_is_retired_afterwards() -> None:
    world = World(8, models=[A])
    request = world.ask("a")
    world.tell(ev.ModelRemoved("a"))
    assert world.answer(request) is ErrorCode.MODEL_REMOVED and retired(world) == []
    world.tell(ev.ModelPrepared("a"))
    assert retired(world) == ["a"]


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
def test_a_model_removed_while_it_loads_leaves_nothing(end: str) -> None:
    world = World(8, models=[A])
    world.tell(ev.LoaderReady(1))
    world.ask("a")
    world.tell(ev.ModelPrepared("a"))
    world.tell(ev.ModelRemoved("a"))
    assert world.of(ac.CancelLoad) == [ac.CancelLoad(1)] and retired(world) == ["a"]
    match end:
        case "finished":
            assert world.tell(ev.LoadFinished(1)) == []
        case "failed":
            world.tell(ev.LoadFailed(1, ErrorCode.LOAD_FAILED, "its file is gone"))
        case _:
            world.tell(ev.LoadCancelled(1))
    world.assert_back_to_baseline()
    assert world.machine.next_deadline_s(world.now_s) is None


@pytest.mark.parametrize("well", [True, False])
def test_a_model_removed_while_its_views_are_built_leaves_nothing(well: bool) -> None:
    world = World(8, models=[A])
    world.tell(ev.LoaderReady(1))
    world.ask("a")
    world.tell(ev.ModelPrepared("a"))
    world.tell(ev.LoadFinished(1))
    world.tell(ev.ModelRemoved("a"))
    event = ev.ViewsBuilt("a.0", 1) if well else ev.ViewsFailed("a.0", 1, "gone")
    assert world.tell(event) == [ac.DropViews("a.0", 1)]
    world.assert_back_to_baseline()
    assert world.machine.next_deadline_s(world.now_s) is None


def test_a_model_added_again_while_its_old_load_is_being_stopped_is_loaded_anew() -> None:
    with busy_world(8, A, loaders=ScriptedLoaders(count=1)) as world:
        world.ask("a")
        world.run(for_s=0.5)
        world.tell(ev.ModelRemoved("a"))
        world.tell(ev.ModelAdded(A))
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None
        assert world.loaded == ["a.0", "a.0"]


def test_a_model_added_again_is_new() -> None:
    with busy_world(8, A) as world:
        world.ask("a")
        world.run()
        world.tell(ev.ModelRemoved("a"))
        world.run()
        assert world.machine.on_stage is None
        with pytest.raises(KeyError):
            snapshot.model(world.machine, "a")
        world.tell(ev.ModelAdded(A))
        assert snapshot.model(world.machine, "a").tier is Tier.DISK
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None and len(world.of(ac.PrepareModel)) == 2


def test_a_retiring_model_cannot_be_added_removed_pinned_or_wanted() -> None:
    with busy_world(8, A) as world:
        world.ask("a")
        world.run(for_s=4.0)
        world.tell(ev.ModelRemoved("a"))
        for event in (
            ev.ModelAdded(A),
            ev.ModelRemoved("a"),
            ev.PinChanged("a", True),
            ev.LoadWanted("a"),
            ev.EvictWanted("a"),
        ):
            with pytest.raises(IllegalEvent):
                world.machine.handle(event, world.now_s)


def test_a_shared_blob_stays_while_one_of_its_models_stays() -> None:
    vae = blob("vae", 2)
    with busy_world(8, model("a", vae, 1), model("b", vae, 1)) as world:
        for name in "ab":
            world.ask(name)
        world.run()
        world.tell(ev.ModelRemoved("a"))
        assert sorted(world.ledger.resident()) == ["b.1", "vae"]
        world.tell(ev.ModelRemoved("b"))
        assert world.ledger.resident() == []


def test_a_model_may_use_one_blob_twice() -> None:
    """Two text encoders with the same bytes."""
    encoder = blob("encoder", 2)
    with busy_world(5, ModelInfo("a", (encoder, blob("unet", 2), encoder)), model("b", 3)) as world:
        requests = [world.ask(name) for name in "aba"]
        world.run()
        assert {world.answer(r) for r in requests} == {None}
        assert sorted(world.loaded)[:3] == ["b.0", "encoder", "unet"]


def test_a_component_without_weights_takes_a_page_and_no_more() -> None:
    empty = BlobInfo("empty", 0)
    with busy_world(3, ModelInfo("a", (empty, blob("unet", 2)))) as world:
        request = world.ask("a")
        world.run()
        assert world.answer(request) is None
        assert snapshot.arena(world.machine).free_bytes == 0


def test_one_key_has_one_size() -> None:
    with busy_world(8, A) as world:
        other = ModelInfo("b", (BlobInfo("new", 1), BlobInfo("a.0", 1)))
        with pytest.raises(IllegalEvent, match="another size"):
            world.machine.handle(ev.ModelAdded(other), world.now_s)
        assert set(world.machine.residency.blobs) == {"a.0"}
