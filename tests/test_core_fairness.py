"""Fairness between clients: a thousand requests of one do not hold up another's single one."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from core_kit import ScriptedLoaders, ScriptedStage, World, busy_world, model
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.fairness import MAX_LEAD, FairTags
from understudyd.core.policy import PolicySettings
from understudyd.core.types import RequestInfo

A, B, C = model("a", 2), model("b", 2), model("c", 2)
PATIENT = PolicySettings(max_wait_s=1e6, max_skips=1 << 30, prefetch=False)


def settled(world: World, *names: str) -> World:
    for name in names:
        world.tell(ev.LoadWanted(name))
    world.run()
    return world


def order(world: World) -> list[str]:
    """Requests in the order in which they went on deck."""
    return [action.request_id for action in world.of(ac.PutOnDeck)]


@pytest.mark.parametrize("policy", [PATIENT, PolicySettings(prefetch=False, max_wait_s=3.0)])
def test_a_single_request_is_not_held_up_by_a_backlog_for_what_is_on_stage(policy: PolicySettings) -> None:
    """Also under overload, when everybody has waited longer than the bound."""
    with settled(busy_world(8, A, B, policy=policy), "a", "b") as world:
        for _ in range(60):
            world.ask("a", client="hog")
        world.run(for_s=100.0)
        before = len(world.ran)
        single = world.ask("b", client="single")
        world.run()
        assert order(world).index(single) - before <= MAX_LEAD + 2


def test_a_single_request_for_another_model_gets_room_that_a_backlog_holds() -> None:
    """Both models of the hog are ready and fill the arena: without fairness they would stay until its end."""
    with settled(busy_world(4, A, B, C, policy=PATIENT), "a", "b") as world:
        for i in range(60):
            world.ask("ab"[i % 2], client="hog")
        single = world.ask("c", client="single")
        world.run()
        assert order(world).index(single) <= MAX_LEAD + 5


def test_who_asks_for_more_work_has_fewer_turns() -> None:
    with settled(busy_world(8, A, B), "a", "b") as world:
        world.ask("a", client="somebody else")
        for _ in range(8):
            world.ask("a", client="large", cost=4.0)
        small = [world.ask("b", client="small") for _ in range(24)]
        world.run()
        assert sum(request in small for request in order(world)[:21]) in range(14, 19)


def test_a_client_that_has_taken_back_its_backlog_is_as_good_as_new() -> None:
    with settled(busy_world(8, A, B), "a", "b") as world:
        for _ in range(3):
            world.ask("a", client="other")
        backlog = [world.ask("a", client="repentant") for _ in range(50)]
        others = [world.ask("b", client="other") for _ in range(20)]
        for request in backlog:
            world.tell(ev.RequestCancelled(request))
        single = world.ask("b", client="repentant")
        world.run()
        assert order(world).index(single) < order(world).index(others[8])


def test_new_clients_that_come_for_ever_do_not_starve_a_backlog() -> None:
    """Each of them is entitled to a turn before the backlog's second, but time goes on for all."""
    stage = ScriptedStage(run_s=1.0)
    with settled(busy_world(8, A, policy=PATIENT, stage=stage), "a") as world:
        world.ask("a", client="first")
        backlog = [world.ask("a", client="backlog") for _ in range(5)]
        for i in range(10):
            world.ask("a", client=f"early {i}")
        for i in range(100):  # as fast as they are served
            world.ask("a", client=f"new {i}")
            world.run(for_s=1.0)
        assert order(world).index(backlog[-1]) < 70
        world.run()


def test_requests_of_one_client_keep_the_order_of_arrival() -> None:
    with settled(busy_world(8, A), "a") as world:
        asked = [world.ask("a", cost=cost) for cost in (3.0, 1.0, 5.0, 0.5, 1.0)]
        world.run()
        assert order(world) == asked


def test_a_priority_that_goes_first_has_not_used_up_anybody_s_turn_at_another() -> None:
    tags = FairTags(max_absent=10)
    assert [tags.admit(RequestInfo(f"r{i}", "ann", "a", priority=1), 0.0) for i in range(3)] == [0, 1, 2]
    assert tags.admit(RequestInfo("r3", "ann", "a"), 0.0) == 0


