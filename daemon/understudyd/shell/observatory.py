"""Metrics and probes over HTTP: /metrics, /healthz, /readyz, on a Unix socket and where else it is wanted.

Who reads them sees names of models and numbers, and can change nothing.
"""

import asyncio
import logging
import socket
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from understudyd.shell.endpoints import EndpointError, tcp_address
from understudyd.shell.health import Health
from understudyd.shell.http_door import MAX_HEAD_BYTES, Answer, HttpDoor
from understudyd.shell.metrics import Metrics, ScrapeStuck
from understudyd.shell.socket_access import SocketAccess, private_socket

_log = logging.getLogger(__name__)


class Observatory:
    """Listens on `path` and on the `endpoints`, "tcp://HOST:PORT", between `start` and `stop`."""

    def __init__(
        self,
        metrics: Metrics,
        health: Health,
        path: Path,
        endpoints: Sequence[str],
        access: SocketAccess,
        *,
        allow_remote: bool = False,
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._path = path
        self._access = access
        self._addresses = [tcp_address(endpoint, allow_remote=allow_remote) for endpoint in endpoints]
        self._door = HttpDoor(self._answer)
        self._servers: list[asyncio.Server] = []

    async def start(self) -> list[str]:
        """Listen; returns the endpoints, wildcard ports filled in. Raises `EndpointError`.

        A socket file left by a dead daemon is replaced. Raises `SocketAccessError`, too.
        """
        self._path.unlink(missing_ok=True)
        sock = private_socket(self._path)
        self._servers.append(
            await asyncio.start_unix_server(self._door.connected, sock=sock, limit=MAX_HEAD_BYTES)
        )
        self._access.apply(self._path)
        endpoints = []
        for host, port in self._addresses:
            try:
                server = await asyncio.start_server(
                    self._door.connected, host.strip("[]"), port, limit=MAX_HEAD_BYTES
                )
            except (OSError, socket.gaierror) as error:
                raise EndpointError(
                    f"metrics cannot be served on tcp://{host}:{port}: {error.strerror or error}; choose "
                    "another port in [metrics]"
                ) from error
            self._servers.append(server)
            endpoints += [f"tcp://{host}:{each.getsockname()[1]}" for each in server.sockets]
        if endpoints:
            _log.info("metrics on %s", ", ".join(endpoints))
        return endpoints

    async def stop(self) -> None:
        """Listen no more, and let go of who is connected."""
        for server in self._servers:
            server.close()
        await self._door.close()
        if self._servers:
            self._path.unlink(missing_ok=True)

    async def _answer(self, path: str, accept: str) -> Answer:
        match path:
            case "/metrics":
                try:
                    body, content_type = await self._metrics.scrape(accept)
                except ScrapeStuck as error:
                    return Answer.text(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
                return Answer(HTTPStatus.OK, body, content_type)
            case "/healthz":
                return _verdict(self._health.illness())
            case "/readyz":
                return _verdict(self._health.unreadiness())
            case _:
                return Answer.text(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz")


def _verdict(why_not: str) -> Answer:
    if why_not:
        return Answer.text(HTTPStatus.SERVICE_UNAVAILABLE, why_not)
    return Answer.text(HTTPStatus.OK, "ok")
