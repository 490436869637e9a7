"""Shell completion of both commands, asked for as the shells' own scripts ask."""

import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from understudy import admin
from understudy.cli import main
from understudy.ctl import main as ctl
from wire_kit import Served, ipc, serving


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(ipc(tmp_path)) as served:
        yield served


@pytest.fixture
def admin_socket(tmp_path: Path) -> Iterator[Path]:
    """An admin socket that knows three models."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert isinstance(admin.decode_command(self.rfile.readline()), admin.Models)
            models = [{"name": name, "tier": "disk"} for name in ("anime", "anime-2", "photo")]
            self.wfile.write(admin.encode_line(admin.Done(result=models)))

    path = tmp_path / "admin.sock"
    with socketserver.UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield path
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    for group, name in ((main, "understudy"), (ctl, "understudyctl")):
        result = CliRunner().invoke(group, ["--completion", shell])
        assert result.exit_code == 0
        assert f"_{name.upper()}_COMPLETE={shell}_complete" in result.stdout


def completed(endpoint: str, words: str) -> tuple[list[str], str]:
    """What the shell would get for the last of these words, and what would disturb its prompt."""
    command = words.split(" ")[0]
    asked = {f"_{command.upper()}_COMPLETE": "bash_complete", "COMP_WORDS": words}
    asked["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    environment = os.environ | asked | {"UNDERSTUDY_ENDPOINT": endpoint}
    module = {"understudy": "cli", "understudyctl": "ctl"}[command]
    code = f"from understudy.{module} import main; main(prog_name={command!r})"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30
    )
    return [line.partition(",")[2] for line in ended.stdout.splitlines() if line], ended.stderr


def test_model_names_are_completed_from_the_daemon(served: Served) -> None:
    endpoint = served.endpoint
    assert completed(endpoint, "understudy generate -m sd") == (["sd15-red", "sdxl-blue"], "")
    assert completed("ipc:///no", f"understudy generate --endpoint {endpoint} --model sdx")[0] == [
        "sdxl-blue"
    ]
    assert completed(endpoint, "understudy models sd1")[0] == ["sd15-red"]
    assert "--init-image" in completed(endpoint, "understudy generate --in")[0]
    assert "inpainting-controlnet" in completed(endpoint, "understudy generate --task inp")[0]


def test_completion_is_silent_without_a_daemon(tmp_path: Path) -> None:
    assert completed(ipc(tmp_path), "understudy generate -m sd") == ([], "")
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert completed(endpoint, "understudy generate -m sd") == ([], "")


def test_bash_completes_with_the_script_it_was_given(served: Served, tmp_path: Path) -> None:
    """The whole way: the script is sourced, its function fills COMPREPLY."""
    stand_in = tmp_path / "understudy"
    stand_in.write_text(f"#!{sys.executable}\nfrom understudy.cli import main\nmain()\n")
    stand_in.chmod(0o755)
    script = """
        eval "$(understudy --completion bash)"
        COMP_WORDS=(understudy generate -m sdx) COMP_CWORD=3
        _understudy_completion understudy
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "UNDERSTUDY_ENDPOINT": served.endpoint,
    }
    ended = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=30
    )
    assert (ended.stdout, ended.stderr) == ("sdxl-blue\n", "")


def test_operators_complete_names_from_the_admin_socket(admin_socket: Path, tmp_path: Path) -> None:
    for command in ("show", "remove", "load", "evict", "pin", "unpin", "set"):
        words = f"understudyctl --socket {admin_socket} {command} anim"
        assert completed("", words) == (["anime", "anime-2"], "")
    assert completed("", f"understudyctl --socket {tmp_path}/none evict a") == ([], "")
