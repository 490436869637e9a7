"""Who runs next: on stage first, resident first, but nobody is overtaken for ever."""

import pytest

from core_kit import ScriptedLoaders, ScriptedStage, World, busy_world, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.policy import PolicySettings
from understudyd.core.states import RequestState
from understudyd.core.types import ErrorCode, Outcome, RequestInfo, Tier

A, B, C = model("a", 2), model("b", 2), model("c", 2)


def settled(world: World, *names: str) -> World:
    """The models are resident and nothing is under way."""
    for name in names:
        world.tell(ev.LoadWanted(name))
    world.run()
    assert world.resident_models() >= set(names)
    return world


def test_one_request_takes_the_whole_way() -> None:
    with busy_world(8, A) as world:
        request = world.ask("a")
        world.run()
        kinds = [type(action).__name__ for _, action in world.log]
        assert kinds == [
            "AcceptRequest", "PrepareModel", "StartLoad", "BuildViews", "PutOnDeck", "AnswerRequest",
        ]  # fmt: skip
        assert world.answer(request) is None


def test_the_model_on_stage_goes_on_while_somebody_asks_for_it() -> None:
    """a | b a b a becomes a b b a a: the deck is chosen early, then two switches instead of four."""
    with settled(busy_world(8, A, B), "a", "b") as world:
        world.ask("a")
        world.run(for_s=1.0)
        for name in ["b", "a", "b", "a"]:
            world.ask(name)
        world.run()
        assert world.ran == ["a", "b", "b", "a", "a"]


def test_resident_models_go_before_those_that_must_be_loaded() -> None:
    with settled(busy_world(8, A, B, C), "b") as world:
        slow, quick = world.ask("a"), world.ask("b")
        world.run()
        assert world.ran == ["b", "a"]
        assert world.ledger.accepted[slow].tier is Tier.DISK
        assert world.ledger.accepted[quick].tier is Tier.RESIDENT


def test_a_request_for_what_is_on_stage_is_told_so() -> None:
    with busy_world(8, A) as world:
        world.ask("a")
        world.run(for_s=4.0)
        assert world.machine.on_stage == "a"
        assert world.ledger.accepted[world.ask("a")].tier is Tier.BOUND


def test_fcfs_keeps_the_order_of_arrival() -> None:
    policy = PolicySettings(order="fcfs", prefetch=False)
    with settled(busy_world(8, A, B, C, policy=policy), "b") as world:
        for name in ["a", "b", "c", "b", "a"]:
            world.ask(name)
        world.run()
        assert world.ran == ["a", "b", "c", "b", "a"]


@pytest.mark.parametrize("max_skips", [0, 1, 3])
def test_a_request_is_overtaken_at_most_max_skips_times(max_skips: int) -> None:
    policy = PolicySettings(max_skips=max_skips, max_wait_s=1e6, prefetch=False)
    loaders = ScriptedLoaders(seconds={"a.0": 40.0})
    with settled(busy_world(8, A, B, policy=policy, loaders=loaders), "b") as world:
        late = world.ask("a")
        for _ in range(6):
            world.ask("b")
        world.run(for_s=60.0)
        assert world.ran.index("a") == max_skips
        world.run()
        assert world.answer(late) is None


def test_a_request_that_waited_max_wait_s_is_overtaken_no_more() -> None:
    policy = PolicySettings(max_wait_s=12.0, prefetch=False)
    loaders = ScriptedLoaders(seconds={"a.0": 40.0})
    with settled(busy_world(8, A, B, policy=policy, loaders=loaders), "b") as world:
        world.ask("a")
        for _ in range(6):
            world.ask("b")
        world.run()
        # runs take 5 s, and the deck is filled when the run before begins: at 0, 0, 5 and 10 s
        assert world.ran == ["b", "b", "b", "b", "a", "b", "b"]


def test_whoever_is_held_up_by_a_failed_load_may_be_overtaken_at_its_bound() -> None:
    """The documented exception; the next one at its bound is not overtaken in its shadow."""
    policy = PolicySettings(max_skips=0, prefetch=False)
    world = World(8, models=[A, B, C], policy=policy)
    world.tell(ev.LoaderReady(1))
    for name in ["b", "c"]:
        world.make_resident(name)
    held_up, bounded = world.ask("a", client="ann"), world.ask("b", client="bob")
    world.ask("c", client="cy", priority=9)
    assert not world.ledger.deck  # nobody overtakes `a`, whose load is under way
    world.tell(ev.LoadFailed(max(world.ledger.loads), ErrorCode.LOAD_FAILED, "disk asleep"))
    assert world.ledger.deck == {bounded}
    assert world.answer(held_up) == "none yet"


