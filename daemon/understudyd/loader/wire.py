"""The protocol between the parent and one loader: msgpack structs over a SEQPACKET socket pair.

One struct a packet. `Attach` is the parent's first packet and carries the arena's file descriptor
(SCM_RIGHTS) where the transport has one. Times are CLOCK_MONOTONIC seconds, the same clock in both.
"""

import msgspec

WIRE_VERSION = 1
MAX_PACKET_BYTES = 256 * 1024


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of what the parent says."""


class Attach(Order, frozen=True, kw_only=True, tag="attach"):
    """Open the arena. `transport` is "memfd" (fd follows) or "cuda" (`ipc_handle`, `gpu_uuid`)."""

    transport: str
    arena_bytes: int
    ipc_handle: bytes = b""
    gpu_uuid: str = ""
    chunk_bytes: int = 16 * 1024 * 1024
    reader_threads: int = 2
    copies_in_flight: int = 2
    rate_limit_bytes_per_s: float = 0.0
    heartbeat_s: float = 0.25
    parent_pid: int
    wire_version: int = WIRE_VERSION


class FileVersion(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes the path held when they were trusted; any difference is a replaced file."""

    size_bytes: int
    mtime_ns: int
    inode: int


class Load(Order, frozen=True, kw_only=True, tag="load"):
    """Read `[file_offset, file_offset + size_bytes)` of `path` to `arena_offset`.

    `xxh3` (one per `checksum_chunk_bytes`) is compared unless the file is still the version `expect`, which
    was verified before. With `expect` and no `xxh3`, another version is a fault.
    """

    load_id: int
    path: str
    file_offset: int
    size_bytes: int
    arena_offset: int
    checksum_chunk_bytes: int = 0
    xxh3: tuple[int, ...] = ()
    expect: FileVersion | None = None


class Cancel(Order, frozen=True, kw_only=True, tag="cancel"):
    """Stop a load between two chunks; answered by whichever report ends the load."""

    load_id: int


class Stop(Order, frozen=True, kw_only=True, tag="stop"):
    """Finish nothing more and exit."""


Orders = Attach | Load | Cancel | Stop


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of what the loader says."""


class Ready(Report, frozen=True, kw_only=True, tag="ready"):
    """The arena is open."""

    pid: int
    wire_version: int = WIRE_VERSION


class Heartbeat(Report, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by a thread of its own: a slow read is not a dead loader."""

    at_s: float
    load_id: int | None = None
    bytes_done: int = 0


class Loaded(Report, frozen=True, kw_only=True, tag="loaded"):
    """The load is in the arena, synchronised. `version` is the file as it was read.

    `verified` means that its bytes match the checksums, now or when that version was read before.
    """

    load_id: int
    started_at_s: float
    ended_at_s: float
    version: FileVersion
    verified: bool


class LoadFault(Report, frozen=True, kw_only=True, tag="load_fault"):
    """The load failed; `corrupt` when the bytes are wrong rather than unreachable."""

    load_id: int
    corrupt: bool
    message: str


class LoadStopped(Report, frozen=True, kw_only=True, tag="load_stopped"):
    """The load was cancelled; nothing writes to its extent any more."""

    load_id: int


class Fatal(Report, frozen=True, kw_only=True, tag="fatal"):
    """The loader cannot work (arena not opened, ...) and exits after this."""

    message: str


Reports = Ready | Heartbeat | Loaded | LoadFault | LoadStopped | Fatal

_encoder = msgspec.msgpack.Encoder()
_order_decoder: msgspec.msgpack.Decoder[Orders] = msgspec.msgpack.Decoder(Orders)
_report_decoder: msgspec.msgpack.Decoder[Reports] = msgspec.msgpack.Decoder(Reports)


def encode(packet: Order | Report) -> bytes:
    """One packet."""
    return _encoder.encode(packet)


def decode_order(packet: bytes) -> Orders:
    """The loader's side. Raises `msgspec.DecodeError`."""
    return _order_decoder.decode(packet)


def decode_report(packet: bytes) -> Reports:
    """The parent's side. Raises `msgspec.DecodeError`."""
    return _report_decoder.decode(packet)
