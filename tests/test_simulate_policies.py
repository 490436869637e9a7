"""Misses compared, other policies plugged into the machine, profiles and plans."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulate_kit import MB, asks, profile, write_trace
from understudyd.core.machine import Machine
from understudyd.recorded import TraceRequest
from understudyd.simulate import planning, profiles, slots, synthetic
from understudyd.simulate.references import Foresight, Frequency, Recency, Valuing, plug_in
from understudyd.simulate.report import Scenario, play, simulate
from understudyd.simulate.trace import survey

NAMES = "abcdef"


def requests_for(models: Sequence[str]) -> list[TraceRequest]:
    return asks(*((float(i), name) for i, name in enumerate(models)))


def compare(models: Sequence[str], room: int, valuing: Valuing | None = None) -> slots.Misses:
    return slots.compare(requests_for(models), slots.next_uses(models), room, valuing)


# -- misses ---------------------------------------------------------------------------------------------


def test_misses_by_hand() -> None:
    misses = compare("abcabc", 2)
    assert misses.lru_percent == 100.0  # the loop that LRU cannot hold
    assert misses.belady_percent == pytest.approx(100.0 * 4 / 6)


def test_next_uses() -> None:
    assert list(slots.next_uses("abab")) == [2, 3, 4, 4]


def fewest_misses(models: Sequence[str], room: int) -> int:
    """By trying everything."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for name in models:
        after: dict[frozenset[str], int] = {}
        for held, misses in states.items():
            if name in held:
                choices = [(held, misses)]
            elif len(held) < room:
                choices = [(held | {name}, misses + 1)]
            else:
                choices = [(held - {gone} | {name}, misses + 1) for gone in held]
            for state, count in choices:
                after[state] = min(count, after.get(state, count))
        states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=30), st.integers(1, 4))
def test_nobody_misses_less_than_belady(models: list[str], room: int) -> None:
    misses = compare(models, room)
    assert misses.belady_percent == pytest.approx(100.0 * fewest_misses(models, room) / len(models))
    assert misses.belady_percent <= min(misses.lru_percent, misses.forecast_percent) + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=40), st.integers(1, 4))
def test_references_in_the_place_of_the_forecast_do_as_their_names_say(models: list[str], room: int) -> None:
    recent, foreseen = (
        compare(models, room, Recency()),
        compare(models, room, Foresight(slots.next_uses(models))),
    )
    assert recent.forecast_percent == pytest.approx(recent.lru_percent)
    assert foreseen.forecast_percent == pytest.approx(foreseen.belady_percent)


def test_the_forecast_beats_lru_on_the_example(tmp_path: Path) -> None:
    requests = list(synthetic.generate(3000))
    following = slots.next_uses(r.model for r in requests)
    for room in (4, 8, 16):
        assert slots.compare(requests, following, room).way_percent > 10.0


# -- the machine with another forecast ------------------------------------------------------------------


def scenario(tmp_path: Path, requests: Sequence[TraceRequest], room: int, **changes: object) -> Scenario:
    found = survey(write_trace(tmp_path / "trace.csv", requests))
    costs = profile()
    return replace(Scenario(found, costs, costs.bytes_of(room), 0, slots=room), **changes)


def test_a_plugged_in_policy_decides_what_is_evicted(tmp_path: Path) -> None:
    """a often, then b and c once each: LRU gives up a for d, LFU does not."""
    models = "aaaaaabcda"
    spread = asks(*((i * 100.0, name) for i, name in enumerate(models)))
    loads = {
        policy: play(scenario(tmp_path, spread, 3, policy=policy)).loads
        for policy in ("lru", "lfu", "belady")
    }
    assert loads == {"lru": 5, "lfu": 4, "belady": 4}


def test_plugging_in_replaces_the_forecast_everywhere() -> None:
    machine, frequency = Machine(1 << 20), Frequency()
    plug_in(machine, frequency)
    assert machine.forecast is frequency and machine.policy.forecast is frequency  # type: ignore[comparison-overlap]


def test_reports_of_all_policies(tmp_path: Path) -> None:
    base = scenario(tmp_path, list(synthetic.generate(400)), 6, compress=50.0)
    reports = {
        policy: simulate(replace(base, policy=policy)).report
        for policy in ("understudy", "lru", "lfu", "belady", "fifo-on-demand")
    }
    for report in reports.values():
        assert report.served == report.requests == 400 and report.failed == 0
        assert report.wait_p50_s <= report.wait_p95_s <= report.wait_p99_s
    on_demand = reports["fifo-on-demand"]
    assert on_demand.idle_while_waiting_percent == on_demand.idle_while_waiting_percent_lru_on_demand
    assert on_demand.events is None and on_demand.miss_percent == on_demand.lru_miss_percent
    assert reports["belady"].miss_percent == reports["belady"].belady_miss_percent
    ours = reports["understudy"]
    assert ours.idle_while_waiting_percent < ours.idle_while_waiting_percent_lru_on_demand
    assert ours.decision_us_p99 is not None and ours.decision_us_p99 > 0.0


