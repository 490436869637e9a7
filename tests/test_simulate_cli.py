"""`understudyd simulate`, `plan` and `synthesize` as they are typed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from simulate_kit import profile
from understudyd.main import main
from understudyd.simulate import profiles

FIELDS = {
    "requests", "models", "resident", "miss_percent", "lru_miss_percent", "belady_miss_percent",
    "idle_while_waiting_percent", "idle_while_waiting_percent_lru_on_demand", "wait_p50_s", "wait_p95_s",
    "wait_p99_s", "visible_switch_p50_ms", "visible_switch_p95_ms", "stage_utilisation_percent",
    "decision_us_p50", "decision_us_p99", "policy", "profile", "compress",
}  # fmt: skip
PNG = b"\x89PNG"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv.gz"
    assert run("synthesize", path, "--requests", 250, "--models", 20).exit_code == 0
    return path


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    path = tmp_path / "costs.toml"
    path.write_text(profiles.to_toml(profile()))
    return path


def test_simulate_as_json_and_as_a_picture(made_up: Path, costs: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    result = run(
        "simulate", made_up, "--profile", costs, "--models-resident", "10%", "--host-pool", "all",
        "--utilisation", "85%", "--json", "--plot", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.keys() >= FIELDS
    assert found["requests"] == found["served"] == 250
    assert found["resident"] == found["slots"] == round(found["models"] * 0.1)
    assert found["in_host"] == found["models"]
    assert found["compress"] not in (0.0, 1.0)
    assert picture.read_bytes().startswith(PNG)


def test_simulate_for_people(made_up: Path, costs: Path) -> None:
    result = run("simulate", made_up, "--profile", costs, "--arena", "500MB", "--slots", 0, "--host-pool", 0)
    assert result.exit_code == 0, result.output
    assert "4 fit the arena" in result.output and "idle while work waits" in result.output
    assert "misses" not in result.output


def test_waiting_is_shown_beside_that_of_an_lru(made_up: Path, costs: Path) -> None:
    arguments = (
        "simulate", made_up, "--profile", costs, "--models-resident", "10%", "--host-pool", 0,
        "--utilisation", "85%",
    )  # fmt: skip
    found = json.loads(run(*arguments, "--json").stdout)
    shares = ("p50", "p95", "p99")
    ours, theirs = (
        ", ".join(f"{share} {found[f'wait_{share}_s{whose}']:.1f} s" for share in shares)
        for whose in ("", "_lru_on_demand")
    )
    assert ours != theirs
    shown = " ".join(run(*arguments).output.split())  # however wide the terminal is
    assert f"waiting {ours}; LRU on demand: {theirs}" in shown


def test_plan_prints_rows_and_a_conclusion(made_up: Path, costs: Path, tmp_path: Path) -> None:
    common = (
        "plan",
        made_up,
        "--gpu",
        "a100-80",
        "--profile",
        costs,
        "--arena-up-to",
        "700MB",
        "--host-pool",
        0,
    )
    picture = tmp_path / "plan.png"
    result = run(*common, "--utilisation", "50%", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "LRU" in result.output and "wait p50/p95/p99" in result.output
    assert picture.read_bytes().startswith(PNG)
    plan = json.loads(run(*common, "--json", "--target-idle", "0.0001%").stdout)
    assert plan["enough_bytes"] is None and plan["rows"][0]["resident"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profile", "abacus"), "no profile 'abacus'"),
        (("--arena", "1MiB"), "takes 2132470614 bytes"),
        (("--arena", "much"), "is no size"),
        (("--arena", "9GiB", "--models-resident", "3"), "not both"),
        (("--compress", "2", "--utilisation", "50%"), "not both"),
        (("--utilisation", "85"), "85%"),
        (("--models-resident", "few"), "give a number"),
        (("--models-resident", "0"), "give a number"),
        (("--compress", "0"), "compress"),
    ],
)
def test_wrong_options_say_what_is_right(made_up: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run("simulate", made_up, *arguments)
    assert result.exit_code != 0 and says in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_missing_trace_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    result = run("simulate", tmp_path / "none.csv")
    assert result.exit_code == 1 and "cannot read" in result.output


def test_without_matplotlib_only_pictures_are_refused(
    made_up: Path, costs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("simulate", made_up, "--profile", costs, "--plot", made_up.with_suffix(".png"))
    assert result.exit_code == 1 and "understudy[plan]" in result.output
    assert run("simulate", made_up, "--profile", costs, "--slots", 0).exit_code == 0
