"""Keys over TCP: who gets in, who does not, and what each is told. Real sockets."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import understudy
from daemon_kit import configuration
from understudy import Keys, NotAllowed, TransportError
from understudy.keys import public_key
from understudyd.config import CurveConfig
from understudyd.shell.curve import ServerKeys, load_keys
from understudyd.shell.endpoints import EndpointError
from understudyd.shell.frontend import Frontend
from understudyd.shell.limits import Limits
from wire_kit import Dealer, FakeSink, Served, ipc, request, serving

LOOPBACK = "tcp://127.0.0.1:*"


def keypair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


ALICE, BOB, SERVER, OTHER_SERVER = (keypair() for _ in range(4))
SERVER_KEYS = ServerKeys(SERVER[1], {ALICE[0]: "alice"})


def keys_of(who: tuple[str, str], server: tuple[str, str] = SERVER) -> Keys:
    return Keys(who[1], server[0])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(LOOPBACK, keys=SERVER_KEYS, more_endpoints=[ipc(tmp_path)]) as served:
        yield served


def client(endpoint: str, keys: Keys | None, reconnect_s: float = 10.0) -> understudy.Client:
    return understudy.Client(endpoint, keys=keys, reconnect_s=reconnect_s)


def test_a_known_key_gets_in_and_the_ipc_socket_stays_plain(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "understudyd.shell.zap"), client(served.endpoint, keys_of(ALICE)) as alice:
        assert alice.generate("sd15-red", "x").images
    assert "client key alice connects from 127.0.0.1" in caplog.messages
    with client(served.endpoints[1], None) as local:
        assert local.generate("sd15-red", "x").images


def test_a_strangers_key_is_told_so_at_once(served: Served) -> None:
    with (
        client(served.endpoint, keys_of(BOB), reconnect_s=60.0) as bob,
        pytest.raises(NotAllowed, match="client_keys") as refused,
    ):
        bob.generate("sd15-red", "x")
    assert BOB[0] in str(refused.value) and BOB[1] not in str(refused.value)
    assert served.sink.submitted == [] and served.frontend.counters.received == 0


def test_no_key_is_told_so_at_once(served: Served) -> None:
    with (
        client(served.endpoint, None, reconnect_s=60.0) as nobody,
        pytest.raises(NotAllowed, match="understudy keygen"),
    ):
        nobody.generate("sd15-red", "x")
    assert served.frontend.counters.received == 0


def test_the_key_of_another_daemon_gets_nowhere_and_says_why(served: Served) -> None:
    with (
        client(served.endpoint, keys_of(ALICE, OTHER_SERVER), reconnect_s=1.0) as alice,
        pytest.raises(TransportError, match=r"no word from .* --server-key") as failed,
    ):
        alice.generate("sd15-red", "x")
    assert failed.value.code == "unreachable"
    assert served.frontend.counters.received == 0


def test_keys_towards_a_daemon_without_any() -> None:
    with serving(LOOPBACK) as plain, client(plain.endpoint, keys_of(ALICE), 60.0) as alice:
        with pytest.raises(NotAllowed, match="uses no keys"):
            alice.ping()
        assert plain.frontend.counters.received == 0


def test_a_password_is_no_key(served: Served) -> None:
    with Dealer(served.endpoint, b"plain") as dealer:
        dealer.socket.setsockopt(zmq.PLAIN_USERNAME, b"alice")
        dealer.socket.setsockopt(zmq.PLAIN_PASSWORD, b"x")
        dealer.socket.connect(served.endpoint)
        dealer.send(request())
        assert not dealer.socket.poll(300)
    assert served.frontend.counters.received == 0


def test_the_list_of_keys_may_change_while_the_daemon_serves(served: Served) -> None:
    with client(served.endpoint, keys_of(BOB)) as bob:
        with pytest.raises(NotAllowed):
            bob.ping()
        served.call(lambda: served.frontend.admit({BOB[0]: "bob"}))
        assert bob.ping().daemon == "daemon-1", "the same client, without being made anew"
    with client(served.endpoint, keys_of(ALICE)) as alice, pytest.raises(NotAllowed):
        alice.ping()


def test_nobody_gets_in_while_nobody_judges(served: Served) -> None:
    """Without an answer about a key ZeroMQ's own default would be to let it in."""
    gatekeeper = served.frontend._router._gatekeeper  # type: ignore[union-attr]
    assert gatekeeper is not None
    served.call(gatekeeper.close)
    served.frontend._router._gatekeeper = None  # type: ignore[union-attr]
    with client(served.endpoint, keys_of(ALICE), reconnect_s=1.0) as alice, pytest.raises(TransportError):
        alice.ping()
    assert served.frontend.counters.received == 0


