"""The `understudy` command against a real front end."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from understudy.cli import main
from understudy.wire import Failed, Generate
from wire_kit import FakeSink, Served, accepts, image_of, ipc, serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(ipc(tmp_path)) as served:
        yield served


def run(served: Served, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--endpoint", served.endpoint])


def test_generate_writes_the_image_and_says_what_it_took(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = "--negative blue --seed 9 --size 128x64 --steps 3 --guidance 4.5 --deadline 60 --priority 2"
    result = run(served, "generate", "a red circle", "-m", "sd15-red", "-o", str(out), *options.split())
    assert result.exit_code == 0, result.output
    wish = served.sink.submitted[0][1]
    assert (wish.prompt, wish.negative_prompt, wish.seed) == ("a red circle", "blue", 9)
    assert (wish.width, wish.height, wish.steps, wish.guidance) == (128, 64, 3, 4.5)
    assert (wish.deadline_s, wish.priority) == (60.0, 2)
    assert out.read_bytes() == image_of(wish)
    assert result.stdout.splitlines()[0] == str(out)
    assert "seed 9" in result.stdout and "switch 2.0 ms" in result.stdout


def test_several_images_are_numbered(served: Served, tmp_path: Path) -> None:
    result = run(served, "generate", "x", "-m", "sd15-red", "-n", "3", "-q", "-o", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-0.png", "a-1.png", "a-2.png"]
    assert served.sink.submitted[0][1].progress is False


def test_models(served: Served) -> None:
    table = run(served, "models")
    assert table.exit_code == 0
    assert "sd15-red" in table.stdout and "resident" in table.stdout and "6.4 GiB" in table.stdout
    document = json.loads(run(served, "models", "-o", "json").stdout)
    assert document[1]["name"] == "sdxl-blue" and document[1]["size_bytes"] == 6_900_000_000
    served.sink.entries = []
    assert "understudyctl add" in run(served, "models").stdout


def test_ping(served: Served) -> None:
    result = run(served, "ping")
    assert result.exit_code == 0 and "daemon-1" in result.stdout and "ms" in result.stdout


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("unknown_model", 2), ("cancelled", 2), ("queue_full", 3), ("deadline_exceeded", 3), ("load_failed", 4)],
)
def test_exit_codes_by_fault(tmp_path: Path, code: str, exit_code: int) -> None:
    def fails(sink: FakeSink, client: str, wish: Generate) -> None:
        sink.reply(client, Failed(id=wish.id, code=code, message="do this"))

    with serving(ipc(tmp_path), FakeSink(fails)) as served:
        result = run(served, "generate", "x", "-m", "m", "-o", str(tmp_path / "x.png"))
        assert result.exit_code == exit_code
        assert result.stdout == "" and "do this" in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
        assert not list(tmp_path.glob("*.png"))


def test_no_daemon(tmp_path: Path) -> None:
    for command in (["ping"], ["models"], ["generate", "x", "-m", "m"]):
        arguments = [*command, "--endpoint", ipc(tmp_path), "--wait", "0.1"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 5
        assert "is understudyd running" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x"], "--model"),
        (["generate", "x", "-m", "m", "--size", "big"], "512x768"),
        (["generate", "x", "-m", "m", "-o", "/no/such/folder/x.png"], "there is no folder"),
        (["generate", "x", "-m", "m", "--steps", "many"], "--steps"),
        (["paint"], "paint"),
    ],
)
def test_usage(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and says in result.stderr


def test_a_bad_size_is_refused_by_the_daemon(served: Served) -> None:
    result = run(served, "generate", "x", "-m", "m", "--size", "100x64")
    assert result.exit_code == 2 and "multiple of 8" in result.stderr


def test_ctrl_c_cancels_and_exits_130(tmp_path: Path) -> None:
    with serving(ipc(tmp_path), FakeSink(accepts)) as served:
        command = [sys.executable, "-m", "understudy.cli", "generate", "x", "-m", "m"]
        child = subprocess.Popen(
            [*command, "--endpoint", served.endpoint], stderr=subprocess.PIPE, cwd=tmp_path
        )
        try:
            served.sink.wait_for(lambda sink: bool(sink.submitted))
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=15)
        finally:
            child.kill()
        assert child.returncode == 130
        assert errors.decode().rstrip().endswith("understudy: cancelled")
        served.sink.wait_for(lambda sink: bool(sink.cancelled))


def test_the_environment_names_the_endpoint(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setenv("UNDERSTUDY_ENDPOINT", served.endpoint)
    assert CliRunner().invoke(main, ["ping"]).exit_code == 0
