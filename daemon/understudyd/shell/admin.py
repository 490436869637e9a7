"""The admin socket: newline-delimited JSON over a Unix stream socket (protocol in `understudy.admin`).

One task a connection; commands of one connection run one after the other. Who may look and who may change
things is decided by what the kernel says of the peer. Every change, done or refused, is written to the log
with the peer's uid, whatever the log's level.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from understudy import admin as proto
from understudyd.shell.socket_access import Peer, SocketAccess, may_change, peer_of, private_socket

log = logging.getLogger(__name__)
audit = logging.getLogger("understudyd.audit")

READ_ONLY = (
    proto.Status,
    proto.Models,
    proto.Loras,
    proto.Show,
    proto.Queue,
    proto.Decisions,
    proto.Loaders,
    proto.Trace,
)

_MAX_ONLOOKERS = 64
_SHOWN_BYTES = 200
_LAST_WORDS_S = 2.0

Notify = Callable[[proto.Note], None]
Execute = Callable[[proto.Command, Notify], Awaitable[Any]]
"""Carries a command out and returns its result document. Raises `proto.AdminError`."""


class AdminServer:
    """Accepts connections on `path` and has `execute` carry out their commands.

    Onlookers, who may not change anything, share a bounded number of connections.
    """

    def __init__(self, path: Path, execute: Execute, *, access: SocketAccess | None = None) -> None:
        self._path = path
        self._execute = execute
        self._access = access or SocketAccess()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._onlookers = 0

    async def start(self) -> None:
        """Listen. A socket file left by a dead daemon is replaced; the lock says that it is dead.

        Raises `SocketAccessError` when the socket cannot be given to its group.
        """
        audit.setLevel(logging.INFO)
        self._path.unlink(missing_ok=True)
        sock = private_socket(self._path)
        try:
            self._access.apply(self._path)
            self._server = await asyncio.start_unix_server(
                self._connected, sock=sock, limit=proto.MAX_COMMAND_BYTES
            )
        except BaseException:
            sock.close()
            raise

    async def stop(self) -> None:
        """Close the door and what is open."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        onlookers = 0
        try:
            peer = peer_of(writer.get_extra_info("socket"))
            onlookers = 0 if may_change(peer) else 1
            self._onlookers += onlookers
            if (refusal := self._refusal(peer)) is None:
                await self._serve(reader, writer, peer)
            else:
                await _turn_away(reader, writer, refusal)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the operator went away, or we are stopping
        finally:
            self._onlookers -= onlookers
            self._tasks.discard(task)
            writer.close()

    def _refusal(self, peer: Peer) -> proto.Error | None:
        """Why this peer is not served at all."""
        if not self._access.may_look(peer, self._path):
            log.warning("admin: uid %d (pid %d) is no member of the socket's group", peer.uid, peer.pid)
            return proto.Error(
                code="forbidden",
                message=f"uid {peer.uid} may not look; use sudo, or join the group of {self._path}",
            )
        if not may_change(peer) and self._onlookers > _MAX_ONLOOKERS:
            message = f"{_MAX_ONLOOKERS} others are looking already; try again later, or use sudo"
            return proto.Error(code="busy", message=message)
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                message = f"the line is longer than {proto.MAX_COMMAND_BYTES} bytes"
                await _say(writer, proto.Error(code="bad_request", message=message))
                return
            if not line:
                return
            await _say(writer, await self._answer(line, peer, writer))

    async def _answer(self, line: bytes, peer: Peer, writer: asyncio.StreamWriter) -> proto.Line:
        def notify(note: proto.Note) -> None:
            writer.write(proto.encode_line(note))

        try:
            command = proto.decode_command(line)
            if isinstance(command, READ_ONLY):
                return proto.Done(result=await self._execute(command, notify))
            return proto.Done(result=await self._change(command, peer, notify))
        except proto.AdminError as error:
            return proto.Error(code=error.code, message=str(error))
        except Exception as error:  # a task's boundary: one command fails, the daemon serves on
            log.exception("admin command failed: %r", line[:_SHOWN_BYTES])
            return proto.Error(
                code="internal", message=f"{type(error).__name__}: {error}; see the daemon's log"
            )

    async def _change(self, command: proto.Command, peer: Peer, notify: Notify) -> Any:
        """Written down before it is done, and what came of it after."""
        if not may_change(peer):
            audit.info("uid %d (pid %d) may not: %s", peer.uid, peer.pid, command)
            raise proto.AdminError("forbidden", f"uid {peer.uid} may look but not change; use sudo")
        audit.info("uid %d (pid %d): %s", peer.uid, peer.pid, command)
        try:
            result = await self._execute(command, notify)
        except BaseException as error:
            audit.info("uid %d (pid %d): %s: %r", peer.uid, peer.pid, _tag(command), error)
            raise
        audit.info("uid %d (pid %d): %s: done", peer.uid, peer.pid, _tag(command))
        return result


def _tag(command: proto.Command) -> str:
    return str(command.__struct_config__.tag)


async def _turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, why: proto.Error) -> None:
    """The question is read, within limits: to close upon unread bytes would take the answer with it."""
    with contextlib.suppress(TimeoutError, ValueError):
        async with asyncio.timeout(_LAST_WORDS_S):
            await reader.readline()
    await _say(writer, why)


async def _say(writer: asyncio.StreamWriter, line: proto.Line) -> None:
    writer.write(proto.encode_line(line))
    await writer.drain()