def test_a_listener_on_the_way_reads_nothing(served: Served) -> None:
    secret = "a prompt that nobody else may read"
    with wiretap(served.endpoint) as (endpoint, heard):
        with client(endpoint, keys_of(ALICE)) as alice:
            assert alice.generate("sd15-red", secret).images
        assert sum(map(len, heard)) > 500 and secret.encode() not in b"".join(heard)
    with serving(LOOPBACK) as plain, wiretap(plain.endpoint) as (endpoint, heard):
        with client(endpoint, None) as nobody:
            assert nobody.generate("sd15-red", secret).images
        assert secret.encode() in b"".join(heard), "the wiretap works"


@contextlib.contextmanager
def wiretap(endpoint: str) -> Iterator[tuple[str, list[bytes]]]:
    """A relay for one connection that writes down what passes."""
    heard: list[bytes] = []
    host, port = endpoint.removeprefix("tcp://").split(":")

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard.append(data)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def relay() -> None:
        near, _ = server.accept()
        with near, socket.create_connection((host, int(port))) as far:
            back = threading.Thread(target=pass_on, args=(far, near))
            back.start()
            pass_on(near, far)
            back.join()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=relay)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}", heard
        thread.join(15)


# -- starting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:7000", "tcp://*:7000", "tcp://[::]:7000", "tcp://eth0:1"]
)
def test_an_open_endpoint_without_keys_is_refused_before_anything_listens(
    endpoint: str, tmp_path: Path
) -> None:
    loop = asyncio.new_event_loop()
    endpoints = [ipc(tmp_path), endpoint]
    with contextlib.closing(loop), pytest.raises(EndpointError, match="understudy keygen"):
        Frontend(loop, endpoints, FakeSink(), limits=Limits(), daemon_id="d")
    assert not (tmp_path / "u.sock").exists()


def test_with_keys_it_is_served(tmp_path: Path) -> None:
    with serving("tcp://0.0.0.0:*", keys=SERVER_KEYS, limits=Limits()) as served:
        endpoint = served.endpoint.replace("0.0.0.0", "127.0.0.1")
        with client(endpoint, keys_of(ALICE)) as alice:
            assert alice.ping().daemon == "daemon-1"
        with client(endpoint, None) as nobody, pytest.raises(NotAllowed):
            nobody.ping()


def test_the_daemon_refuses_to_start_without_keys(tmp_path: Path) -> None:
    import subprocess
    import sys

    server = {"endpoints": ["tcp://0.0.0.0:7001"]}
    config = tmp_path / "u.toml"
    config.write_text(configuration(tmp_path / "store", tmp_path / "run", server=server))
    command = [sys.executable, "-m", "understudyd.main", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "understudy keygen" in done.stderr and "Traceback" not in done.stderr


# -- files --------------------------------------------------------------------------------------------------


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_configured_files_and_credentials(tmp_path: Path) -> None:
    secret = write(tmp_path / "server.key", SERVER[1])
    clients = write(tmp_path / "clients", f"# those of us\n\n{ALICE[0]} alice\n{BOB[0]} bob@work\n", 0o644)
    chosen = CurveConfig(secret_key=secret, client_keys=clients)
    both = ServerKeys(SERVER[1], {ALICE[0]: "alice", BOB[0]: "bob@work"})
    assert load_keys(chosen, {}) == both
    assert load_keys(CurveConfig(), {}) is None
    assert SERVER[1] not in repr(both) and ALICE[1] not in repr(keys_of(ALICE))

    held = tmp_path / "credentials"
    held.mkdir()
    write(held / "curve-secret-key", SERVER[1] + "\n", 0o440)  # an ACL of the service manager shows as this
    write(held / "curve-client-keys", f"{ALICE[0]} alice", 0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(held)}
    assert load_keys(CurveConfig(), environ) == SERVER_KEYS
    assert load_keys(chosen, environ) == both, "what is configured comes first"
    (held / "curve-client-keys").unlink()
    with pytest.raises(understudy.CallerError, match="nobody could connect"):
        load_keys(CurveConfig(), environ)
    with pytest.raises(understudy.CallerError, match=r"no \[curve\] secret_key"):
        load_keys(CurveConfig(client_keys=clients), {})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622, 0o777])
