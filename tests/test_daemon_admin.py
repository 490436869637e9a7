"""Operating a real daemon over its admin socket and with understudyctl."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import understudy
from daemon_kit import DaemonProcess, running_daemon
from family_kit import Family
from understudy import admin
from understudy.ctl import main as ctl

OPTIONS = {"seed": 7, "steps": 1, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def daemon(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """Serves a copy of the family's store, with nothing resident to begin with."""
    import shutil

    store = shutil.copytree(family.store, tmp_path_factory.mktemp("admin") / "store")
    more: dict[str, Any] = {"stage": {"warm_up": False}, "policy": {"prefetch": False}}
    with running_daemon(store, tmp_path_factory.mktemp("run"), arena="24MiB", **more) as daemon:
        yield daemon


def run(daemon: DaemonProcess, *arguments: str) -> Any:
    """`understudyctl -o json ...`, decoded."""
    result = CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), *arguments, "-o", "json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_add_serve_remove(daemon: DaemonProcess, family: Family) -> None:
    notes: list[admin.Note] = []
    source = str(family.folders["sd-b"])
    added = admin.call(
        daemon.admin_socket, admin.Add(name="new", source=source), on_note=notes.append, timeout_s=60
    )
    assert added["name"] == "new" and {note.phase for note in notes} >= {"load", "publish"}
    with understudy.Client(endpoint=daemon.endpoint) as client:
        assert daemon.ask(admin.Show(name="new"))["tasks"] == [], "not prepared yet"
        assert client.generate("new", "x", **OPTIONS).images == client.generate("sd-b", "x", **OPTIONS).images
    tasks = ["text-to-image", "image-to-image", "inpainting"]
    assert daemon.ask(admin.Show(name="new"))["tasks"] == tasks
    with pytest.raises(admin.AdminError, match="exists"):
        daemon.ask(admin.Add(name="new", source=source))
    removed = daemon.ask(admin.Remove(name="new"))
    assert removed["freed_bytes"] == 0 and "other models have its weights: sd-" in removed["kept"]
    with pytest.raises(admin.AdminError) as gone:
        daemon.ask(admin.Show(name="new"))
    assert gone.value.code == "unknown_model"


@pytest.mark.parametrize(
    ("name", "prepare", "says"),
    [
        ("../evil", lambda folder: None, "name"),
        ("pickled", lambda folder: (folder / "unet" / "weights.bin").write_bytes(b"x"), "pickle|safetensors"),
        ("code", lambda folder: (folder / "run.py").write_text("1"), "py"),
        ("empty", lambda folder: (folder / "model_index.json").unlink(), "model_index"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing(
    daemon: DaemonProcess, family: Family, tmp_path: Path, name: str, prepare: Any, says: str
) -> None:
    import shutil

    folder = Path(shutil.copytree(family.folders["sd-a"], tmp_path / "source"))
    prepare(folder)
    before = {row["name"] for row in daemon.ask(admin.Models())}
    with pytest.raises(admin.AdminError, match=says):
        daemon.ask(admin.Add(name=name, source=str(folder)), timeout_s=60)
    assert {row["name"] for row in daemon.ask(admin.Models())} == before


def test_load_evict_pin_unpin(daemon: DaemonProcess) -> None:
    def tier() -> str:
        return next(row["tier"] for row in daemon.ask(admin.Models()) if row["name"] == "xl")

    assert daemon.ask(admin.Load(name="xl"))["tier"] == "resident"
    assert daemon.ask(admin.Evict(name="xl"))["freed_bytes"] > 0 and tier() == "disk"
    daemon.ask(admin.Pin(name="xl"))
    assert daemon.ask(admin.Load(name="xl"))["tier"] == "resident"
    with pytest.raises(admin.AdminError, match="unpin"):
        daemon.ask(admin.Evict(name="xl"))
    daemon.ask(admin.Unpin(name="xl"))
    daemon.ask(admin.Evict(name="xl"))
    assert tier() == "disk"


def test_understudyctl_shows_the_same(daemon: DaemonProcess) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        client.generate("sd-a", "x", **OPTIONS)
    assert run(daemon, "status")["state"] == "ready"
    assert {row["name"] for row in run(daemon, "models")} >= {"sd-a", "xl"}
    assert [c["name"] for c in run(daemon, "show", "sd-a")["components"]] == ["text_encoder", "unet", "vae"]
    assert sum(e["size_bytes"] for e in run(daemon, "show", "--arena")["extents"]) == 24 * 2**20
    assert {row["state"] for row in run(daemon, "loaders")} == {"idle"}
    assert run(daemon, "queue") == []
    for command in (["status"], ["models"], ["show", "sd-a"], ["show", "--arena"], ["loaders"], ["queue"]):
        table = CliRunner().invoke(ctl, ["--socket", str(daemon.admin_socket), *command])
        assert table.exit_code == 0 and table.output.strip(), table.output


def test_the_trace_has_stage_and_loader_lanes(daemon: DaemonProcess, tmp_path: Path) -> None:
    with understudy.Client(endpoint=daemon.endpoint) as client:
        client.generate("sd-half", "x", **OPTIONS)
    spans = daemon.ask(admin.Trace(seconds=60))["spans"]
    lanes = {span["lane"] for span in spans}
    assert {"stage", "bind", "encode"} <= lanes and any(lane.startswith("loader ") for lane in lanes)
    assert all(span["end_s"] >= span["start_s"] for span in spans)


def test_garbage_on_the_admin_socket_is_answered(daemon: DaemonProcess) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(daemon.admin_socket))
        answers = sock.makefile("rb")
        for line in (b"\xff\xfe", b"{}", b'{"cmd": "status", "evil": 1}', b"[" * 5000):
            sock.sendall(line + b"\n")
            assert json.loads(answers.readline())["code"] == "bad_request"
        sock.sendall(b'{"cmd": "status"}\n')
        assert json.loads(answers.readline())["type"] == "done"
        answers.close()


def test_errors_have_stable_exit_codes(daemon: DaemonProcess, tmp_path: Path) -> None:
    def code(*arguments: str) -> int:
        return CliRunner().invoke(ctl, list(arguments)).exit_code

    socket_path = str(daemon.admin_socket)
    assert code("--socket", socket_path, "show", "nope") == 1
    assert code("--socket", socket_path, "show") == 2
    assert code("--socket", str(tmp_path / "none.sock"), "status") == 5


def test_shutdown_ends_the_daemon(family: Family, tmp_path: Path) -> None:
    with running_daemon(family.store, tmp_path / "run", stage={"warm_up": False}) as daemon:
        assert run(daemon, "shutdown") is not None
        assert daemon.wait() == 0
