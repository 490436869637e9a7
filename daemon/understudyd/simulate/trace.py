"""Recorded requests, one after another: CSV, or the daemon's own request log; plain or gzip.

CSV has a header; `arrival_s` and `model` must be there, the other columns of `TraceRequest` may, and those
that it does not know are left out. The request log is JSON lines: one object a request, same names. Both are
sorted by arrival. A file is read as a stream, however long it is.
"""

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from understudyd.recorded import TraceRequest, loras_of

_GZIP_MAGIC = b"\x1f\x8b"


class TraceError(Exception):
    """The trace cannot be used; the message says where and why."""


_CONVERT: dict[str, Callable[[str], Any]] = {
    "arrival_s": float, "duration_s": float, "images": int, "steps": int, "priority": int,
}  # fmt: skip
_COLUMNS = TraceRequest.__struct_fields__


def read(path: Path) -> Iterator[TraceRequest]:
    """All requests in order. Raises `TraceError`."""
    try:
        with _open(path) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="") as text:
            yield from _checked(path, _lines(text))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read {path}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if is_gzip else path.open("rb")


def _lines(text: IO[str]) -> Iterator[TraceRequest]:
    first = text.readline()
    if first.lstrip().startswith("{"):
        decode = msgspec.json.Decoder(TraceRequest).decode
        yield decode(first)
        for line in text:
            if not line.isspace():
                yield decode(line)
        return
    header = next(csv.reader([first]), [])
    if missing := {"arrival_s", "model"} - set(header):
        raise ValueError(f"no column {' and '.join(sorted(missing))} in the header")
    columns = [(header.index(name), name, _CONVERT.get(name, str)) for name in _COLUMNS if name in header]
    for row in csv.reader(text):
        if row:
            yield TraceRequest(
                **{n: convert(row[i]) for i, n, convert in columns if row[i] or convert is str}
            )


def _checked(path: Path, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
    """Number what is wrong, and see to it that time does not go back."""
    number, before_s = 0, float("-inf")
    while True:
        number += 1
        try:
            request = next(requests, None)
        except (ValueError, TypeError, IndexError, msgspec.MsgspecError) as error:
            raise TraceError(f"{path}, request {number}: {error}") from error
        if request is None:
            return
        if not before_s <= request.arrival_s < float("inf"):
            raise TraceError(f"{path}, request {number}: comes before the one before it; sort by arrival_s")
        if request.images < 1 or request.steps < 1:
            raise TraceError(f"{path}, request {number}: images and steps must be at least 1")
        try:
            loras_of(request.loras)
        except ValueError as error:
            raise TraceError(f"{path}, request {number}: loras {request.loras!r}: {error}") from error
        before_s = request.arrival_s
        yield request


@dataclass(frozen=True, slots=True)
class Survey:
    """What must be known of a trace before it is played: found out in a pass of its own.

    `models` in order of their first request; `image_steps` sums images x steps, `images` the images.
    `combinations` counts models with adapters as they were asked for, `adapters` these.
    """

    path: Path
    models: tuple[str, ...]
    requests: int
    first_s: float
    last_s: float
    images: int
    image_steps: int
    combinations: int = 0
    adapters: int = 0

    @property
    def span_s(self) -> float:
        """Seconds from the first request to the last."""
        return self.last_s - self.first_s


def survey(path: Path) -> Survey:
    """Read the trace once. Raises `TraceError`, also when there is no request in it."""
    models: dict[str, None] = {}
    combinations: set[tuple[str, str]] = set()
    adapters: set[str] = set()
    requests = images = image_steps = 0
    first_s: float | None = None
    last_s = 0.0
    for request in read(path):
        last_s = request.arrival_s
        first_s = last_s if first_s is None else first_s
        requests += 1
        models.setdefault(request.model)
        if request.loras:
            combinations.add((request.model, request.loras))
            adapters.update(name for name, _ in loras_of(request.loras))
        images += request.images
        image_steps += request.images * request.steps
    if first_s is None:
        raise TraceError(f"{path} has no requests")
    counts = (len(combinations), len(adapters))
    return Survey(path, tuple(models), requests, first_s, last_s, images, image_steps, *counts)
