"""The admin protocol, whole, and a small blocking client for it.

Newline-delimited JSON over a Unix stream socket: one request a line, then any number of
`{"type": "note", ...}` lines (progress), then one `{"type": "done", ...}` or `{"type": "error", ...}` line.
Try it by hand: ``echo '{"cmd": "status"}' | socat - UNIX:/run/understudy/admin.sock``.

This module imports msgspec and the standard library only, so that `understudyctl` starts at once.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

MAX_LINE_BYTES = 16 * 1024 * 1024
"""The longest answer: a document about hundreds of models."""
MAX_COMMAND_BYTES = 256 * 1024
MAX_BATCH = 64


class AdminRequest(msgspec.Struct, frozen=True, kw_only=True, tag_field="cmd", forbid_unknown_fields=True):
    """Base of all admin commands."""


class Status(AdminRequest, frozen=True, kw_only=True, tag="status"):
    """The daemon at a glance."""


class Models(AdminRequest, frozen=True, kw_only=True, tag="models"):
    """Every model with its tier."""


class Show(AdminRequest, frozen=True, kw_only=True, tag="show"):
    """One model, adapter or combination of these in full; `arena` true draws the memory's maps instead."""

    name: str = ""
    arena: bool = False


class Add(AdminRequest, frozen=True, kw_only=True, tag="add"):
    """Ingest `source` as `name`: a folder or .safetensors checkpoint on the daemon's machine, or a hub id.

    A checkpoint needs the rest of a model: from the first of the models `like` that it fits, or from the
    diffusers folder `config`. `revision` is a branch, tag or commit of the hub id. Sends notes with progress.

    `pipeline` names a custom pipeline that is installed there; `source` has the weights for it.
    `is_missing` tells that the caller finds no such path either.
    """

    name: str
    source: str
    dtype: str = "keep"
    variant: str | None = None
    ignore_pickle: bool = False
    pipeline: str | None = None
    revision: str | None = None
    like: tuple[str, ...] = ()
    config: str | None = None
    replace: bool = False
    is_missing: bool = False


class Scan(AdminRequest, frozen=True, kw_only=True, tag="scan"):
    """Ingest every model below `folder`, under names made from paths with `name_prefix` before them.

    Each is served as soon as it is there: a note with its `result` says so. The document at the end has all
    results. With a prefix only names that have it count: what is there under another name is added again, and
    shares its files. `dry_run` adds nothing and says what would be tried. Other fields are those of `Add`.
    """

    folder: str
    name_prefix: str = ""
    dry_run: bool = False
    dtype: str = "keep"
    variant: str | None = None
    ignore_pickle: bool = False
    like: tuple[str, ...] = ()
    config: str | None = None
    replace: bool = False
    is_missing: bool = False


class AddLora(AdminRequest, frozen=True, kw_only=True, tag="add-lora"):
    """Ingest the LoRAs of `source`: a .safetensors file or a folder on the daemon's machine, or a hub id.

    `name` is for one LoRA; names of several are made from their paths, with `name_prefix` before them. `base`
    is the model that they are for, else every model is tried. `weight_name` is the file of a hub id that has
    several. Each is served as soon as it is there, with notes and results as of `Scan`.
    """

    source: str
    name: str | None = None
    base: str | None = None
    name_prefix: str = ""
    revision: str | None = None
    weight_name: str | None = None
    replace: bool = False
    is_missing: bool = False


class Loras(AdminRequest, frozen=True, kw_only=True, tag="loras"):
    """Every adapter with its tier, and every combination of a model and adapters that is known now."""


class RemoveLora(AdminRequest, frozen=True, kw_only=True, tag="remove-lora"):
    """Stop serving an adapter and delete it once the last request that uses it is done."""

    name: str


class Rescan(AdminRequest, frozen=True, kw_only=True, tag="rescan"):
    """Look at all stores again: serve what is new in them, and no longer what is gone."""


class Remove(AdminRequest, frozen=True, kw_only=True, tag="remove"):
    """Stop serving a model and delete it once its last request is done."""

    name: str


class Load(AdminRequest, frozen=True, kw_only=True, tag="load"):
    """Make a model resident; `wait` answers when it is."""

    name: str
    wait: bool = True


class Evict(AdminRequest, frozen=True, kw_only=True, tag="evict"):
    """Take a model out of the arena."""

    name: str


class Pin(AdminRequest, frozen=True, kw_only=True, tag="pin"):
    """Load a model and keep it resident."""

    name: str


class Unpin(AdminRequest, frozen=True, kw_only=True, tag="unpin"):
    """Let a model be evicted again."""

    name: str


class Set(AdminRequest, frozen=True, kw_only=True, tag="set"):
    """Change what is set for a model; it outlives the daemon.

    One run may make up to `max_batch` images for several requests with the same settings; 1: none shares one.
    """

    name: str
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)]


class Queue(AdminRequest, frozen=True, kw_only=True, tag="queue"):
    """Waiting and running requests in the order they will run."""


