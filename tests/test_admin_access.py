"""Who may do what at the admin socket, and what is written down about it: real sockets, real users."""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peer_kit import STRANGER, ask_as, needs_root, open_folder, some_group
from understudy import admin
from understudyd.shell.admin import AdminServer, Notify, audit
from understudyd.shell.socket_access import SocketAccess, SocketAccessError, peer_of, private_socket

STATUS, EVICT = {"cmd": "status"}, {"cmd": "evict", "name": "sd-a"}


class Executed:
    """Stands where `Commands` stands."""

    def __init__(self) -> None:
        self.commands: list[admin.Command] = []

    async def __call__(self, command: admin.Command, notify: Notify) -> Any:
        self.commands.append(command)
        if isinstance(command, admin.Unpin):
            raise admin.AdminError("unknown_model", "no such model")
        return {"done": True}


@asynccontextmanager
async def served(path: Path, access: SocketAccess | None = None) -> AsyncIterator[Executed]:
    executed = Executed()
    server = AdminServer(path, executed, access=access)
    await server.start()
    try:
        yield executed
    finally:
        await server.stop()


def asked(path: Path, line: dict[str, Any], **who: Any) -> Any:
    return asyncio.to_thread(ask_as, path, line, **who)


@needs_root
@pytest.mark.parametrize("as_supplementary", [False, True])
def test_the_group_may_look_and_not_change(as_supplementary: bool) -> None:
    name, gid = some_group()
    who: dict[str, Any] = {"gid": STRANGER, "groups": (gid,)} if as_supplementary else {"gid": gid}

    async def scene(path: Path) -> None:
        async with served(path, SocketAccess(group=name)) as executed:
            assert path.stat().st_gid == gid and stat.S_IMODE(path.stat().st_mode) == 0o660
            assert (await asked(path, STATUS, uid=STRANGER, **who))["type"] == "done"
            refused = await asked(path, EVICT, uid=STRANGER, **who)
            assert refused["code"] == "forbidden" and f"uid {STRANGER}" in refused["message"]
            assert [type(command) for command in executed.commands] == [admin.Status]

    with open_folder() as folder:
        asyncio.run(scene(folder / "admin.sock"))


@needs_root
def test_a_stranger_is_shut_out_by_the_file_and_by_the_daemon() -> None:
    async def scene(path: Path) -> None:
        async with served(path) as executed:
            assert (await asked(path, STATUS, uid=STRANGER))["type"] == "shut out"
            path.chmod(0o666)  # somebody widened the file: the daemon looks at the peer as well
            for line in (STATUS, EVICT):
                assert (await asked(path, line, uid=STRANGER))["code"] == "forbidden"
            assert executed.commands == []

    with open_folder() as folder:
        asyncio.run(scene(folder / "admin.sock"))


@needs_root
def test_a_socket_that_is_open_to_all_lets_all_look() -> None:
    async def scene(path: Path) -> None:
        async with served(path, SocketAccess(mode=0o666)):
            assert (await asked(path, STATUS, uid=STRANGER))["type"] == "done"
            assert (await asked(path, EVICT, uid=STRANGER))["code"] == "forbidden"

    with open_folder() as folder:
        asyncio.run(scene(folder / "admin.sock"))


@needs_root
def test_root_and_the_daemons_user_may_change_things(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(path: Path) -> None:
        async with served(path, SocketAccess(mode=0o666)) as executed:
            assert (await asked(path, EVICT, uid=0, gid=0))["type"] == "done"
            monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
            assert (await asked(path, EVICT, uid=STRANGER))["type"] == "done"
            assert (await asked(path, EVICT, uid=STRANGER + 1))["code"] == "forbidden"
            assert len(executed.commands) == 2

    with open_folder() as folder:
        asyncio.run(scene(folder / "admin.sock"))


def test_onlookers_cannot_keep_the_operator_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their connections are bounded; those of who may change things are not counted."""
    path = tmp_path / "admin.sock"

    async def scene() -> None:
        async with served(path, SocketAccess(mode=0o666)):
            monkeypatch.setattr("understudyd.shell.admin.may_change", lambda peer: False)
            idle = [await asyncio.open_unix_connection(str(path)) for _ in range(64)]
            for reader, writer in idle:
                writer.write(b'{"cmd": "status"}\n')
                assert b"done" in await reader.readline()
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b'{"cmd": "status"}\n')
            assert b"busy" in await reader.readline()
            monkeypatch.undo()
            operator_reader, operator = await asyncio.open_unix_connection(str(path))
            operator.write(b'{"cmd": "evict", "name": "x"}\n')
            assert b"done" in await operator_reader.readline()
            for each in (writer, operator, *(writer for _, writer in idle)):
                each.close()

    asyncio.run(scene())


def test_every_change_is_written_down_whatever_the_level(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "admin.sock"

    async def scene() -> None:
        async with served(path):
            logging.getLogger().setLevel(logging.ERROR)
            for command in (admin.Status(), admin.Evict(name="sd\n-a"), admin.Unpin(name="gone")):
                try:
                    await asyncio.to_thread(admin.call, path, command)
                except admin.AdminError as error:
                    assert error.code == "unknown_model"

    level = logging.getLogger().level
    try:
        asyncio.run(scene())
    finally:
        logging.getLogger().setLevel(level)
    lines = [record.getMessage() for record in caplog.records if record.name == audit.name]
    who = f"uid {os.getuid()} (pid {os.getpid()}): "
    assert [line.removeprefix(who) for line in lines] == [
        "Evict(name='sd\\n-a')",
        "evict: done",
        "Unpin(name='gone')",
        "unpin: AdminError('no such model')",
    ]


def test_a_line_that_does_not_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"

    async def scene() -> None:
        async with served(path):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"x" * (admin.MAX_COMMAND_BYTES + 1))
            assert b"longer than" in await reader.readline() and await reader.read() == b""
            writer.close()

    asyncio.run(scene())


def test_a_group_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SocketAccessError, match="groupadd"):
        asyncio.run(served(tmp_path / "admin.sock", SocketAccess(group="no-such-group")).__aenter__())


def test_a_private_socket_is_never_open_to_others(tmp_path: Path) -> None:
    """Whatever the umask: there is no moment between bind and chmod."""
    before = os.umask(0)
    try:
        with private_socket(tmp_path / "s"):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_peer_has_pid_uid_and_groups(tmp_path: Path) -> None:
    with private_socket(tmp_path / "s") as server, socket.socket(socket.AF_UNIX) as client:
        server.listen()
        client.connect(str(tmp_path / "s"))
        accepted, _ = server.accept()
        with accepted:
            peer = peer_of(accepted)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} == peer.groups
