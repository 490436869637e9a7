"""The admin socket: newline-delimited JSON over a Unix stream socket (protocol in `understudy.admin`).

One task a connection; commands of one connection run one after the other. Who may change things is
decided by the peer's uid, which the kernel vouches for (SO_PEERCRED).
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from understudy import admin as proto

log = logging.getLogger(__name__)

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

Notify = Callable[[proto.Note], None]
Execute = Callable[[proto.Command, Notify], Awaitable[Any]]
"""Carries a command out and returns its result document. Raises `proto.AdminError`."""


class AdminServer:
    """Accepts connections on `path` and has `execute` carry out their commands."""

    def __init__(self, path: Path, execute: Execute, *, mode: int = 0o660) -> None:
        self._path = path
        self._execute = execute
        self._mode = mode
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. A socket file left by a dead daemon is replaced; the lock says that it is dead."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._connected, path=str(self._path), limit=proto.MAX_LINE_BYTES
        )
        self._path.chmod(self._mode)

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
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the operator went away, or we are stopping
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = peer_uid(writer.get_extra_info("socket"))
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                writer.write(
                    proto.encode_line(proto.Error(code="bad_request", message="the line is too long"))
                )
                await writer.drain()
                return
            if not line:
                return
            writer.write(proto.encode_line(await self._answer(line, uid, writer)))
            await writer.drain()

    async def _answer(self, line: bytes, uid: int, writer: asyncio.StreamWriter) -> proto.Line:
        def notify(note: proto.Note) -> None:
            writer.write(proto.encode_line(note))

        try:
            command = proto.decode_command(line)
            if not isinstance(command, READ_ONLY):
                if uid not in (0, os.geteuid()):
                    raise proto.AdminError("forbidden", f"uid {uid} may look but not change; use sudo")
                log.info("admin: uid %d: %s", uid, command)
            return proto.Done(result=await self._execute(command, notify))
        except proto.AdminError as error:
            return proto.Error(code=error.code, message=str(error))
        except Exception as error:
            log.exception("admin command failed: %r", line[:200])
            return proto.Error(
                code="internal", message=f"{type(error).__name__}: {error}; see the daemon's log"
            )


def peer_uid(sock: socket.socket) -> int:
    """The uid of whoever is at the other end of a Unix socket (unix(7), SO_PEERCRED)."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", packed)[1])
