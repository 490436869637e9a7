"""The simulator's clockwork: shared links, waiting and idling measured, the machine driven to the end."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate_kit import MB, asks, profile
from understudyd.core import actions as ac
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.recorded import TraceRequest
from understudyd.simulate import on_demand
from understudyd.simulate.meter import Meter, Quantiles
from understudyd.simulate.references import Recency
from understudyd.simulate.traffic import Traffic
from understudyd.simulate.world import World


def world(models: str, *, room: int, pool: int = 0, loaders: int = 2, **figures: Any) -> World:
    settings = figures.pop("settings", None) or PolicySettings(prefetch=False)
    costs = profile(**figures)
    machine = Machine(costs.bytes_of(room), pool_bytes=costs.bytes_of(pool) if pool else 0, policy=settings,
                      max_waiting=1 << 30)  # fmt: skip
    made = World(machine, costs, loaders=loaders)
    made.add_models(models)
    return made


# -- links ----------------------------------------------------------------------------------------------


def ends(traffic: Traffic, count: int) -> list[tuple[int, float]]:
    found = []
    for _ in range(count):
        at_s = traffic.next_end_s
        found.append((traffic.pop_ended(), pytest.approx(at_s)))
    return found


def test_loads_share_the_disk_and_the_bus() -> None:
    traffic = Traffic(profile())
    traffic.start(1, 10 * MB, on_disk=True, on_bus=True, now_s=0.0)
    traffic.start(2, 10 * MB, on_disk=True, on_bus=False, now_s=0.0)  # 5 MB/s each, until 2 s
    traffic.start(3, 190 * MB, on_disk=False, on_bus=True, now_s=0.0)  # 95 MB/s: what the reader leaves
    assert sorted(ends(traffic, 3)) == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert traffic.next_end_s == float("inf")


def test_who_ends_leaves_his_share_to_the_others() -> None:
    traffic = Traffic(profile())
    traffic.start(1, 5 * MB, on_disk=True, on_bus=True, now_s=0.0)
    traffic.start(2, 10 * MB, on_disk=True, on_bus=True, now_s=0.0)
    assert ends(traffic, 2) == [(1, 1.0), (2, 1.5)]


def test_a_pause_moves_every_end_and_a_cancelled_load_has_none() -> None:
    traffic = Traffic(profile())
    traffic.start(1, 10 * MB, on_disk=True, on_bus=True, now_s=0.0)
    traffic.pause(True, 0.5)
    assert traffic.next_end_s == float("inf")
    traffic.pause(False, 3.0)
    assert traffic.next_end_s == pytest.approx(3.5)
    assert traffic.cancel(1, 3.1) and not traffic.cancel(1, 3.1)
    assert traffic.next_end_s == float("inf")


# -- measures -------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_quantiles_are_within_a_percent(values: list[float], share: float) -> None:
    quantiles = Quantiles()
    for value in values:
        quantiles.add(value)
    exact = sorted(values)[max(1, math.ceil(len(values) * share)) - 1]
    assert quantiles.at(share) == pytest.approx(exact, rel=0.011)


def test_quantiles_know_nothing_and_zero() -> None:
    quantiles = Quantiles()
    assert quantiles.at(0.5) == 0.0
    quantiles.add(0.0)
    quantiles.add(5.0)
    assert quantiles.at(0.5) == 0.0 and quantiles.at(1.0) == pytest.approx(5.0, rel=0.01)


def test_the_stage_idles_only_while_somebody_waits() -> None:
    meter = Meter()
    meter.arrived(10.0)
    meter.started(10.0, True, 12.0)  # 2 s of loading
    meter.arrived(13.0)
    meter.ended(3.0, 15.0)
    meter.started(13.0, True, 16.0)  # free at 15: 1 s seen
    meter.ended(1.0, 17.0)
    meter.arrived(100.0)  # nobody waited between 17 and 100
    meter.started(100.0, False, 100.5)
    meter.ended(4.5, 105.0)
    assert (meter.idle_s, meter.busy_s) == (3.5, 8.5)
    assert meter.idle_percent == pytest.approx(100 * 3.5 / 8.5)
    assert meter.utilisation_percent == pytest.approx(100 * 8.5 / 95.0)
    assert meter.switch_s.at(1.0) == pytest.approx(2.0, rel=0.01)
    assert meter.switch_s.at(0.5) == pytest.approx(1.0, rel=0.01)


def test_who_is_refused_is_waited_for_no_more() -> None:
    meter = Meter()
    meter.arrived(0.0)
    meter.gave_up(2.0)
    meter.arrived(50.0)
    meter.started(50.0, False, 51.0)
    assert meter.idle_s == 3.0 and meter.failed == 1


# -- the machine, driven --------------------------------------------------------------------------------


def test_a_first_request_waits_for_its_load_and_the_second_for_nothing() -> None:
    made = world("ab", room=2, bind_s=0.5, load_s=0.25, views_s=0.125)
    made.play(asks((0, "a"), (100, "a")))
    assert made.meter.wait_s.at(1.0) == pytest.approx(10.875, rel=0.011)
    assert made.meter.wait_s.at(0.5) == 0.0
    assert (made.meter.served, made.meter.switches, made.loads) == (2, 1, 1)


def test_the_next_model_is_loaded_while_one_runs() -> None:
    """30 s of work hide the 10 s of the second load: the switch shows nothing but its bind."""
    made = world("ab", room=2, bind_s=0.001)
    made.play(asks((0, "a"), (15, "b"), steps=30))
    assert made.meter.idle_s == pytest.approx(10.002)  # the first load: nothing to hide behind
    assert made.meter.busy_s == 60.0
    assert made.meter.switch_s.at(0.5) == pytest.approx(0.001, rel=0.02)


def test_a_host_copy_is_loaded_at_the_speed_of_the_bus() -> None:
    made = world("ab", room=1, pool=2, settings=PolicySettings())
    made.settle(1000.0)
    made.play(asks((0, "a"), (50, "b"), (100, "a")))
    assert made.meter.wait_s.at(0.3) == pytest.approx(1.0, rel=0.02)
    assert made.meter.wait_s.at(1.0) == pytest.approx(1.0, rel=0.02)


def test_a_full_queue_is_counted() -> None:
    costs = profile()
    made = World(Machine(costs.bytes_of(1), max_waiting=1), costs)
    made.add_models("a")
    made.play(asks((0, "a"), (0, "a"), (0, "a"), steps=5))
    assert (made.meter.served, made.meter.failed) == (1, 2)


def test_nothing_of_an_answered_request_is_kept() -> None:
    made = world("abc", room=2)
    made.play(asks(*((i * 3.0, "abc"[i % 3]) for i in range(60))))
    assert made.meter.served == 60
    assert not made._open and not made.machine.queue.requests


def test_the_same_trace_gives_the_same_decisions() -> None:
    def decisions() -> list[tuple[float, ac.Action]]:
        seen: list[tuple[float, ac.Action]] = []
        costs = profile()
        machine = Machine(costs.bytes_of(2), pool_bytes=costs.bytes_of(3))
        made = World(machine, costs, watch=lambda at_s, action: seen.append((at_s, action)))
        made.add_models("abcde")
        made.play(asks(*((i * 2.0, "abcde"[(i * i) % 5]) for i in range(80)), steps=2))
        return seen

    assert decisions() == decisions()


# -- loading on demand ----------------------------------------------------------------------------------


def test_loading_on_demand_by_hand() -> None:
    costs = profile(prepare_s=1.0, bind_s=0.5)
    meter = on_demand.serve(
        asks((0, "a"), (1, "b"), (2, "a"), (200, "b")), costs, Recency(), resident=1, in_host=2, models="ab"
    )
    # a: 1 load + 1 prepare + .5; b the same; a and b again: 1 load + .5
    assert meter.idle_s == pytest.approx(2.5 + 2.5 + 1.5 + 1.5)
    assert meter.busy_s == 4.0 and meter.switches == 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 8.0), st.sampled_from("abcd")), min_size=1, max_size=25))
def test_the_machine_told_to_load_on_demand_idles_as_long(gaps: list[tuple[float, str]]) -> None:
    """Two programs, one answer: the core in order of arrival without lookahead, and the plain loop."""
    at_s, requests = 0.0, []
    for gap_s, name in gaps:
        at_s += gap_s
        requests.append(TraceRequest(at_s, name, steps=3))
    told = PolicySettings(order="fcfs", lookahead=0, prefetch=False, max_wait_s=1e9, max_skips=1 << 30)
    made = world("abcd", room=4, loaders=1, settings=told, bind_s=0.25)
    made.play(requests)
    meter = on_demand.serve(requests, profile(bind_s=0.25), Recency(), resident=4, in_host=0, models="")
    assert made.meter.busy_s == pytest.approx(meter.busy_s)
    assert made.meter.idle_s == pytest.approx(meter.idle_s, abs=1e-6)
    assert made.meter.wait_s.at(1.0) == pytest.approx(meter.wait_s.at(1.0), rel=0.011, abs=1e-6)


# -- batches ----------------------------------------------------------------------------------------------


def test_eight_images_in_one_run_take_as_long_as_was_published() -> None:
    costs = profile(request_s=0.5, image_s=0.25)
    one_s = costs.run_s(TraceRequest(0.0, "a", steps=3))
    assert costs.shared_run_s([one_s], 1) == one_s == 0.5 + 3.25
    assert costs.shared_run_s([one_s] * 8, 8) == pytest.approx(0.5 + 3.25 * 6.4)
    assert costs.shared_run_s([one_s, one_s - 0.5 + one_s], 3) == pytest.approx(
        costs.shared_run_s([one_s] * 3, 3)
    )


@pytest.mark.parametrize(("max_batch", "runs", "last_s"), [(1, 6, 6.0), (4, 3, 2 + 4 - 3 * 1.6 / 7)])
def test_what_waits_shares_a_run_where_models_allow_it(max_batch: int, runs: int, last_s: float) -> None:
    """One runs, the second is on deck alone by then, and four wait for both."""
    costs = profile()
    machine = Machine(costs.bytes_of(1), policy=PolicySettings(prefetch=False))
    made = World(machine, costs, max_batch=max_batch)
    made.add_models("a")
    made.play(asks((0.0, "a")))
    began_s, before = made.now_s, made.runs
    made.play(asks(*[(0.0, "a")] * 6))
    assert made.runs - before == runs
    assert made.now_s - began_s == pytest.approx(last_s)
    assert made.meter.served == 7 and made.meter.wait_s.count == 7
    assert made.meter.busy_s == pytest.approx(1.0 + last_s)


def test_other_steps_run_apart() -> None:
    costs = profile()
    machine = Machine(costs.bytes_of(1), policy=PolicySettings(prefetch=False))
    made = World(machine, costs, max_batch=8)
    made.add_models("a")
    mixed = [TraceRequest(0.0, "a", "client", steps=1 + i % 2) for i in range(8)]
    made.play(mixed)
    assert made.runs == 2  # nothing was resident: all eight wait for the load
