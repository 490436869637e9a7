"""Asking a daemon's metrics door, well and badly."""

import http.client
import socket
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 30.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Response:
    status: int
    text: str
    content_type: str


def get(connection: http.client.HTTPConnection, path: str, method: str = "GET", accept: str = "") -> Response:
    """One request over a connection of its own."""
    try:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        return Response(response.status, response.read().decode(), response.headers["Content-Type"])
    finally:
        connection.close()


class Scrape:
    """A scrape's samples: `value(name, label=...)`, 0 where there is none."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == name and s.labels == labels]
        assert len(found) <= 1, f"{name} {labels} comes {len(found)} times"
        return found[0] if found else 0.0

    def labels(self, name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in self.samples if sample.name == name}

    def sum(self, name: str) -> float:
        return sum(sample.value for sample in self.samples if sample.name == name)
