"""The ZeroMQ protocol, whole: every message between a client and the daemon is defined here.

DEALER (client) to ROUTER (daemon). A message is one msgpack header frame of at most 64 KiB, then raw
payload frames (images). The header is a tagged map: `type` names the struct, `v` the protocol
version. Unknown fields are ignored, new fields carry defaults, so that minor versions mix. Input images
travel with `Generate`, outputs with `Finished`.

Ids belong to the client. A request that was sent again under its id is the same request: it runs
once within a daemon's life and gets exactly one answer, `Finished` or `Failed`. The seed is fixed
before the first send, so that a request that runs again after a crash gives the same image.

A `Generate` with inputs may come again without its frames, as a question: a daemon that knows the id answers
as always, one that does not says `Failed(code="inputs_missing")`, and the client sends it whole.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_ID_CHARS = 64
MAX_SEED = 2**63 - 1
MAX_INPUTS = 16
MAX_ADAPTERS = 16
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""One payload frame of a request: a larger one costs the connection. Daemons may allow less, and say so."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Common to all: the protocol version the sender speaks."""

    v: int = PROTOCOL_VERSION


# -- requests --------------------------------------------------------------------------------------


class InputInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One payload frame of a request: the image for the pipeline's argument `name`.

    `name` is "image", "mask_image", "control_image", ...; several frames of one name make a list, in order.
    `format` is "raw" (`height * width * channels` bytes, uint8 rows, 1, 3 or 4 channels), "png", "jpeg" or
    "webp"; the sizes are checked against the file's own header before anything is decoded.
    """

    name: str
    format: str
    width: int
    height: int
    channels: int = 3


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA and how strongly it is to work: 1 as it was trained, 0 not at all."""

    name: str
    scale: float = 1.0


Option = bool | int | float | str | list[bool | int | float | str | None] | None
"""What a pipeline-specific argument may be on the wire."""