def test_idle_clients_are_forgotten() -> None:
    """Also while virtual time stands still because somebody waits who cannot run."""
    tags = FairTags(max_absent=10)
    tags.admit(RequestInfo("stuck", "patient", "a"), None)
    for i in range(1000):
        info = RequestInfo(f"r{i}", f"client {i}", "a", cost=1e6)
        tags.admit(info, 0.0)
        tags.take(info, 10**9, 0.0)
    (level,) = tags.levels.values()
    assert len(level.shares) <= 11 and len(level.absent) <= 10
    tags.take(RequestInfo("stuck", "patient", "a"), 1, None)
    assert not tags.levels and tags.virtual_time == 0.0


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    backlog=st.lists(st.sampled_from("abcd"), min_size=20, max_size=60),
    single=st.sampled_from("abcd"),
    at_s=st.floats(0.0, 60.0),
    pages=st.sampled_from([4, 6, 8]),
    max_wait_s=st.sampled_from([2.0, 30.0, 1e6]),
    max_skips=st.sampled_from([4, 64, 10**6]),
    lookahead=st.integers(1, 4),
)
def test_a_single_request_runs_within_a_few_runs_of_any_backlog(
    backlog: list[str],
    single: str,
    at_s: float,
    pages: int,
    max_wait_s: float,
    max_skips: int,
    lookahead: int,
) -> None:
    """Loads take less than a run. The deck, the lead, and the loads before its own may come before.

    Without any lookahead nothing is loaded while the stage is busy: then only the bounds end the waiting.
    """
    policy = PolicySettings(max_wait_s=max_wait_s, max_skips=max_skips, lookahead=lookahead, prefetch=False)
    infos = [model(name, 2) for name in "abcd"]
    loaders = ScriptedLoaders(seconds_per_page=0.5)
    with busy_world(pages, *infos, policy=policy, loaders=loaders) as world:
        for name in backlog:
            world.ask(name, client="hog")
        world.run(for_s=at_s)
        before = len(world.ran)
        request = world.ask(single, client="single")
        world.run()
        assert order(world).index(request) - before <= MAX_LEAD + 5


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.sampled_from(["ann", "bob", "cy", "dee"]),
            st.sampled_from([0, 0, 0, 1]),
            st.sampled_from([0.0, 0.0, 0.5, 5.0, 20.0]),
            st.sampled_from([0.5, 1.0, 4.0]),
        ),
        min_size=10,
        max_size=50,
    ),
    max_wait_s=st.sampled_from([1.0, 10.0, 100.0]),
    max_skips=st.integers(0, 8),
    load_s=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_nobody_waits_longer_than_the_bound_at_any_load(
    asked: list[tuple[str, str, int, float, float]], max_wait_s: float, max_skips: int, load_s: float
) -> None:
    """The ledger checks every single overtaking; here the sum: who went before though it was behind."""
    policy = PolicySettings(max_wait_s=max_wait_s, max_skips=max_skips, prefetch=False)
    loaders = ScriptedLoaders(seconds_per_page=load_s)
    with busy_world(4, *(model(name, 2) for name in "abcd"), policy=policy, loaders=loaders) as world:
        turns: dict[str, tuple[float, int]] = {}
        for name, client, priority, after_s, cost in asked:
            request = world.ask(name, client=client, priority=priority, cost=cost)
            turns[request] = world.machine.queue.requests[request].turn[:2]
            world.run(for_s=after_s)
        world.run()
        ran = order(world)
        assert sorted(ran) == sorted(turns)
        moment: dict[tuple[type[ac.Action], str], int] = {
            (type(action), action.request_id): i
            for i, (_, action) in enumerate(world.log)
            if isinstance(action, ac.AcceptRequest | ac.PutOnDeck)
        }
        for i, request in enumerate(ran):
            joined = moment[ac.AcceptRequest, request]
            overtaken_by = [
                other
                for other in ran[:i]
                if turns[other] > turns[request] and moment[ac.PutOnDeck, other] > joined
            ]
            assert len(overtaken_by) <= max_skips
