"""`config check` about endpoints, sockets and keys, before anything is started."""

from pathlib import Path

import pytest

from understudy.keys import write_pair
from understudyd.config import ConfigError, Mode, load, main


def check(path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    path.write_text(text)
    code = main(["check", str(path)])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("server", "alice"):
        write_pair(name, tmp_path)
    return tmp_path


def curve(folder: Path) -> str:
    return f'[curve]\nsecret_key = "{folder}/server.key"\nclient_keys = "{folder}/alice.pub"\n'


OPEN = '[server]\nendpoints = ["tcp://0.0.0.0:7000"]\n'


def test_an_open_door_without_keys_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(folder / "u.toml", OPEN, capsys)
    assert code == 0 and "names no keys" in said, "the service manager may have them"
    code, said = check(folder / "u.toml", OPEN + curve(folder), capsys)
    assert code == 0 and "names no keys" not in said
    code, said = check(folder / "u.toml", OPEN.replace("0.0.0.0", "127.0.0.1"), capsys)
    assert code == 0 and "names no keys" not in said


def test_bad_doors_are_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = check(folder / "u.toml", '[server]\nendpoints = ["udp://x:1"]\n', capsys)
    assert code == 1 and "is no endpoint" in said
    (folder / "server.key").chmod(0o644)
    code, said = check(folder / "u.toml", OPEN + curve(folder), capsys)
    assert code == 1 and "curve.secret_key" in said and "chmod 600" in said
    (folder / "server.key").chmod(0o600)
    (folder / "alice.pub").write_text("nonsense\n")
    code, said = check(folder / "u.toml", OPEN + curve(folder), capsys)
    assert code == 1 and "curve.client_keys" in said and "line 1" in said
    (folder / "alice.pub").unlink()
    code, said = check(folder / "u.toml", OPEN + curve(folder), capsys)
    assert code == 1 and "cannot read" in said


@pytest.mark.parametrize(
    ("endpoint", "more", "mistake"),
    [
        ("tcp://127.0.0.1:9464", "", ""),
        ("tcp://0.0.0.0:9464", "allow_remote = true\n", ""),
        ("tcp://0.0.0.0:9464", "", "allow_remote"),
        ("9464", "", "is no TCP endpoint"),
    ],
)
def test_where_metrics_may_be_served(
    endpoint: str, more: str, mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = check(tmp_path / "u.toml", f'[metrics]\nendpoints = ["{endpoint}"]\n{more}', capsys)
    assert code == bool(mistake) and mistake in said


def test_modes_of_sockets(tmp_path: Path) -> None:
    path = tmp_path / "u.toml"
    path.write_text('[server]\nsocket_mode = "0600"\n[admin]\nsocket_mode = "660"\nsocket_group = "staff"\n')
    config = load(path, {})
    assert config.server.socket_mode == Mode(0o600)
    assert (config.admin.socket_mode, config.admin.socket_group) == (Mode(0o660), "staff")
    for value in ("660", '"0860"', '"rw-rw----"', "true", '"66"', '""'):
        path.write_text(f"[admin]\nsocket_mode = {value}\n")
        with pytest.raises(ConfigError, match="is no mode of a socket"):
            load(path, {})
