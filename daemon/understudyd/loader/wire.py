"""The protocol between the parent and one loader: msgpack structs over a SEQPACKET socket pair.

One struct a packet. A loader comes up in two steps, because the arena's `auto` size is what is free once the
loaders' device contexts stand::

    parent: Attach (+ the host pool's fd)      loader: Attached
    parent: OpenArena (+ the arena's fd)       loader: Ready
    parent: Load, Cancel, Pause, Stop          loader: Heartbeat, Loaded, LoadFault, LoadStopped

`Notice`, or `Fatal` and exit, at any time; `Pause` and `Stop` may come before the arena. Times are
CLOCK_MONOTONIC seconds, the same clock in both.
"""

import msgspec

WIRE_VERSION = 2
MAX_PACKET_BYTES = 256 * 1024


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of what the parent says."""


class Attach(Order, frozen=True, kw_only=True, tag="attach"):
    """What this loader works with, but for the arena. Answered by `Attached`.

    `gpu_uuid` is empty on the CPU device. With `pool_bytes` the host pool's file descriptor follows.
    `parent_pid` is 0 for a loader that is a thread of the parent.
    """

    gpu_uuid: str = ""
    pool_bytes: int = 0
    pinned_piece_bytes: int = 1024**3
    chunk_bytes: int = 16 * 1024 * 1024
    reader_threads: int = 2
    copies_in_flight: int = 2
    rate_limit_bytes_per_s: float = 0.0
    heartbeat_s: float = 0.25
    parent_pid: int
    wire_version: int = WIRE_VERSION


class OpenArena(Order, frozen=True, kw_only=True, tag="open_arena"):
    """Open the arena and prove it. Answered by `Ready`.

    `transport` is "memfd" (fd follows), "cuda_ipc" (`ipc_handle`) or "cuda_local" (`address`, for a loader
    that is a thread of the parent). `arena_bytes` are those that loads may fill; behind them lies the proof
    area: the parent has written `proof.pattern(proof_seed, proof_bytes)` to `proof_offset`, the loader reads
    it back and answers with the pattern of `proof_seed + 1` in the same place.
    """

    transport: str
    arena_bytes: int
    ipc_handle: bytes = b""
    address: int = 0
    proof_offset: int
    proof_bytes: int
    proof_seed: int


class FileVersion(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes the path held when they were trusted; any difference is a replaced file."""

    size_bytes: int
    mtime_ns: int
    inode: int


class Load(Order, frozen=True, kw_only=True, tag="load"):
    """Bring `[file_offset, file_offset + size_bytes)` of `path` to `arena_offset`, `pool_offset`, or both.

    With `from_pool` the bytes are at `pool_offset` already and no file is touched. Without `arena_offset` the
    load goes as far as the host pool. With `must_verify` nobody has compared the checksums of what is in the
    pool: the load does, and fails where they differ.

    `xxh3` (one per `checksum_chunk_bytes`) is compared unless the file is still the version `expect`, which
    was verified before. With `expect` and no `xxh3`, another version is a fault.
    """

    load_id: int
    path: str
    file_offset: int
    size_bytes: int
    arena_offset: int | None
    pool_offset: int | None = None
    from_pool: bool = False
    must_verify: bool = False
    checksum_chunk_bytes: int = 0
    xxh3: tuple[int, ...] = ()
    expect: FileVersion | None = None


class Cancel(Order, frozen=True, kw_only=True, tag="cancel"):
    """Stop a load between two chunks; answered by whichever report ends the load."""

    load_id: int


class Pause(Order, frozen=True, kw_only=True, tag="pause"):
    """Rest between two pieces while latency-critical work runs, or go on. Loads stay in hand, hearts beat."""

    is_paused: bool


class Stop(Order, frozen=True, kw_only=True, tag="stop"):
    """Finish nothing more and exit."""


Orders = Attach | OpenArena | Load | Cancel | Pause | Stop


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of what the loader says."""


class Attached(Report, frozen=True, kw_only=True, tag="attached"):
    """The device context stands and the host pool is mapped."""

    pid: int
    wire_version: int = WIRE_VERSION


class Ready(Report, frozen=True, kw_only=True, tag="ready"):
    """The arena is open, the parent's proof was there, this loader's proof is written."""


class Heartbeat(Report, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by a thread of its own: a slow read is not a dead loader."""

    at_s: float
    load_id: int | None = None
    bytes_done: int = 0


class Loaded(Report, frozen=True, kw_only=True, tag="loaded"):
    """The load is where it was to go, synchronised. `version` is the file as it was read, None from the pool.

    `verified` means that its bytes match the checksums, now or when that version was read before.
    """

    load_id: int
    started_at_s: float
    ended_at_s: float
    version: FileVersion | None
    verified: bool


class LoadFault(Report, frozen=True, kw_only=True, tag="load_fault"):
    """The load failed; `corrupt` when the bytes are wrong rather than unreachable."""

    load_id: int
    corrupt: bool
    message: str


class LoadStopped(Report, frozen=True, kw_only=True, tag="load_stopped"):
    """The load was cancelled; nothing writes to its extent any more."""

    load_id: int


class Notice(Report, frozen=True, kw_only=True, tag="notice"):
    """Something that people should know and that does not stop the loader."""

    message: str


class Fatal(Report, frozen=True, kw_only=True, tag="fatal"):
    """The loader cannot work and exits after this.

    `is_refused`: the system refuses to share the arena with another process; the next loader fares no better.
    """

    message: str
    is_refused: bool = False


Reports = Attached | Ready | Heartbeat | Loaded | LoadFault | LoadStopped | Notice | Fatal

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
