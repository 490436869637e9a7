"""One run for several requests: who goes along, who does not, and that each keeps a life of its own."""

import pytest

from core_kit import ScriptedStage, World, busy_world, by_hand, model, on_stage
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.decisions import Chosen
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.core.states import IllegalEvent
from understudyd.core.types import ErrorCode, Outcome, RequestInfo

QUIET = PolicySettings(prefetch=False)


def behind_a_run(max_batch: int, policy: PolicySettings = QUIET, can_batch: bool = True) -> World:
    """`b` runs and is on deck; `a` is resident and allows batches."""
    world = World(8, models=[model("a", 2, max_batch=max_batch), model("b", 2)], policy=policy)
    world.tell(ev.LoaderReady(0))
    if not can_batch:
        world.tell(ev.LoadWanted("a"))
        world.tell(ev.ModelPrepared("a", can_batch=False))
    world.make_resident("a")
    on_stage(world, "b")
    world.ask("b")
    return world


def free_the_deck(world: World) -> list[list[str]]:
    """Everybody runs to the end; who shared a run, in order, from now on."""
    before = len(world.of(ac.PutOnDeck))
    while world.ledger.running or world.ledger.deck:
        for request_id in sorted(world.ledger.running):
            world.tell(ev.RunEnded(request_id, Outcome.FINISHED))
        for request_id in sorted(world.ledger.deck):
            world.tell(ev.RunStarted(request_id))
    return [[put.request_id, *put.companions] for put in world.of(ac.PutOnDeck)[before:]]


def test_without_being_asked_for_nobody_shares_a_run() -> None:
    world = behind_a_run(1)
    ids = [world.ask("a", batch_key="k") for _ in range(3)]
    assert free_the_deck(world) == [[i] for i in ids]


def test_those_that_are_alike_share_runs_in_their_order() -> None:
    world = behind_a_run(3)
    ids = [world.ask("a", batch_key="k") for _ in range(5)]
    assert free_the_deck(world) == [ids[:3], ids[3:]]


def test_another_key_priority_or_none_stays_apart() -> None:
    world = behind_a_run(8)
    first, other = world.ask("a", batch_key="k"), world.ask("a", batch_key="l")
    alone, urgent = world.ask("a"), world.ask("a", batch_key="k", priority=1)
    last, also_alone = world.ask("a", batch_key="k"), world.ask("a")
    assert free_the_deck(world) == [[urgent], [first, last], [other], [alone], [also_alone]]


def test_images_count_and_nobody_passes_one_that_is_too_large() -> None:
    world = behind_a_run(4)
    ids = [world.ask("a", batch_key="k", images=n) for n in (2, 1, 3, 1, 6)]
    assert free_the_deck(world) == [ids[:2], ids[2:4], ids[4:]]


def test_a_pipeline_that_cannot_is_not_asked_to() -> None:
    world = behind_a_run(4, can_batch=False)
    ids = [world.ask("a", batch_key="k") for _ in range(2)]
    assert free_the_deck(world) == [[i] for i in ids]


def test_an_operator_changes_it_while_requests_wait() -> None:
    world = behind_a_run(1)
    ids = [world.ask("a", batch_key="k") for _ in range(3)]
    world.tell(ev.MaxBatchChanged("a", 2))
    assert free_the_deck(world) == [ids[:2], ids[2:]]
    with pytest.raises(IllegalEvent):
        world.machine.handle(ev.MaxBatchChanged("nobody", 2), world.now_s)


def test_an_operators_wish_belongs_to_the_name_and_to_the_edition_that_is_coming() -> None:
    world = by_hand(8, ("a", 2), ("b", 2))
    world.make_resident("a")
    on_stage(world, "b")
    world.tell(ev.ModelReplaced(model("a", 2, edition=1)))
    world.tell(ev.MaxBatchChanged("a", 2))
    world.tell(ev.ModelPrepared("a@1"))
    world.make_resident("a")
    world.ask("b")
    ids = [world.ask("a", batch_key="k") for _ in range(2)]
    assert free_the_deck(world) == [ids]


