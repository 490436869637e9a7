"""Adding a model while serving: ingest runs in a short-lived process of its own.

It imports torch and diffusers, reads gigabytes and may be killed by the kernel; none of that may
touch the process that serves.
"""

import asyncio
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from understudy.admin import MAX_LINE_BYTES, Add, AddLora, Done, Error, Line, Note, Scan
from understudyd.store.sources.opening import user_name

_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class IngestFailed(Exception):
    """The source was refused or the process died; `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def ingest(
    store: Path,
    command: Add | Scan | AddLora,
    on_note: Callable[[Note], None],
    read_only: Sequence[Path] = (),
) -> Any:
    """Ingest what `command` names into the store folder; the document that the process answers with.

    A LoRA may be for a model of the `read_only` stores.

    Raises `IngestFailed`; nothing of what failed is left behind then. A scan is done when its tree is: what
    became of each model is in its results.
    """
    module = "understudyd.store.adapters.cli" if isinstance(command, AddLora) else "understudyd.store.ingest"
    argv = [sys.executable, "-m", module, "--json", "--store", str(store)]
    argv += ingest_arguments(command)
    if isinstance(command, AddLora):
        argv += [f"--models-of={path}" for path in read_only]
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
        case Done(result=result):
            return result
        case Error(code=code, message=message):
            raise IngestFailed(code, message + _way_round(code, store, command))
        case _:
            raise IngestFailed("ingest_died", f"the ingest process ended with {status}: {errors}")


def ingest_arguments(command: Add | Scan | AddLora) -> list[str]:
    """The command line of ingest for a command, without the store and the form of its report."""
    if isinstance(command, AddLora):
        return _lora_arguments(command)
    match command:
        case Add():
            given: dict[str, str | None] = {"--name": command.name, "--source": command.source}
            given |= {"--pipeline": command.pipeline, "--revision": command.revision}
            flags: dict[str, bool] = {}
        case Scan():
            given = {"--scan": command.folder, "--name-prefix": command.name_prefix or None}
            flags = {"--dry-run": command.dry_run}
    given |= {"--variant": command.variant, "--config": command.config, "--dtype": command.dtype}
    argv = _words(given)
    argv += [f"--like={name}" for name in command.like]
    flags |= {"--ignore-pickle": command.ignore_pickle, "--replace": command.replace}
    return argv + [flag for flag, is_set in flags.items() if is_set]


def _lora_arguments(command: AddLora) -> list[str]:
    given = {"--source": command.source, "--name": command.name, "--name-prefix": command.name_prefix or None}
    given |= {"--base": command.base, "--revision": command.revision, "--weight-name": command.weight_name}
    return _words(given) + (["--replace"] if command.replace else [])


def _words(given: Mapping[str, str | None]) -> list[str]:
    """One word each, so that no value is taken for an option."""
    return [f"{option}={value}" for option, value in given.items() if value is not None]


def _way_round(code: str, store: Path, command: Add | Scan | AddLora) -> str:
    """What else to do about a path that the daemon does not see: a service's view of the disk is narrowed."""
    source = command.folder if isinstance(command, Scan) else command.source
    is_path = Path(source).is_absolute()
    if code not in ("unreadable", "not_found") or not is_path or command.is_missing:
        return ""
    user = user_name()
    verb = "ingest-lora" if isinstance(command, AddLora) else "ingest"
    words = ["sudo", "-u", user, "understudyd", verb, "--store", str(store), *ingest_arguments(command)]
    return (
        f". The daemon runs as {user} and, as a service, may see less of the disk than that user; from a "
        f"shell: {shlex.join(words)}; then: understudyctl rescan"
    )


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
