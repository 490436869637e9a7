"""Adapters in the simulator: how traces write them, what they cost, and how much of that is hidden."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from simulate_kit import MB, asks, figure, profile
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.main import main
from understudyd.recorded import TraceRequest, derived_name, loras_of, loras_text
from understudyd.simulate import commands, on_demand, profiles, synthetic
from understudyd.simulate.profiles import Loras, Overlay, Profile, ProfileError
from understudyd.simulate.references import Recency
from understudyd.simulate.report import PolicyName, Scenario, play
from understudyd.simulate.trace import TraceError, read, survey
from understudyd.simulate.world import World


def with_loras(fold_s: float = 0.5, change_s: float = 4.0, **figures: float) -> Profile:
    """Adapters of 1 MB over half of the one component."""
    overlays = (Overlay("unet", 50 * MB, "made up"),)
    loras = Loras(figure(1.0 * MB), figure(fold_s), figure(change_s), overlays)
    return msgspec.structs.replace(profile(**figures), loras=loras)


def dressed(*requests: tuple[float, str, str]) -> list[TraceRequest]:
    return [
        msgspec.structs.replace(r, loras=loras) for (at, name, loras) in requests for r in asks((at, name))
    ]


def played(costs: Profile, requests: list[TraceRequest], *, overlays: int = 4) -> World:
    machine = Machine(
        costs.bytes_of(2) + costs.overlays_bytes(overlays, overlays),
        pool_bytes=costs.bytes_of(4),
        policy=PolicySettings(prefetch=False),
    )
    made = World(machine, costs)
    made.add_models(dict.fromkeys(r.model for r in requests))
    made.settle(600.0)
    made.play(requests)
    return made


# -- traces -------------------------------------------------------------------------------------------


def test_adapters_as_they_are_written() -> None:
    assert loras_of("pixel-art@0.8+wrong") == (("pixel-art", 0.8), ("wrong", 1.0))
    assert loras_of("") == () and loras_text(()) == ""
    for text in ("a", "a@0.5", "a+b@-2.0", "b+a", "c@1e-05"):
        assert loras_text(loras_of(text)) == text
    assert derived_name("sdxl", loras_of("a@0.80+b")) == "sdxl+a@0.8+b@1.0"
    assert derived_name("sdxl", ()) == "sdxl"


def test_a_survey_counts_adapters_and_combinations(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("arrival_s,model,loras\n0,a,\n1,a,x\n2,a,x+y@0.5\n3,b,x\n4,b,x\n")
    found = survey(tmp_path / "t")
    assert (found.models, found.combinations, found.adapters) == (("a", "b"), 3, 2)
    (tmp_path / "bad").write_text("arrival_s,model,loras\n0,a,x@much\n")
    with pytest.raises(TraceError, match="request 1: loras"):
        list(read(tmp_path / "bad"))


def test_made_up_traces_have_adapters_when_asked(tmp_path: Path) -> None:
    shape = synthetic.Shape(models=3, loras=300, clients=300)
    commands.write(tmp_path / "t", synthetic.csv_lines(synthetic.generate(2000, shape), with_loras=True))
    found, requests = survey(tmp_path / "t"), list(read(tmp_path / "t"))
    assert len(found.models) == 3 and found.adapters > 100
    carrying = [r for r in requests if r.loras]
    assert 0.6 < len(carrying) / len(requests) < 0.95
    assert {int(name[1:]) % 3 for r in carrying if r.model == "m0001" for name, _ in loras_of(r.loras)} == {1}


# -- what they cost -----------------------------------------------------------------------------------


def test_an_overlay_is_folded_once_and_kept() -> None:
    world = played(with_loras(), dressed((0, "a", "x"), (100, "a", ""), (200, "a", "x")))
    assert world.meter.served == 3 and world.folds == 1
    assert world.meter.idle_s == pytest.approx(10.0 + 0.1 + 0.5)  # base and adapter from disk, the fold


def test_the_next_fold_is_hidden_behind_a_run() -> None:
    looks = ["x", "y", "x+y@0.5"]
    requests = dressed(*((0.0, "a", look) for look in looks))
    world = played(with_loras(fold_s=0.3), requests)
    alone = played(with_loras(fold_s=0.3), requests[:1])
    assert world.folds == 3
    assert world.meter.idle_s == pytest.approx(alone.meter.idle_s, abs=1e-6)


def test_two_adapters_take_twice_as_long() -> None:
    costs = with_loras(fold_s=0.5)
    info = costs.derived("a", loras_of("x+y"))
    assert info.is_derived and len(info.blobs) == 2
    assert [source.key for source in info.blobs[1].made_of] == ["a/unet", "lora x", "lora y"]
    assert costs.fold_s(50 * MB, 2) == pytest.approx(1.0)


def test_todays_practice_pays_for_every_change() -> None:
    costs = with_loras(change_s=4.0)
    requests = dressed((0, "a", "x"), (50, "a", "x"), (100, "a", "y"), (150, "a", ""))
    meter = on_demand.serve(requests, costs, Recency(), resident=1, in_host=1, models=["a"])
    assert meter.idle_s == pytest.approx(1.0 + 3 * 4.0)
    assert meter.switches == 3


def test_a_profile_without_them_says_so(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no \[loras\]"):
        profile().derived("a", loras_of("x"))
    (tmp_path / "t.csv").write_text("arrival_s,model,loras\n0,a,x\n")
    (tmp_path / "costs.toml").write_text(profiles.to_toml(profile()))
    typed = ["simulate", str(tmp_path / "t.csv"), "--profile", str(tmp_path / "costs.toml")]
    result = CliRunner().invoke(main, typed)
    assert result.exit_code == 2 and "[loras]" in result.output


def test_profiles_with_them_can_be_written_and_are_checked(tmp_path: Path) -> None:
    costs = with_loras()
    (tmp_path / "costs.toml").write_text(profiles.to_toml(costs))
    assert profiles.load(str(tmp_path / "costs.toml")) == costs
    (tmp_path / "costs.toml").write_text(
        profiles.to_toml(costs).replace('component = "unet"', 'component = "net"')
    )
    with pytest.raises(ProfileError, match="no component 'net'"):
        profiles.load(str(tmp_path / "costs.toml"))


# -- how much is hidden -------------------------------------------------------------------------------


def test_most_of_what_folding_on_demand_loses_is_won_back(tmp_path: Path) -> None:
    """300 adapters over 3 models, room for 20 overlays, a fold takes half as long as a run."""
    shape = synthetic.Shape(models=3, loras=300, skew=0.7)
    commands.write(tmp_path / "t", synthetic.csv_lines(synthetic.generate(600, shape), with_loras=True))
    found, costs = survey(tmp_path / "t"), with_loras(fold_s=45.0, disk_bytes_per_s=1000.0 * MB)
    scenario = Scenario(
        survey=found,
        profile=costs,
        arena_bytes=costs.bytes_of(3) + costs.overlays_bytes(20, 20),
        pool_bytes=costs.bytes_of(8),
        slots=0,
        compress=costs.compression_for(found, 1.2),
    )

    def seconds(policy: PolicyName) -> float:
        meter = play(replace(scenario, policy=policy)).meter
        assert meter.served == 600 and not meter.failed
        return meter.served / meter.served_per_s

    slow, ours, fast = map(seconds, ("fold-on-demand", "understudy", "all-resident"))
    assert slow > 1.05 * fast
    assert (slow - ours) / (slow - fast) >= 0.8


def test_the_bounds_are_policies_of_the_command(tmp_path: Path) -> None:
    shape = synthetic.Shape(models=2, loras=10)
    commands.write(tmp_path / "t", synthetic.csv_lines(synthetic.generate(60, shape), with_loras=True))
    folds = {}
    for policy in ("fold-on-demand", "all-resident"):
        typed = ["simulate", str(tmp_path / "t"), "--overlays-resident", "3", "--policy", policy, "--json"]
        result = CliRunner().invoke(main, [*typed, "--profile", "a100-sdxl"])
        assert result.exit_code == 0, result.output
        report = msgspec.json.decode(result.stdout)
        folds[policy] = report["folds"]
        assert report["adapters"] and report["requests_per_s"] > 0
    assert folds["all-resident"] == report["combinations"] <= folds["fold-on-demand"]