def test_a_companion_passes_nobody_who_is_at_the_bound() -> None:
    """`b` waits since before: with one skip allowed, the second companion would be one too many."""
    world = behind_a_run(8, PolicySettings(prefetch=False, max_skips=2))
    world.tell(ev.ModelAdded(model("c", 5)))
    first = world.ask("a", batch_key="k")
    bounded = world.ask("c")  # not resident: may be overtaken
    ids = [world.ask("a", batch_key="k") for _ in range(3)]
    (running,) = world.ledger.running
    world.tell(ev.RunEnded(running, Outcome.FINISHED))
    world.tell(ev.RunStarted(*world.ledger.deck))
    assert world.of(ac.PutOnDeck)[-1] == ac.PutOnDeck(first, "a", tuple(ids[:2]))
    queue = world.machine.queue
    assert queue.skips_of(queue.requests[bounded]) == 2


def test_a_companion_passes_nobody_whom_its_client_would_wrong() -> None:
    """Twenty would fit into one run, but then another client waited for all of them."""
    world = behind_a_run(64)
    world.tell(ev.ModelAdded(model("c", 2)))
    world.make_resident("c")
    ids = [world.ask("a", client="many", batch_key="k") for _ in range(20)]
    other = world.ask("c", client="one")
    first, second, third = free_the_deck(world)
    assert first == ids[: len(first)] and 3 <= len(first) <= 6
    assert [second, third] == [[other], ids[len(first) :]]


def test_in_order_of_arrival_only_neighbours_share_a_run() -> None:
    world = behind_a_run(8, PolicySettings(order="fcfs", prefetch=False))
    first, second = world.ask("a", batch_key="k"), world.ask("a", batch_key="k")
    between, last = world.ask("b"), world.ask("a", batch_key="k")
    assert free_the_deck(world) == [[first, second], [between], [last]]


def test_each_has_its_own_cancellation_deadline_and_answer() -> None:
    stage = ScriptedStage(run_s=5.0)
    with busy_world(8, model("a", 2, max_batch=4), stage=stage) as world:
        world.ask("a")
        world.run(for_s=4.0)
        ids = [world.ask("a", batch_key="k") for _ in range(2)]  # the first one is on deck, alone
        ids += [world.ask("a", batch_key="k") for _ in range(2)]
        late = world.ask("a", batch_key="k", deadline_in_s=12.0)
        world.run(for_s=5.0)
        assert world.of(ac.PutOnDeck)[-1].companions == (ids[2], ids[3], late)
        world.tell(ev.RequestCancelled(ids[2]))
        world.run(for_s=1.0)
        assert world.answer(ids[2]) is ErrorCode.CANCELLED
        world.run()
        assert world.answer(late) is ErrorCode.DEADLINE_EXCEEDED
        assert [world.answer(i) for i in (ids[0], ids[1], ids[3])] == [None] * 3


def test_one_that_is_cancelled_mid_run_is_answered_at_once_and_its_weights_stay() -> None:
    world = behind_a_run(4)
    ids = [world.ask("a", batch_key="k") for _ in range(2)]
    for request_id in [*world.ledger.running]:
        world.tell(ev.RunEnded(request_id, Outcome.FINISHED))
    for _ in range(2):
        for request_id in sorted(world.ledger.deck):
            world.tell(ev.RunStarted(request_id))
    assert world.ledger.running >= set(ids)
    world.tell(ev.RequestCancelled(ids[0]))
    world.tell(ev.RunEnded(ids[0], Outcome.CANCELLED))
    assert world.answer(ids[0]) is ErrorCode.CANCELLED and world.answer(ids[1]) == "none yet"
    assert world.machine.residency.models["a"].leases == 2
    world.tell(ev.RunEnded(ids[1], Outcome.FINISHED))
    for request_id in ids:
        world.tell(ev.LeaseEnded(request_id))
    assert world.machine.residency.models["a"].leases == 0


def test_decisions_tell_who_went_along_with_whom() -> None:
    machine = Machine(8 * 4096, policy=QUIET, decisions=10)
    machine.handle(ev.LoaderReady(0), 0.0)
    machine.handle(ev.ModelAdded(model("a", 1, max_batch=4)), 0.0)
    for name in ("x", "y"):
        machine.handle(ev.RequestReceived(RequestInfo(name, "me", "a", batch_key="k")), 0.0)
    machine.handle(ev.LoadFinished(1), 0.0)
    machine.handle(ev.ModelPrepared("a"), 0.0)
    machine.handle(ev.ViewsBuilt("a.0", 1), 0.0)
    kept = machine.decisions
    assert kept is not None
    chosen = [made for made in kept.last(10) if isinstance(made, Chosen)]
    assert [(made.request, made.along_with) for made in chosen] == [("x", ""), ("y", "x")]