class CancelRequest(AdminRequest, frozen=True, kw_only=True, tag="cancel"):
    """Cancel a request by the id that `queue` shows."""

    id: str


class Decisions(AdminRequest, frozen=True, kw_only=True, tag="decisions"):
    """The last decisions to run, load, evict or refuse, the newest last, each with its numbers.

    Refused with `off` where the daemon keeps none.
    """

    last: Annotated[int, msgspec.Meta(ge=1)] = 100


class Loaders(AdminRequest, frozen=True, kw_only=True, tag="loaders"):
    """The loaders and what they do."""


class Trace(AdminRequest, frozen=True, kw_only=True, tag="trace"):
    """What the daemon did in the last `seconds`: a page of spans, see `understudy.trace`.

    `start` is the `next` of the page before.
    """

    seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    start: Annotated[int, msgspec.Meta(ge=0)] = 0


class Drain(AdminRequest, frozen=True, kw_only=True, tag="drain"):
    """Take no more requests; those that wait are finished. Clients hear `draining` until `Resume`.

    With `wait_s` the answer comes when all are, or as an error `not_idle` after so many seconds.
    """

    wait_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class Resume(AdminRequest, frozen=True, kw_only=True, tag="resume"):
    """Take requests again."""


class Reload(AdminRequest, frozen=True, kw_only=True, tag="reload"):
    """Read the configuration again; one that cannot be used changes nothing and is an error."""


class DropCache(AdminRequest, frozen=True, kw_only=True, tag="drop-cache"):
    """Forget the copies in the host pool that nothing uses now."""


class LogLevel(AdminRequest, frozen=True, kw_only=True, tag="log-level"):
    """What is logged from now on, by all loggers or by `logger` and those below it."""

    level: Literal["debug", "info", "warning", "error"]
    logger: str = ""


class Shutdown(AdminRequest, frozen=True, kw_only=True, tag="shutdown"):
    """Stop the daemon; requests in flight are finished within `drain_s`."""

    drain_s: float = 30.0


Command = (
    Status | Models | Show | Add | Scan | Rescan | Remove | AddLora | Loras | RemoveLora | Load | Evict | Pin
    | Unpin | Set | Queue | CancelRequest | Decisions | Loaders | Trace
    | Drain | Resume | Reload | DropCache | LogLevel | Shutdown
)  # fmt: skip


class ScanResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one find of a scan.

    `name` is empty for what is no model, `why` and `code` are for what was refused or skipped.
    `size_bytes` is the model's size in the arena, before it is added that of its files.

    Of a dry run "unchanged" is what is there already and would be compared, "replaced" what would be swapped.
    """

    outcome: Literal["added", "replaced", "unchanged", "refused", "skipped"]
    path: str
    name: str = ""
    why: str = ""
    code: str = ""
    size_bytes: int = 0


class Note(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="note"):
    """Progress of a long command: `done` of `total` (bytes unless the phase says otherwise).

    `result` comes with a scan's note that one of its finds is settled.
    """

    phase: str
    done: int = 0
    total: int = 0
    result: ScanResult | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="done"):
    """Success; `result` is the command's document."""

    result: Any = None


class Error(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """Failure; `code` is stable, `message` says what to do."""

    code: str
    message: str


Line = Note | Done | Error

_command_decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_line_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
_encoder = msgspec.json.Encoder()


class AdminError(Exception):
    """The daemon refused or failed a command, or could not be reached."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode_line(line: AdminRequest | Line) -> bytes:
    """One line, newline included."""
    return _encoder.encode(line) + b"\n"


def decode_command(line: bytes) -> Command:
    """The daemon's side. Raises `AdminError("bad_request")`, nothing else."""
    try:
        return _command_decoder.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise AdminError("bad_request", f"not an admin command: {error}") from error


def call(
    path: Path,
    command: AdminRequest,
    *,
    on_note: Callable[[Note], None] | None = None,
    timeout_s: float | None = 30.0,
) -> Any:
    """Send one command and return its result document. Raises `AdminError`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(str(path))
            sock.sendall(encode_line(command))
            with sock.makefile("rb") as lines:
                while raw := lines.readline(MAX_LINE_BYTES):
                    match _line_decoder.decode(raw):
                        case Note() as note:
                            if on_note is not None:
                                on_note(note)
                        case Done(result=result):
                            return result
                        case Error(code=code, message=message):
                            raise AdminError(code, message)
        except TimeoutError as error:
            raise AdminError("timeout", f"no answer from {path} within {timeout_s} s") from error
        except OSError as error:
            raise AdminError(
                "unreachable", f"cannot reach the daemon at {path} ({error.strerror}); is it running?"
            ) from error
        except msgspec.DecodeError as error:
            raise AdminError("unreachable", f"{path} does not speak the admin protocol: {error}") from error
    raise AdminError("unreachable", f"{path} closed the connection before it answered")
