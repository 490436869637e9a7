"""The `understudy` command against a real front end."""

import inspect
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from understudy import AsyncClient, Client
from understudy.cli import main, ping
from understudy.session import Patience
from understudy.wire import Failed, Generate
from wire_kit import FakeSink, Served, accepts, finished, image_of, ipc, serving


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
    assert "visible" not in result.stdout, "nobody had to wait"


@pytest.mark.parametrize("switched", [True, False])
def test_the_visible_switch_is_called_so(tmp_path: Path, switched: bool) -> None:
    """As in the daemon's status, and not where the gap before it had another reason."""

    def waited(sink: FakeSink, client: str, request: Generate) -> None:
        reply, images = finished(request)
        timings = msgspec.structs.replace(reply.timings, gap_s=0.00375)
        sink.reply(client, msgspec.structs.replace(reply, timings=timings, switched=switched), images)

    with serving(ipc(tmp_path), FakeSink(waited)) as served:
        result = run(served, "generate", "x", "-m", "sd15-red", "-q", "-o", str(tmp_path / "a.png"))
    assert ("; visible switch 3.75 ms" in result.stdout) == switched, result.output


def test_no_switch_is_told_where_none_took_place(tmp_path: Path) -> None:
    def on_stage(sink: FakeSink, client: str, request: Generate) -> None:
        reply, images = finished(request)
        sink.reply(client, msgspec.structs.replace(reply, tier="bound", switched=False), images)

    with serving(ipc(tmp_path), FakeSink(on_stage)) as served:
        result = run(served, "generate", "x", "-m", "sd15-red", "-q", "-o", str(tmp_path / "a.png"))
    assert "(was bound)" in result.stdout and "run 1.500 s" in result.stdout, result.output
    assert "switch" not in result.stdout.splitlines()[1]