class Generate(Message, frozen=True, kw_only=True, tag="generate"):
    """Ask for images or video. None means the pipeline's own default.

    `task` is "text-to-image", "image-to-image", "inpainting", or one of them with "-controlnet" behind it,
    over the model's own components; None is the model's own pipeline, or what fits the inputs where that one
    takes none. `scheduler` replaces the model's own by a class name from an allow-list. `options` are
    further keyword arguments of the pipeline, checked against its signature. Each of `inputs` describes
    one payload frame. `adapters` are folded into the model one after the other: their order counts. `model`
    may be an adapter's name: it is then used with its base.

    `width` and `height` are pixels, `deadline_s` seconds from receipt, `priority` higher first.
    `images` counts images per prompt. `format` is "png", "jpeg", "webp" (`quality` 1 to 100 for these two),
    "raw" (rows of uint8), "latent" (see `ImageInfo`), or "mp4" for pipelines that make video; in the other
    formats each frame of a video is an image. `progress` asks for `Progress` messages.
    """

    id: str
    model: str
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    images: int = 1
    task: str | None = None
    scheduler: str | None = None
    options: dict[str, Option] = {}
    inputs: tuple[InputInfo, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    format: str = "png"
    quality: int | None = None
    progress: bool = True


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Take a request back. It is answered `Failed(code="cancelled")` unless it was answered already."""

    id: str


class ListModels(Message, frozen=True, kw_only=True, tag="list_models"):
    """Ask for `ModelList`."""

    id: str


class Ping(Message, frozen=True, kw_only=True, tag="ping"):
    """Heartbeat; ask for `Pong`. A client with open requests that stops pinging is expired."""

    id: str


Request = Generate | Cancel | ListModels | Ping

# -- replies ---------------------------------------------------------------------------------------


class Accepted(Message, frozen=True, kw_only=True, tag="accepted"):
    """The request waits. `position` counts requests before it, `tier` says where its model is.

    `estimated_wait_s`: when it should be on stage, seconds from now; None where the daemon does not say.
    """

    id: str
    position: int
    tier: str
    estimated_wait_s: float | None = None


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """`step` of `steps` denoising steps are done. May be coalesced, never reordered."""

    id: str
    step: int
    steps: int


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a finished request; the first four, added in this order, are `total_s`, to the last bit.

    `queued_s` from receipt until the stage was free for it, `switch_s` from then to its first stage
    operation, `run_s` on stage, `encode_s` after it.
    `gap_s` is how long the stage did nothing while this request waited: from the end of the previous
    request's last stage operation, or from receipt if that was later, to this one's first. A load that had
    to be waited for is part of it. Where other weights were bound it is the visible switch.
    """

    queued_s: float
    switch_s: float
    run_s: float
    encode_s: float
    total_s: float
    bind_s: float = 0.0
    gap_s: float | None = None


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One payload frame: a "png", "jpeg", "webp" or "mp4" file, or "raw" or "latent" bytes.

    Raw rows are `height * width * channels` bytes of uint8. A latent is a C-contiguous array of `shape` and
    `dtype` ("float32", "float16", ...; bfloat16 is sent as float32), its sizes in `width` and `height`.
    `clip` counts videos, `frames` are in an mp4 file, `fps` its frames per second. Defaults are not sent, so
    that the frames of a long video fit one header.
    """

    format: str
    width: int
    height: int
    channels: int = 3
    shape: tuple[int, ...] = ()
    dtype: str = ""
    clip: int = 0
    frames: int = 1
    fps: float | None = None


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """The images are the payload frames, in order. `tier` is where the model was on receipt.

    `adapters` are those that were folded into the model, in order, one asked for as a model included.
    """

    id: str
    model: str
    seed: int
    images: tuple[ImageInfo, ...]
    timings: Timings
    tier: str
    switched: bool = False
    adapters: tuple[Adapter, ...] = ()


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """No images. `code` is stable, `message` says what to do, `retryable` whether again may help.

    `id` is empty when the daemon could not read it.
    """

    id: str
    code: str
    message: str
    retryable: bool = False


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What may be asked for: a model, or with `kind` "lora" an adapter, alone or with a model that it fits.

    `base` is the model that an adapter is used with where none is named; empty where that is open. Its
    `pipeline` is diffusers' loader class for the pipelines that it fits.
    """

    name: str
    pipeline: str
    size_bytes: int
    tier: str
    kind: str = "model"
    base: str = ""


class ModelList(Message, frozen=True, kw_only=True, tag="model_list"):
    """Answer to `ListModels`; each payload frame is a msgpack array of `ModelEntry`.

    The list travels as payload because hundreds of models outgrow a header.
    """

    id: str


class Pong(Message, frozen=True, kw_only=True, tag="pong"):
    """Answer to `Ping`. `daemon` changes when the daemon restarted."""

    id: str
    daemon: str


Reply = Accepted | Progress | Finished | Failed | ModelList | Pong

# -- codec -----------------------------------------------------------------------------------------


class WireError(ValueError):
    """A header that this side cannot accept: `code` as in `Failed`, `id` when it could be read."""

    def __init__(self, code: str, message: str, message_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message_id = message_id


class _Peek(msgspec.Struct):
    v: Any = None
    id: Any = ""


_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_peek_decoder = msgspec.msgpack.Decoder(_Peek)
_entries_decoder = msgspec.msgpack.Decoder(list[ModelEntry])

# Hostile msgpack raises the last two as well: deep nesting and broken UTF-8.
DECODE_ERRORS = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def encode(message: Message) -> bytes:
    """The header frame of a message."""
    header = _encoder.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(
            "bad_request",
            f"header is {len(header)} bytes, the limit is {MAX_HEADER_BYTES}; "
            "shorten the prompt or the options",
            getattr(message, "id", ""),
        )
    return header


def decode_request(header: bytes | memoryview) -> Request:
    """The daemon's side. Raises `WireError`, nothing else."""
    return _decode(_request_decoder, header)


def decode_reply(header: bytes | memoryview) -> Reply:
    """The client's side. Raises `WireError`, nothing else."""
    return _decode(_reply_decoder, header)


def peek_id(header: bytes | memoryview) -> str:
    """The id in a header that cannot be accepted otherwise, or an empty string."""
    try:
        peek = _peek_decoder.decode(header)
    except DECODE_ERRORS:
        return ""
    return peek.id if isinstance(peek.id, str) and len(peek.id) <= MAX_ID_CHARS else ""


def encode_entries(entries: Sequence[ModelEntry]) -> bytes:
    """The payload frame of `ModelList`."""
    return _encoder.encode(entries)


def decode_entries(payload: bytes | memoryview) -> list[ModelEntry]:
    """Read the payload frame of `ModelList`. Raises `WireError`."""
    try:
        return _entries_decoder.decode(payload)
    except DECODE_ERRORS as error:
        raise WireError("bad_request", f"unreadable model list: {error}") from error


_T = TypeVar("_T", bound=Message)


def _decode(decoder: "msgspec.msgpack.Decoder[_T]", header: bytes | memoryview) -> _T:
    if len(header) > MAX_HEADER_BYTES:
        size = len(header)
        raise WireError("bad_request", f"header is {size} bytes, the limit is {MAX_HEADER_BYTES}")
    try:
        message = decoder.decode(header)
    except DECODE_ERRORS as error:
        raise _explain(header, error) from error
    if message.v != PROTOCOL_VERSION:
        raise _wrong_version(message.v, getattr(message, "id", ""))
    return message


def _explain(header: bytes | memoryview, error: Exception) -> WireError:
    """Say whose version or which field was wrong, with the id when there is one."""
    try:
        peek = _peek_decoder.decode(header)
    except DECODE_ERRORS:
        return WireError("bad_request", "the header is not a msgpack map of this protocol")
    message_id = peek.id if isinstance(peek.id, str) and len(peek.id) <= MAX_ID_CHARS else ""
    if peek.v is not None and peek.v != PROTOCOL_VERSION:
        return _wrong_version(peek.v, message_id)
    return WireError("bad_request", str(error), message_id)


def _wrong_version(version: object, message_id: str) -> WireError:
    return WireError(
        "unsupported_version",
        f"protocol version {version!r:.20} is not spoken here, version {PROTOCOL_VERSION} is; "
        "install the client of the daemon's release",
        message_id,
    )
