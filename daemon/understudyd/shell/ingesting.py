"""Adding a model while serving: ingest runs in a short-lived process of its own.

It imports torch and diffusers, reads gigabytes and may be killed by the kernel; none of that may
touch the process that serves.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from understudy.admin import MAX_LINE_BYTES, Add, Done, Error, Line, Note

_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class IngestFailed(Exception):
    """The source was refused or the process died; `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def ingest(store: Path, command: Add, on_note: Callable[[Note], None]) -> None:
    """Ingest `command.source` into the store folder. Raises `IngestFailed`; nothing is left behind then."""
    argv = [sys.executable, "-m", "understudyd.store.ingest", "--json", "--store", str(store)]
    argv += ["--name", command.name, "--source", command.source, "--dtype", command.dtype]
    if command.variant is not None:
        argv += ["--variant", command.variant]
    if command.ignore_pickle:
        argv.append("--ignore-pickle")
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
    )
    try:
        last, errors = await asyncio.gather(_follow(child, on_note), _tail(child))
        status = await child.wait()
    except BaseException:
        child.kill()
        await child.wait()
        raise
    match last:
        case Done():
            return
        case Error(code=code, message=message):
            raise IngestFailed(code, message)
        case _:
            raise IngestFailed("ingest_died", f"the ingest process ended with {status}: {errors}")


async def _follow(child: asyncio.subprocess.Process, on_note: Callable[[Note], None]) -> Line | None:
    """Pass notes on; the line that ends the process's report."""
    assert child.stdout is not None
    last: Line | None = None
    async for raw in child.stdout:
        try:
            last = _decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue  # a library's chatter
        if isinstance(last, Note):
            on_note(last)
    return last


async def _tail(child: asyncio.subprocess.Process) -> str:
    """The end of what it said on stderr."""
    assert child.stderr is not None
    tail = b""
    while chunk := await child.stderr.read(65536):
        tail = (tail + chunk)[-2000:]
    return tail.decode(errors="replace").strip()
