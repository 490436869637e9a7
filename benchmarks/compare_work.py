"""What `benchmarks.compare` gives to everybody, and what everybody gives back."""

import msgspec

from understudy_demo.workload import Request


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Requests with times of arrival; diffusers folders by model; how much memory for weights there is.

    `dtype` is torch's name of it, None for the files' own.
    """

    requests: tuple[Request, ...]
    folders: dict[str, str]
    budget_bytes: int
    device: str = "cpu"
    dtype: str | None = None


class Painted(msgspec.Struct, frozen=True, kw_only=True):
    """One image: when it was wanted, when computing began and ended; the hash of its pixels."""

    index: int
    model: str
    arrived_s: float
    started_s: float
    ended_s: float
    sha256: str


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """A load."""

    name: str
    started_s: float
    ended_s: float


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run, in the order of service. `memory_bytes` is the most that it held, weights and all."""

    painted: tuple[Painted, ...]
    loads: tuple[Spent, ...]
    memory_bytes: int
