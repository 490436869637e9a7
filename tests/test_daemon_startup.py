"""`[startup]`: chosen models are loaded, prepared and run before the daemon says that it is ready."""

from pathlib import Path
from typing import Any

import pytest

import understudy
from daemon_kit import running_daemon
from family_kit import Family
from understudy import admin
from understudyd import config
from understudyd.names import how_to_list, near, unknown_model

COLD: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}


def test_ready_means_ready(family: Family, tmp_path: Path) -> None:
    """Loaded while torch was imported, prepared and run; the first client finds it on stage or resident."""
    startup = {"models": ["sd-c", "xl", "sd-x"], "prompts": ["a", "b"], "size": "32x32", "steps": 1}
    with running_daemon(family.store, tmp_path / "run", startup=startup, **COLD) as daemon:
        (warning,) = [line for line in daemon.log if "startup.models" in line]
        assert "model 'sd-x' unknown; did you mean 'sd-" in warning
        assert "; not loaded: sd-x (unknown)" in daemon.wait_for_log("ready after")
        status = daemon.ask(admin.Status())
        assert status["not_loaded_at_start_up"] == {"sd-x": "unknown"}
        rows = {row["name"]: row for row in daemon.ask(admin.Models())}
        assert {rows[name]["tier"] for name in ("sd-c", "xl")} == {"resident", "bound"}
        assert {rows[name]["tier"] for name in ("sd-a", "xl-b")} == {"disk"}
        spans = daemon.ask(admin.Trace(seconds=600))["spans"]
        runs = [span["name"] for span in spans if span["lane"] == "stage"]
        assert runs == ["sd-c", "sd-c", "xl", "xl"], "each prompt once per model, and nothing else"
        phases = {span["name"]: span for span in spans if span["lane"] == "start-up"}
        loads = [span for span in spans if span["lane"].startswith("loader")]
        assert min(load["start_s"] for load in loads) < phases["import"]["end_s"]
        assert max(load["end_s"] for load in loads) < phases["warm-up"]["end_s"]
        with understudy.Client(endpoint=daemon.endpoint) as client:
            result = client.generate("sd-c", "x", seed=1, steps=1, width=32, height=32)
        assert result.tier in ("resident", "bound")


def test_serving_begins_when_the_time_is_over(family: Family, tmp_path: Path) -> None:
    """The load takes longer than its limit: a warning, a status that tells, and requests are served."""
    more = {"startup": {"models": ["xl"], "limit_s": 0.2}, "loader": {"rate_limit": "400KiB/s"}} | COLD
    with running_daemon(family.store, tmp_path / "run", **more) as daemon:
        assert any("took longer than 0.2 s" in line for line in daemon.log)
        assert daemon.ask(admin.Status())["not_loaded_at_start_up"] == {"xl": "not reached in time"}
        assert "not loaded: xl" in daemon.wait_for_log("ready after")
        with understudy.Client(endpoint=daemon.endpoint) as client:
            assert {entry.name for entry in client.models()} == set(family.folders)
            assert client.generate("sd-a", "x", seed=1, steps=1, width=32, height=32).images


def test_what_the_last_life_was_asked_for_is_ready_as_far_as_there_is_room(
    family: Family, tmp_path: Path
) -> None:
    store = {"path": str(tmp_path / "own"), "read_only": [str(family.store)]}
    with running_daemon(family.store, tmp_path / "run", store=store, **COLD) as daemon:
        with understudy.Client(endpoint=daemon.endpoint) as client:
            for name in ("xl-b", "sd-b", "sd-b", "sd-b"):
                client.generate(name, "x", seed=1, steps=1, width=32, height=32)
        rows = {row["name"]: row for row in daemon.ask(admin.Models())}
    more = {"startup": {"forecast": True}, "device": {"arena": f"{rows['sd-b']['size_bytes'] + 2**20}"}}
    with running_daemon(family.store, tmp_path / "run", store=store, **COLD | more) as daemon:
        rows = {row["name"]: row for row in daemon.ask(admin.Models())}
        assert {name for name, row in rows.items() if row["tier"] != "disk"} == {"sd-b"}
        assert daemon.ask(admin.Status())["not_loaded_at_start_up"] == {}


def test_config_check_knows_the_models_where_it_can_read_them(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "understudyd.toml"

    def check(models: str, read_only: str = "") -> int:
        path.write_text(f'[store]\npath = "{family.store}"\n{read_only}[startup]\nmodels = {models}\n')
        return config.main(["check", str(path)])

    assert check('["sd-a", "xl"]') == 0
    assert check('["sd-aa"]') == 1
    assert "startup.models: model 'sd-aa' unknown; did you mean 'sd-a'?" in capsys.readouterr().err
    assert check('["sd-aa"]', f'read_only = ["{tmp_path}/away"]\n') == 0, "a store may be away just now"


@pytest.mark.parametrize("size", ["512", "0x512", "512x", "axb"])
def test_a_size_is_width_and_height(tmp_path: Path, size: str) -> None:
    path = tmp_path / "understudyd.toml"
    path.write_text(f'[startup]\nsize = "{size}"\n')
    with pytest.raises(config.ConfigError, match=r"startup\.size"):
        config.load(path, {})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("foo", "fool"), ("FOOL", "fool"), ("dreamshapr-8", "dreamshaper-8"), ("xyz", None), ("", None)],
)
def test_near_names(name: str, meant: str | None) -> None:
    assert near(name, ["fool", "dreamshaper-8", "dreamshaper-7", "sdxl-base"]) == meant


def test_what_is_near_is_told() -> None:
    assert unknown_model("foo", ["fool"], "look") == "model 'foo' unknown; did you mean 'fool'?"
    assert unknown_model("foo", [], "look") == "model 'foo' unknown; look"
    assert how_to_list(["a"], "understudy models") == "`understudy models` lists them"
    assert how_to_list([], "understudy models") == "no models yet: add one with `understudyctl add`"


def test_the_nearest_of_a_thousand_is_found() -> None:
    names = [f"model-{i:04}-{'abcdefgh'[i % 8] * 3}" for i in range(1000)]
    assert near("model-0512aaa", names) == "model-0512-aaa"