def test_without_any_loader_what_is_resident_goes_on() -> None:
    policy = PolicySettings(max_skips=0, prefetch=False)
    world = World(8, models=[A, B], policy=policy)
    world.tell(ev.LoaderReady(1))
    world.make_resident("b")
    world.ask("a")
    request = world.ask("b")
    assert not world.ledger.deck
    world.tell(ev.LoaderLost(1, "killed"))  # lost, not yet reaped: nothing can be done for `a`
    assert world.ledger.deck == {request}


def test_priority_goes_first_but_not_beyond_the_bound() -> None:
    policy = PolicySettings(max_skips=2, max_wait_s=1e6, prefetch=False)
    with settled(busy_world(8, A, B, policy=policy), "a", "b") as world:
        world.ask("a")
        humble = world.ask("a")
        proud = [world.ask("b", priority=5) for _ in range(4)]
        world.run()
        order = [action.request_id for action in world.of(ac.PutOnDeck)]
        assert order[0] == "r1"
        assert order.index(humble) <= 1 + 2
        assert order.index(proud[0]) < order.index(humble)


def test_priority_orders_requests_of_one_model_too() -> None:
    with settled(busy_world(8, A), "a") as world:
        world.ask("a")
        world.ask("a")
        plain, urgent = world.ask("a"), world.ask("a", priority=1)
        world.run()
        order = [action.request_id for action in world.of(ac.PutOnDeck)]
        assert order.index(urgent) < order.index(plain)


def test_the_next_one_is_on_deck_while_one_runs_and_that_is_final() -> None:
    with settled(busy_world(8, A, B), "a", "b") as world:
        world.ask("a")
        world.run(for_s=1.0)
        deck = world.ask("b")
        world.ask("a", priority=9)
        assert list(world.machine.on_deck) == [deck]


# -- refusals -----------------------------------------------------------------------------------------


def test_refusals_name_the_reason_and_are_not_accepted() -> None:
    with busy_world(4, A, model("huge", 5), max_waiting=1) as world:
        world.ask("a")  # waits for its load
        assert world.answer(world.ask("nobody")) is ErrorCode.UNKNOWN_MODEL
        assert world.answer(world.ask("a")) is ErrorCode.QUEUE_FULL
        world.run()
        assert world.answer(world.ask("huge")) is ErrorCode.MODEL_TOO_LARGE
        world.tell(ev.AdmissionChanged(is_open=False))
        assert world.answer(world.ask("a")) is ErrorCode.DRAINING
        world.tell(ev.AdmissionChanged(is_open=True))
        assert world.answer(world.ask("a")) == "none yet"
        assert set(world.ledger.accepted) == {"r1", "r6"}
        assert all(action.message for action in world.of(ac.AnswerRequest) if action.code is not None)


def test_draining_finishes_what_was_accepted() -> None:
    with busy_world(8, A) as world:
        request = world.ask("a")
        world.tell(ev.AdmissionChanged(is_open=False))
        world.run()
        assert world.answer(request) is None


# -- taking back --------------------------------------------------------------------------------------


def test_cancelling_a_waiting_request_answers_at_once() -> None:
    with busy_world(8, A) as world:
        request = world.ask("a")
        world.tell(ev.RequestCancelled(request))
        assert world.answer(request) is ErrorCode.CANCELLED
        assert world.tell(ev.RequestCancelled(request)) == []


def test_cancelling_on_deck_and_on_stage_ends_the_run_first() -> None:
    with settled(busy_world(8, A, B), "a", "b") as world:
        running, deck = world.ask("a"), world.ask("b")
        world.run(for_s=1.0)
        for request in (running, deck):
            assert world.tell(ev.RequestCancelled(request)) == [ac.CancelRun(request, ErrorCode.CANCELLED)]
            assert world.tell(ev.RequestCancelled(request)) == []
        world.run()
        assert world.answer(running) is world.answer(deck) is ErrorCode.CANCELLED


def test_a_run_that_finishes_in_spite_of_its_cancellation_is_answered_with_images() -> None:
    world = World(8, models=[A])
    world.tell(ev.LoaderReady(1))
    world.make_resident("a")
    request = world.ask("a")
    world.tell(ev.RunStarted(request))
    world.tell(ev.RequestCancelled(request))
    world.tell(ev.RunEnded(request, Outcome.FINISHED))
    assert world.tell(ev.RequestCancelled(request)) == []
    world.tell(ev.ImagesEncoded(request))
    assert world.answer(request) is None
    assert world.machine.queue.requests[request].state is RequestState.ANSWERED
    world.tell(ev.LeaseEnded(request))  # late: the device was still busy
    assert request not in world.machine.queue.requests


def test_a_client_that_is_gone_takes_all_its_requests_along() -> None:
    with settled(busy_world(8, A, B), "a", "b") as world:
        ours = [world.ask("a", client="gone") for _ in range(3)]
        other = world.ask("b", client="here")
        world.run(for_s=1.0)
        world.tell(ev.ClientGone("gone"))
        world.run()
        assert {world.answer(r) for r in ours} == {ErrorCode.CLIENT_GONE}
        assert world.answer(other) is None