# -- profiles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_can_be_used_and_written_again(name: str, tmp_path: Path) -> None:
    shipped = profiles.load(name)
    assert shipped.name == name
    (tmp_path / "again.toml").write_text(profiles.to_toml(shipped))
    assert profiles.load(str(tmp_path / "again.toml")) == shipped


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("source = ", "sauce = "), "sauce"),
        (("[bind_s]", "[bond_s]"), "bond_s"),
        (('source = "made up"', 'source = ""'), "source"),
        (("value = 1.0", "value = 0.0"), "step_s must not be 0"),
        (("value = 1.0", "value = -1.0"), "step_s"),
        (("[bind_s]", "["), "again.toml"),
    ],
)
def test_a_bad_profile_is_refused_with_a_reason(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    (tmp_path / "again.toml").write_text(profiles.to_toml(profile()).replace(*change))
    with pytest.raises(profiles.ProfileError, match=says):
        profiles.load(str(tmp_path / "again.toml"))


def test_components_of_one_name_would_be_one_blob() -> None:
    (component, *_) = profile().components
    with pytest.raises(profiles.ProfileError, match="two components have one name"):
        profiles.check(msgspec.structs.replace(profile(), components=(component, component)))


def test_gpus_name_profiles_that_are_there() -> None:
    for name in ("a100-40", "a100-80", "h100-80"):
        card = profiles.gpu(name)
        assert profiles.load(card.profile).model_bytes < card.arena_bytes
    with pytest.raises(profiles.ProfileError, match="a100-80"):
        profiles.gpu("abacus")


def test_shared_components_take_room_once() -> None:
    costs = profile()
    shared = replace_components(costs, is_shared=True)
    assert costs.bytes_of(3) == 3 * costs.bytes_of(1)
    assert shared.bytes_of(3) - shared.bytes_of(1) == 2 * costs.bytes_of(1)
    assert {b.key for n in "xy" for b in shared.model(n).blobs} == {"x/unet", "y/unet", "vae"}


def replace_components(costs: profiles.Profile, *, is_shared: bool) -> profiles.Profile:
    import msgspec

    vae = profiles.Component("vae", 10 * MB, "made up", is_shared)
    return msgspec.structs.replace(costs, components=(*costs.components, vae))


def test_compression_for_a_utilisation(tmp_path: Path) -> None:
    found = survey(write_trace(tmp_path / "t.csv", asks((0, "a"), (100, "b"), steps=5)))
    costs = profile()
    factor = costs.compression_for(found, 0.5)
    assert costs.work_s(found) == 10.0 and factor == pytest.approx(5.0)  # 10 s of work in 20 s


# -- plans ----------------------------------------------------------------------------------------------


def test_a_plan_finds_the_least_memory_that_will_do(tmp_path: Path) -> None:
    base = scenario(tmp_path, list(synthetic.generate(300)), 2, compress=100.0)
    residents = planning.sizes(base, base.profile.bytes_of(12))
    assert residents[0] == 2 and residents[-1] == 12 and residents == sorted(set(residents))
    rows = list(planning.sweep(base, residents))
    assert [row.resident for row in rows] == residents
    assert rows[-1].on_demand.idle_percent < rows[0].on_demand.idle_percent
    assert all(row.foresight.idle_percent <= row.on_demand.idle_percent for row in rows)
    middle = rows[len(rows) // 2].understudy.idle_percent
    plan = planning.conclude(rows, middle)
    assert plan.enough_bytes is not None and plan.enough_bytes <= rows[len(rows) // 2].arena_bytes
    assert planning.conclude(rows, -1.0).enough_bytes is None


def test_one_lucky_size_is_not_enough(tmp_path: Path) -> None:
    felt = planning.Felt(0.5, 0, 0, 0, 0, 0, 0)
    bad = planning.Felt(2.0, 0, 0, 0, 0, 0, 0)
    rows = [planning.Row(i, i, f, bad, bad) for i, f in enumerate((felt, bad, felt, felt))]
    plan = planning.conclude(rows, 1.0)
    assert (plan.enough_bytes, plan.on_demand_enough_bytes) == (2, None)
