"""What the loader pool is told and what it tells about itself."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from understudyd.loader import wire

LOADER_COMMAND = (sys.executable, "-P", "-m", "understudyd.loader")

_SHOWN = 12

Transport = Literal["auto", "process", "thread"]


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """How loaders work and how much patience they get. `rate_limit_bytes_per_s` is each loader's; 0 is none.

    `dead_after_s` is a little under the three seconds within which a hung loader must be declared dead. A
    load without any progress for `stalled_after_s` costs its loader its life. Loaders are processes; with
    `transport` "auto" they become threads of this process once it shows that the arena cannot be shared.
    """

    chunk_bytes: int = 16 * 1024 * 1024
    reader_threads: int = 2
    copies_in_flight: int = 2
    rate_limit_bytes_per_s: float = 0.0
    heartbeat_s: float = 0.25
    dead_after_s: float = 2.5
    start_timeout_s: float = 30.0
    stalled_after_s: float = 60.0
    stop_grace_s: float = 2.0
    respawn_delay_s: float = 0.2
    respawn_delay_max_s: float = 10.0
    stable_after_s: float = 10.0
    transport: Transport = "auto"
    command: tuple[str, ...] = LOADER_COMMAND


@dataclass(frozen=True, slots=True)
class LoadTask:
    """Bytes `[file_offset, file_offset + size_bytes)` of `path` to `arena_offset`; `name` is for people.

    `pool_offset`, `from_pool` and `must_verify` are the loader protocol's: a host copy that is made or used,
    and whether it must be checked. `xxh3` holds the XXH3-64 of each `checksum_chunk_bytes` piece. `expect` is
    a file version that is known to be good; the pool remembers those that its loaders verified.
    """

    load_id: int
    name: str
    path: str
    file_offset: int
    size_bytes: int
    arena_offset: int | None
    pool_offset: int | None = None
    from_pool: bool = False
    must_verify: bool = False
    checksum_chunk_bytes: int = 0
    xxh3: tuple[int, ...] = ()
    expect: wire.FileVersion | None = None

    @property
    def blob(self) -> str:
        """How people tell its blob from others: where it begins, the name of the file."""
        return Path(self.path).stem[:_SHOWN]

    @property
    def route(self) -> str:
        """Where the bytes pass, for people: "disk > arena", "disk > host > arena", "host > arena" ..."""
        places = (
            None if self.from_pool else "disk",
            None if self.pool_offset is None else "host",
            None if self.arena_offset is None else "arena",
        )
        return " > ".join(place for place in places if place)


class LoaderState(StrEnum):
    """A loader's life."""

    STARTING = "starting"
    IDLE = "idle"
    LOADING = "loading"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class LoaderStatus:
    """One slot of the pool for people: what its loader does now and what the slot has done so far.

    `route` is the load's, see `LoadTask.route`. `rate_bytes_per_s` is the last load's; `last_loss` says why
    the slot's previous loader went.
    """

    loader_id: int
    slot: int
    pid: int
    state: LoaderState
    load: str | None
    route: str | None
    bytes_done: int
    size_bytes: int
    loads_done: int
    bytes_total: int
    restarts: int
    rate_bytes_per_s: float
    last_loss: str