def test_several_images_are_numbered(served: Served, tmp_path: Path) -> None:
    result = run(served, "generate", "x", "-m", "sd15-red", "-n", "3", "-q", "-o", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-0.png", "a-1.png", "a-2.png"]
    assert served.sink.submitted[0][1].progress is False


def test_count_asks_with_one_seed_after_the_other(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "a.jpg"
    options = ["--count", "11", "--seed", "5", "-n", "2", "--quality", "80"]
    result = run(served, "generate", "x", "-m", "sd15-red", "-o", str(out), *options)
    assert result.exit_code == 0, result.output
    wishes = [wish for _, wish in served.sink.submitted]
    assert [wish.seed for wish in wishes] == list(range(5, 16))
    assert {(wish.format, wish.quality, wish.images) for wish in wishes} == {("jpeg", 80, 2)}
    names = [f"a-{i:02}-{j}.jpg" for i in range(11) for j in range(2)]
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == names
    assert (tmp_path / "a-03-1.jpg").read_bytes() == image_of(wishes[3], 1)
    assert result.stdout.count("seed ") == 11


def test_count_keeps_what_was_made_before_a_failure(tmp_path: Path) -> None:
    def fails_later(sink: FakeSink, client: str, wish: Generate) -> None:
        if wish.seed < 2:
            sink.finish(client, wish)
        else:
            sink.reply(client, Failed(id=wish.id, code="out_of_memory", message="ask for less"))

    with serving(ipc(tmp_path), FakeSink(fails_later)) as served:
        options = ["-m", "m", "--count", "5", "--seed", "0", "-o", str(tmp_path / "a.png")]
        result = run(served, "generate", "x", *options)
    assert result.exit_code == 3 and "ask for less" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a-0.png", "a-1.png"]
    assert "a-1.png" in result.stdout and "a-2.png" not in result.stdout


def png(path: Path, width: int) -> Path:
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIB", 13, b"IHDR", width, 8, 8) + b"\2" + bytes(9)
    )
    return path


def test_images_and_the_pipelines_own_arguments(served: Served, tmp_path: Path) -> None:
    names = ("init", "mask", "control", "style")
    files = {name: str(png(tmp_path / f"{name}.png", width)) for width, name in enumerate(names, 1)}
    result = run(
        served, "generate", "-m", "sd15-red", "-o", str(tmp_path / "o.webp"),
        "--init-image", files["init"], "--mask", files["mask"], "--control-image", files["control"],
        "--input", f"ip_adapter_image={files['style']}", "--strength", "0.25",
        "--task", "inpainting-controlnet", "--scheduler", "DDIMScheduler",
        "--set", "eta=0.5", "--set", "clip_skip=2", "--set", "flag=true", "--set", "note=a=b c",
        "--set", "sigmas=[1, 0.5]", "--set", "nothing=null", "--set", 'quoted="7"',
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    wish = served.sink.submitted[0][1]
    assert {info.name: info.width for info in wish.inputs} == {
        "image": 1, "mask_image": 2, "control_image": 3, "ip_adapter_image": 4,
    }  # fmt: skip
    assert wish.options == {
        "eta": 0.5, "clip_skip": 2, "flag": True, "note": "a=b c", "sigmas": [1, 0.5], "nothing": None,
        "quoted": "7", "strength": 0.25,
    }  # fmt: skip
    assert (wish.task, wish.scheduler, wish.format) == ("inpainting-controlnet", "DDIMScheduler", "webp")
    assert (wish.prompt, wish.quality) == ("", None)


@pytest.mark.parametrize(
    ("arguments", "format", "file"),
    [
        (["-o", "a.png"], "png", "a.png"),
        (["-o", "a.JPEG"], "jpeg", "a.JPEG"),
        (["-o", "a"], "png", "a.png"),
        (["-o", "a", "--format", "webp"], "webp", "a.webp"),
        (["-o", "a.mp4"], "mp4", "a.mp4"),
        (["-o", "a.v1", "--format", "jpeg"], "jpeg", "a.v1.jpg"),
        (["--format", "jpeg"], "jpeg", "out.jpg"),
        ([], "png", "out.png"),
    ],
)
def test_the_suffix_chooses_the_format(
    served: Served, tmp_path: Path, monkeypatch: Any, arguments: list[str], format: str, file: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    result = run(served, "generate", "x", "-m", "sd15-red", *arguments)
    assert result.exit_code == 0, result.output
    assert served.sink.submitted[0][1].format == format
    assert [path.name for path in folder.iterdir()] == [file]


def test_models(served: Served) -> None:
    table = run(served, "models")
    assert table.exit_code == 0
    assert "sd15-red" in table.stdout and "resident" in table.stdout and "6.4 GiB" in table.stdout
    document = json.loads(run(served, "models", "-o", "json").stdout)
    assert document[1]["name"] == "sdxl-blue" and document[1]["size_bytes"] == 6_900_000_000
    assert "sdxl-blue" not in run(served, "models", "RED").stdout
    assert "sdxl-blue" in run(served, "models", "sdxl-*").stdout
    assert run(served, "models", "x-*").stdout == "none of 2 models matches 'x-*'\n"
    assert json.loads(run(served, "models", "x-*", "-o", "json").stdout) == []
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
        assert f"understudy: error [{code}]: " in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.strip()]) == 1
        assert not list(tmp_path.glob("*.png"))


def test_no_daemon(tmp_path: Path) -> None:
    for command in (["ping"], ["models"], ["generate", "x", "-m", "m"]):
        arguments = [*command, "--endpoint", ipc(tmp_path), "--wait", "0.1"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 5
        assert "is understudyd running" in result.stderr and "error [unreachable]: " in result.stderr


def test_the_command_waits_as_long_as_both_clients() -> None:
    """A daemon that restarts is waited for alike, whichever way one asks."""
    waits = {parameter.default for parameter in ping.params if parameter.name == "wait_s"}
    waits |= {inspect.signature(kind).parameters["reconnect_s"].default for kind in (Client, AsyncClient)}
    assert waits == {Patience().reconnect_s}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x"], "--model"),
        (["generate", "x", "-m", "m", "--size", "big"], "512x768"),
        (["generate", "x", "-m", "m", "-o", "/no/such/folder/x.png"], "there is no folder"),
        (["generate", "x", "-m", "m", "--steps", "many"], "--steps"),
        (["generate", "x", "-m", "m", "-o", "x.bmp"], "names no format"),
        (["generate", "x", "-m", "m", "-o", "x.png", "--format", "jpeg"], "end it in .jpg"),
        (["generate", "x", "-m", "m", "--init-image", "/no/such.png"], "does not exist"),
        (["generate", "x", "-m", "m", "--set", "strength"], "strength=0.6"),
        (["generate", "x", "-m", "m", "--set", "=5"], "NAME=VALUE"),
        (["generate", "x", "-m", "m", "--count", "0"], "--count"),
        (["--completion", "tcsh"], "bash"),
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
        # Told by the cancel, or by the closed connection where that is seen first.
        served.sink.wait_for(lambda sink: bool(sink.cancelled or sink.gone))


def test_an_image_that_is_none_is_the_callers_fault(served: Served, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    result = run(served, "generate", "x", "-m", "m", "--init-image", str(tmp_path / "x.png"))
    assert result.exit_code == 2 and "give a PNG, JPEG or WebP file" in result.stderr


def test_what_the_daemon_suggests_is_shown_as_it_is(tmp_path: Path) -> None:
    message = "model 'foo' unknown; did you mean 'fool'?"

    def unknown(sink: FakeSink, client: str, wish: Generate) -> None:
        sink.reply(client, Failed(id=wish.id, code="unknown_model", message=message))

    with serving(ipc(tmp_path), FakeSink(unknown)) as served:
        result = run(served, "generate", "x", "-m", "foo", "-q")
        assert (result.exit_code, result.stderr) == (2, f"understudy: error [unknown_model]: {message}\n")


def test_the_environment_names_the_endpoint(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setenv("UNDERSTUDY_ENDPOINT", served.endpoint)
    assert CliRunner().invoke(main, ["ping"]).exit_code == 0