# -- deadlines ----------------------------------------------------------------------------------------


def test_the_deadline_of_a_waiting_request_and_of_a_running_one() -> None:
    with settled(busy_world(8, A, B), "a") as world:
        running, waiting = world.ask("a", deadline_in_s=3.0), world.ask("b", deadline_in_s=1.0)
        assert world.machine.next_deadline_s(world.now_s) == world.now_s + 1.0
        world.run(for_s=2.0)
        assert world.answer(waiting) is ErrorCode.DEADLINE_EXCEEDED
        assert world.answer(running) == "none yet"
        world.run(for_s=1.5)
        assert world.answer(running) is ErrorCode.DEADLINE_EXCEEDED
        assert world.of(ac.CancelRun) == [ac.CancelRun(running, ErrorCode.DEADLINE_EXCEEDED)]
        for request_id, deadline in ((waiting, "1 s"), (running, "3 s")):
            message = world.ledger.answers[request_id].message
            assert f"the deadline of {deadline} has passed; allow more time" in message


def test_a_deadline_that_has_passed_on_arrival() -> None:
    with busy_world(8, A) as world:
        assert world.answer(world.ask("a", deadline_in_s=-1.0)) is ErrorCode.DEADLINE_EXCEEDED
        assert world.loaded == []


def test_what_came_due_stays_due_however_late_the_driver_asks() -> None:
    """A driver computes its timer after it has handled an event: time has passed meanwhile."""
    world = World(8, models=[A], policy=PolicySettings(max_wait_s=1e6))
    world.tell(ev.LoaderReady(1))
    world.ask("a")
    world.tell(ev.LoadFailed(1, ErrorCode.LOAD_FAILED, "disk asleep"))
    assert world.machine.next_deadline_s(world.now_s) == pytest.approx(world.now_s + 0.1)
    world.clock.now_s += 5.0
    assert world.machine.next_deadline_s(world.now_s) == world.now_s
    assert [type(a) for a in world.tell(ev.Ticked())] == [ac.StartLoad]
    assert world.machine.next_deadline_s(world.now_s) > world.now_s  # nothing is due any more


def test_nothing_to_wake_for_when_only_an_event_can_change_anything() -> None:
    world = World(8, models=[A], stage=ScriptedStage(), loaders=ScriptedLoaders())
    assert world.machine.next_deadline_s(world.now_s) is None
    world.ask("a")
    world.run()
    assert world.machine.next_deadline_s(world.now_s) is None


def test_time_alone_makes_a_request_pressing_and_the_machine_wakes_for_it() -> None:
    """`a` may not evict `b`, which is ready and so will run sooner; once `a` presses, it may."""
    policy = PolicySettings(max_wait_s=20.0)
    world = World(5, models=[model("on", 1), model("a", 4), model("b", 4)], policy=policy)
    world.tell(ev.LoaderReady(1))
    world.make_resident("on")
    world.tell(ev.RunStarted(world.ask("on")))  # it runs long
    world.make_resident("b")
    world.ask("on")  # on deck
    first = world.ask("b")
    world.ask("a")
    world.ask("b")
    world.tell(ev.RequestCancelled(first))
    assert not world.ledger.loads
    assert world.machine.next_deadline_s(world.now_s) == world.now_s + 10.0
    world.clock.now_s += 10.0
    world.tell(ev.Ticked())
    assert [load.blob for load in world.ledger.loads.values()] == ["a.0"]


def test_what_follows_from_several_events_is_looked_at_after_the_last() -> None:
    world = settled(busy_world(8, A), "a")  # from here on past its ledger
    machine = world.machine
    (accepted,) = machine.handle(
        ev.RequestReceived(RequestInfo("late", "me", "a")), world.now_s, may_wait=True
    )
    assert isinstance(accepted, ac.AcceptRequest) and machine.is_unsettled
    assert machine.next_deadline_s(world.now_s) == world.now_s
    (chosen,) = machine.handle(ev.Ticked(), world.now_s)
    assert isinstance(chosen, ac.PutOnDeck) and not machine.is_unsettled
    for event in (
        ev.RunStarted("late"),
        ev.RunEnded("late", Outcome.FINISHED),
        ev.LeaseEnded("late"),
    ):
        assert machine.handle(event, world.now_s, may_wait=True) == []
    (answer,) = machine.handle(ev.ImagesEncoded("late"), world.now_s, may_wait=True)
    assert answer == ac.AnswerRequest("late", None, "") and machine.is_unsettled
    machine.handle(ev.Ticked(), world.now_s)
    assert not machine.is_unsettled