def test_a_secret_key_that_others_may_read_is_not_used(tmp_path: Path, mode: int) -> None:
    secret = write(tmp_path / "a.key", ALICE[1], mode)
    server = write(tmp_path / "s.pub", f"{SERVER[0]} server", 0o644)
    with pytest.raises(understudy.CallerError, match="chmod 600"):
        Keys.read(secret, server)
    secret.chmod(0o400)
    assert Keys.read(secret, server) == keys_of(ALICE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key"),
        ("short alice", "line 1"),
        ("KEY", "line 1: no public key and name"),
        ("KEY ../alice", "line 1"),
        ("KEY a\nKEY b", "line 2: the key of a again"),
        ("KEY alicé", "no file of keys"),
        ("x" * 2**21, "larger than"),
    ],
)
def test_what_is_no_list_of_keys(tmp_path: Path, text: str, says: str) -> None:
    secret = write(tmp_path / "server.key", SERVER[1])
    clients = write(tmp_path / "clients", text.replace("KEY", ALICE[0]))
    with pytest.raises(understudy.CallerError, match=says):
        load_keys(CurveConfig(secret_key=secret, client_keys=clients), {})


def test_keygen_and_the_command_line(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from understudy.cli import main

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.chdir(tmp_path)
    line = run("keygen", "carol").splitlines()[-1]
    key, _, name = line.partition(" ")
    secret = (tmp_path / "carol.key").read_text().strip()
    assert (
        name == "carol" and public_key(secret) == key and (tmp_path / "carol.pub").read_text() == line + "\n"
    )
    assert (tmp_path / "carol.key").stat().st_mode & 0o777 == 0o600 and secret not in line
    assert CliRunner().invoke(main, ["keygen", "carol"]).exit_code == 2, "no key is overwritten"
    assert CliRunner().invoke(main, ["keygen", "../x"]).exit_code == 2

    write(tmp_path / "server.pub", f"{SERVER[0]} server\n")
    served.call(lambda: served.frontend.admit({key: name}))
    named = ("--key", "carol.key", "--server-key", "server.pub", "--endpoint", served.endpoint)
    assert "daemon daemon-1" in run("ping", *named)
    refused = CliRunner().invoke(main, ["ping", "--endpoint", served.endpoint])
    assert refused.exit_code == 5 and "keygen" in refused.output
    assert CliRunner().invoke(main, ["ping", *named[:2]]).exit_code == 2, "one key alone"
    monkeypatch.setenv("UNDERSTUDY_KEY", "carol.key")
    monkeypatch.setenv("UNDERSTUDY_SERVER_KEY", "server.pub")
    assert "sd15-red" in run("models", "--endpoint", served.endpoint)


def test_the_sink_never_hears_of_who_is_refused(served: Served) -> None:
    sink: FakeSink = served.sink
    for who in (keys_of(BOB), None, keys_of(ALICE, OTHER_SERVER)):
        with client(served.endpoint, who, reconnect_s=0.5) as one, pytest.raises(TransportError):
            one.generate("sd15-red", "x")
    assert (sink.submitted, sink.cancelled, sink.gone) == ([], [], [])
    with client(served.endpoint, keys_of(ALICE)) as alice:
        assert alice.generate("sd15-red", "x").images
