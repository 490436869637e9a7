"""Facts about models and requests that the core needs to decide, and nothing else.

Sizes are bytes, times are seconds on one monotonic clock that the driver chooses.
"""

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where a model's slowest blob is (DESIGN section 2)."""

    DISK = "disk"
    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"
    BOUND = "bound"


class Outcome(StrEnum):
    """How a run on the stage ended."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ErrorCode(StrEnum):
    """Why a request got no images. The strings are the wire protocol's."""

    # the caller's fault
    BAD_REQUEST = "bad_request"
    UNKNOWN_MODEL = "unknown_model"
    MODEL_REMOVED = "model_removed"
    CANCELLED = "cancelled"
    CLIENT_GONE = "client_gone"
    # not enough of something
    QUEUE_FULL = "queue_full"
    DRAINING = "draining"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    MODEL_TOO_LARGE = "model_too_large"
    OUT_OF_MEMORY = "out_of_memory"
    # the daemon's fault
    MODEL_CORRUPT = "model_corrupt"
    LOAD_FAILED = "load_failed"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """Content-addressed weights of one component; `size_bytes` is what it takes in the arena.

    Blobs that are `made_of` others, overlays, are folded in the arena out of those, not loaded: of the base
    component's blob first, then of adapters' blobs, each once.
    """

    key: str
    size_bytes: int
    made_of: "tuple[BlobInfo, ...]" = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as the core sees it: its blobs in the order of their first use.

    `edition` counts what the name has stood for: a model that is replaced while it is used goes on under its
    old edition until its last use has ended. No two editions of a name that are alive have one number.
    `max_batch` images at most are made by one run for several requests; 1: each request runs alone.
    One that `is_derived` has the blobs of another model and overlays over some of them.
    """

    name: str
    blobs: tuple[BlobInfo, ...]
    edition: int = 0
    max_batch: int = 1
    is_derived: bool = False

    @property
    def key(self) -> str:
        """What tells this edition from the name's others; the first one's is the name itself."""
        return f"{self.name}@{self.edition}" if self.edition else self.name


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One admitted or refused wish for images. The payload stays with the shell.

    `cost` is how much work it is, above 0, in a unit that all requests share. Requests for a model that have
    the same `batch_key` can be made by one run; without one a request runs alone. It is for so many `images`.
    """

    request_id: str
    client: str
    model: str
    priority: int = 0
    deadline_at_s: float | None = None
    cost: float = 1.0
    batch_key: str = ""
    images: int = 1
