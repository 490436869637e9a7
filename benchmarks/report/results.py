"""The file that a run of all benchmarks leaves: `benchmarks/results/<hardware>.json`, and a GPU check's."""

from pathlib import Path
from typing import Any

import msgspec

Figures = dict[str, Any]
"""What a benchmark printed: its own names, numbers, nested one or two levels deep."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hardware and versions; nothing that names a host or a place. `memory_gib` is what the kernel has."""

    cpu: str
    cores: int
    memory_gib: int
    is_virtual: bool
    kernel: str
    python: str
    packages: dict[str, str]


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One repetition of one benchmark.

    `revision` ends with "-dirty" when sources differed from it; `began_at` is UTC; `load_average` is the
    machine's over the minute before: what others did to it. A run may have both figures and a `failure`:
    those of a benchmark that found something wrong.
    """

    command: str
    revision: str
    began_at: str
    wall_s: float
    load_average: float
    figures: Figures | None = None
    failure: str = ""


class Results(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`host` names the hardware; `runs` are by benchmark, in the order in which they were made."""

    host: str
    machine: Machine
    budget_s: float
    wall_s: float
    runs: dict[str, tuple[Run, ...]]

    @property
    def began_at(self) -> str:
        """The last benchmark's start."""
        return max((run.began_at for runs in self.runs.values() for run in runs), default="")


class GpuCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of the GPU check's document (`python -m benchmarks.gpu --results`)."""

    gpu: dict[str, Any]
    size: str
    machine: dict[str, Any]
    started_at: str
    sections: dict[str, Figures]
    revision: str = ""
    failed: tuple[str, ...] = ()


class Kept(msgspec.Struct, frozen=True):
    """All that is kept in a folder, newest first."""

    hosts: tuple[Results, ...] = ()
    gpus: tuple[GpuCheck, ...] = ()


def read_results(path: Path) -> Results:
    """Raises `FileNotFoundError`, `msgspec.ValidationError`."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def write_results(path: Path, results: Results) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    draft.replace(path)


def read_all(folder: Path) -> Kept:
    """Every file of the folder. Raises `msgspec.ValidationError` naming the one that is neither kind."""
    hosts, gpus = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            if "gpu" in msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw]):
                gpus.append(msgspec.json.decode(path.read_bytes(), type=GpuCheck))
            else:
                hosts.append(read_results(path))
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"{path.name}: {error}") from error
    return Kept(
        tuple(sorted(hosts, key=lambda one: one.began_at, reverse=True)),
        tuple(sorted(gpus, key=lambda one: one.started_at, reverse=True)),
    )
