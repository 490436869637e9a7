"""A door for scrapes and probes: as little HTTP/1.1 as these need (RFC 9112), one request a connection.

What a peer sends is bounded in size and in time, and so is the number of connections; nothing that comes is
trusted or remembered.
"""

# Not http.server or prometheus_client's server over it: they bound neither connections nor a request's time
# (one byte every few seconds holds a thread for hours), know no Unix socket, and answer from threads.

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 32
PATIENCE_S = 5.0
_LEFT_READS, _LEFT_BYTES = 32, 64 * 1024
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, and a body of this type."""

    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT

    @classmethod
    def text(cls, status: HTTPStatus, text: str) -> "Answer":
        """A line for people."""
        return cls(status, f"{text}\n".encode())


Handle = Callable[[str, str], Awaitable[Answer]]
"""`handle(path, accept)`: the path without its query, and the header Accept or ""."""


class HttpDoor:
    """Serves connections that `connected` is given. `close` ends those that are open."""

    def __init__(
        self, handle: Handle, *, patience_s: float = PATIENCE_S, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self._handle = handle
        self._patience_s = patience_s
        self._max_connections = max_connections
        self._tasks: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its beginning to its end; for `asyncio.start_server`."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= self._max_connections:
            writer.transport.abort()  # scrapes are few: whoever has so many open is no scraper
            return
        self._tasks.add(task)
        try:
            async with asyncio.timeout(self._patience_s):
                answer, has_body = await self._answer(reader)
            async with asyncio.timeout(self._patience_s):
                writer.write(_head(answer) + (answer.body if has_body else b""))
                await writer.drain()
                writer.write_eof()
                for _ in range(_LEFT_READS):  # to close upon unread bytes would take the answer with it
                    if not await reader.read(_LEFT_BYTES):
                        break
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def close(self) -> None:
        """Nobody is served any more."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Answer, bool]:
        """What to say, and whether with a body."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return Answer.text(status, f"a request's head has at most {MAX_HEAD_BYTES} bytes"), True
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError from error
        line, *fields = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            return Answer.text(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request"), True
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return Answer.text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are served"), True
        pairs = (field.partition(":") for field in fields)
        accept = next((value.strip() for name, _, value in pairs if name.lower() == "accept"), "")
        return await self._made(target.partition("?")[0], accept), method == "GET"

    async def _made(self, path: str, accept: str) -> Answer:
        try:
            return await self._handle(path, accept)
        except Exception:  # noqa: BLE001  a task's boundary: one scrape fails, the daemon serves on
            _log.exception("answering %.100r failed", path)
            return Answer.text(HTTPStatus.INTERNAL_SERVER_ERROR, "see the daemon's log")


def _head(answer: Answer) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\n"
        f"Content-Length: {len(answer.body)}\r\n"
        f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    ).encode("latin-1")
