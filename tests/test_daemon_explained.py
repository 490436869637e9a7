"""What a daemon says about itself: why it did what it did, what was asked of it, and what it has learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import understudy
from daemon_kit import running_daemon
from understudy import admin
from understudy.ctl import main as ctl
from understudyd.shell.forecast_file import NAME
from understudyd.simulate import trace

OPTIONS: dict[str, Any] = {"seed": 7, "steps": 2, "width": 32, "height": 32}


def test_decisions_requests_and_what_was_learned(own_store: Path, tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"stage": {"warm_up": False}}
    requests = tmp_path / "requests.jsonl"
    (own_store / NAME).unlink(missing_ok=True)  # what other tests' daemons have learned
    explained = {"policy": {"prefetch": False, "decisions": 100}, "log": {"requests": str(requests)}}
    with running_daemon(own_store, tmp_path / "run", **quiet, **explained) as daemon:
        with understudy.Client(endpoint=daemon.endpoint) as client:
            for name in ("sd-a", "sd-b", "sd-a"):
                client.generate(name, "x", **OPTIONS)
            with pytest.raises(understudy.CallerError):
                client.generate("nobody", "x", **OPTIONS)
        made = daemon.ask(admin.Decisions())
        shown = daemon.ask(admin.Show(name="sd-b"))["decisions"]
        told = CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), "decisions"])
        assert daemon.stop() == 0
    assert [d["models"] for d in made if d["decision"] == "Chosen"] == [["sd-a"], ["sd-b"], ["sd-a"]]
    assert [d["code"] for d in made if d["decision"] == "Refused"] == ["unknown_model"]
    assert shown == [
        d | {"ago_s": s["ago_s"]} for d, s in zip((d for d in made if "sd-b" in d["models"]), shown)
    ]
    assert {d["decision"] for d in shown} >= {"Chosen", "Loading"}
    assert "sd-b unet" in {d["name"] for d in shown if d["decision"] == "Loading"}
    assert told.exit_code == 0 and len(told.output.splitlines()) >= len(made)
    logged = list(trace.read(requests))
    assert [(r.model, r.steps, r.images) for r in logged] == [("sd-a", 2, 1), ("sd-b", 2, 1), ("sd-a", 2, 1)]
    assert all(0.0 < r.duration_s < 60.0 and r.client.isalnum() for r in logged)

    assert json.loads((own_store / NAME).read_bytes())["forecast"]["requests"] == 3
    with running_daemon(own_store, tmp_path / "run", **quiet, policy={"prefetch": False}) as daemon:
        shown = daemon.ask(admin.Show(name="sd-a"))
        assert shown["chance_next"] > 0.2 and shown["decisions"] == []
        with pytest.raises(admin.AdminError, match="decisions = 1000") as off:
            daemon.ask(admin.Decisions())
        assert off.value.code == "off"
