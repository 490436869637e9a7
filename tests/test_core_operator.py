"""What an operator wants, what models share, and what lies in the way."""

import re

from core_kit import (
    ScriptedLoaders,
    ScriptedStage,
    blob,
    busy_world,
    by_hand,
    model,
)
from understudyd.core import events as ev
from understudyd.core.policy import PolicySettings
from understudyd.core.types import ErrorCode

# -- what an operator wants ---------------------------------------------------------------------------


def test_wanted_models_load_after_the_queue_and_are_ticked_off() -> None:
    with busy_world(20, *(model(n, 2) for n in "abc"), loaders=ScriptedLoaders(count=1)) as world:
        world.ask("a")
        world.tell(ev.LoadWanted("c"))
        world.ask("b")
        assert list(world.machine.wanted) == ["c"]
        world.run()
        assert world.loaded == ["a.0", "b.0", "c.0"] and not world.machine.wanted


def test_a_wish_that_cannot_be_granted_is_given_up() -> None:
    with busy_world(4, model("a", 3), model("b", 2), model("c", 9)) as world:
        world.tell(ev.LoadWanted("c"))
        assert not world.machine.wanted
        world.tell(ev.PinChanged("a", pinned=True))
        world.run()
        world.tell(ev.LoadWanted("b"))  # no room beside what is pinned
        world.run()
        assert not world.machine.wanted and world.resident_models() == {"a"}


def test_two_wishes_that_do_not_fit_together_are_granted_one_after_the_other() -> None:
    """Found by hypothesis: the second one's loads took the first one's memory, and so on for ever."""
    infos = [model("a", 5, 2, 5), model("b", 3, 3, 5)]
    with busy_world(13, *infos, loaders=ScriptedLoaders(count=1)) as world:
        for name in "ab":
            world.tell(ev.LoadWanted(name))
        world.run(max_events=100)
        assert world.resident_models() == {"b"} and not world.machine.wanted


def test_pinned_models_are_loaded_when_there_is_room_and_never_evicted() -> None:
    stage = ScriptedStage(run_s=0.1)
    with busy_world(4, *(model(n, 2) for n in "abc"), stage=stage) as world:
        world.tell(ev.PinChanged("a", pinned=True))
        world.run()
        assert world.resident_models() == {"a"}
        for name in "bcbc":
            world.ask(name)
            world.run()
        assert "a.0" not in world.ledger.evictions
        world.tell(ev.PinChanged("a", pinned=False))
        world.ask("b")
        world.ask("c")
        world.run()
        assert "a.0" in world.ledger.evictions


def test_pins_that_fill_the_arena_leave_a_clear_refusal() -> None:
    with busy_world(4, *(model(n, 2) for n in "abc")) as world:
        waiting = world.ask("c", id="early")
        for name in "ab":
            world.tell(ev.PinChanged(name, pinned=True))
        world.run()
        assert world.answer(waiting) is None  # it was accepted and had room still
        refused = world.ask("c", id="late")
        assert world.answer(refused) is ErrorCode.MODEL_TOO_LARGE
        assert "unpin" in world.ledger.answers[refused].message


def test_a_refusal_gives_readable_sizes_and_speaks_of_pins_only_where_they_matter() -> None:
    with busy_world(4, *(model(n, 2) for n in "abc"), model("huge", 9)) as world:
        alone = world.ledger.answers[world.ask("huge")].message
        assert re.fullmatch(r"huge needs \d+\.\d MiB, the arena has \d+\.\d MiB; enlarge the arena", alone)
        for name in "ab":
            world.tell(ev.PinChanged(name, pinned=True))
        world.run()
        assert world.ledger.answers[world.ask("huge")].message == alone, "unpinning would not help"
        assert "unpin models or enlarge the arena" in world.ledger.answers[world.ask("c")].message


def test_what_an_operator_evicts_stays_out_until_somebody_asks() -> None:
    with busy_world(8, model("a", 2), policy=PolicySettings()) as world:
        world.ask("a")
        world.run()
        world.tell(ev.EvictWanted("a"))
        world.run()
        assert world.resident_models() == set()
        world.ask("a")
        world.run()
        assert world.resident_models() == {"a"}


def test_evicting_stops_a_load_that_nobody_waits_for() -> None:
    world = by_hand(8, ("a", 2))
    world.tell(ev.LoadWanted("a"))
    world.tell(ev.EvictWanted("a"))
    assert world.ledger.told_to_stop == {1}
    world.tell(ev.LoadCancelled(1))
    assert not world.ledger.loads and not world.ledger.held


def test_evicting_leaves_what_a_resident_model_shares() -> None:
    vae = blob("vae", 1)
    with busy_world(8, model("a", vae, 1), model("b", vae, 1)) as world:
        for name in "ab":
            world.tell(ev.LoadWanted(name))
        world.run()
        world.tell(ev.EvictWanted("a"))
        assert world.ledger.evictions == ["a.1"]
        world.tell(ev.EvictWanted("b"))
        assert sorted(world.ledger.evictions) == ["a.1", "b.1", "vae"]


# -- shared blobs -------------------------------------------------------------------------------------


def test_a_shared_blob_is_loaded_once_and_resident_once() -> None:
    vae = blob("vae", 3)
    with busy_world(6, *(model(n, vae, 1) for n in "abc")) as world:
        for name in "abc":
            world.ask(name)
        world.run()
        assert sorted(world.loaded) == ["a.1", "b.1", "c.1", "vae"]
        assert sorted(world.ledger.resident()) == ["a.1", "b.1", "c.1", "vae"]


def test_a_hundred_models_through_an_arena_for_three() -> None:
    """Every request is served, with bounded work, when everything must be loaded each time."""
    infos = [model(f"m{i}", 1 + i % 3, 1 + i % 2) for i in range(100)]
    loaders, stage = ScriptedLoaders(seconds_per_page=0.2), ScriptedStage(run_s=0.5)
    with busy_world(13, *infos, loaders=loaders, stage=stage, policy=PolicySettings()) as world:
        for i in range(150):
            world.ask(f"m{37 * i % 100}")
        world.run()
        assert {answer.code for answer in world.ledger.answers.values()} == {None}
