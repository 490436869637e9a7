"""Weights into memory that stays: `python -m benchmarks.load [--json] [--quick] [--peers-python PATH]`.

The UNet of Stable Diffusion 1.5 in fp16 (1.72 GB), and SDXL's (5.14 GB) where memory allows, of random bits:

* understudy: into the arena by a real loader process under the real supervisor, default settings, checksums
  verified once before, as in a daemon that lives.
* raw: plain `preadv` threads into the same memory: the limit.
* peers: what others load such a file with (`load_peers.py`), a process each, set up as their documentation
  says. One that is not installed is absent: `pip install '.[peers]'`, or name a Python that has them.
* mapped: beside the peers, what leaves weights behind a mapping of the file. They do not stay: not compared.

Warm: the file is read once before each load. Cold: its pages are dropped from the page cache. All take turns,
so that all meet the same machine. What arrived is compared after every load, by checksum; memory is blanked
before. Rates are medians in GB (1e9 bytes) per second.

Expected before the first run: as the hand-over benchmark, 0.98 of raw. Peers that allocate pay for their
pages, 0.3 s a GB: 3 GB/s at most, a ratio of 5. Cold, all are as fast as the disk.
"""

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.kit import json_line, say, show_table, timed
from benchmarks.load_peers import PEERS, Scene
from benchmarks.loaders import DEFAULTS, Source, running_loaders
from benchmarks.raw_reads import RawReader
from understudyd.shell.memory import CpuArena, memory_available_bytes
from understudyd.store.safetensors_file import read_header

OURS, RAW = "understudy", "raw"
PAIRS = 4
_SHARE_OF_MEMORY = 3.5  # arena, page cache, a peer's copy and its work, in sizes of the file
_SDXL_BYTES = 5_140_000_000
_READ_BYTES = 16 << 20
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Plan:
    """`python` has the `peers`; `narrow` UNets are for tests."""

    peers: tuple[str, ...] = tuple(PEERS)
    python: str = sys.executable
    narrow: bool = False
    rounds: int = 4
    cold_rounds: int = 2


class WrongBytes(Exception):
    """What arrived is not what is in the file."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """`load` loads once, compares, and says how many seconds the load took. `file` is what it reads."""

    file: Path
    load: Callable[[], float]


def _python_path() -> str:
    """Ours, and what there is already."""
    ours = map(str, (_ROOT, _ROOT / "client", _ROOT / "daemon"))
    return os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])


class PeerProcess:
    """A peer in a process of its own, there after `wait_ready`; or `absent`, for this reason."""

    def __init__(self, name: str, scene: Scene, python: str) -> None:
        self.name = name
        self.file = scene.file
        self.absent: str | None = None
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.load_peers", name, str(scene.folder), scene.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": _python_path()},  # a Python that has the peers may lack us
        )  # fmt: skip

    def wait_ready(self) -> None:
        said = self._answer()
        self.absent = said.get("absent")
        self.file = Path(said.get("file", self.file))

    def load(self, expected: str) -> float:
        """One load; seconds. Raises `WrongBytes`."""
        assert self._process.stdin is not None
        print("load", file=self._process.stdin, flush=True)
        said = self._answer()
        if "digest" in said and said["digest"] != expected:
            raise WrongBytes(f"{self.name} loaded other bytes than the file's")
        return float(said["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            return {"absent": f"ended: {errors.strip().splitlines()[-1] if errors.strip() else 'silently'}"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def file_digest(path: Path) -> str:
    """What `load_peers.digest` says of this file's tensors."""
    header = read_header(path)
    state = xxhash.xxh3_128()
    content = np.memmap(path, np.uint8, "r", header.data_start_bytes)
    for span in sorted(header.tensors, key=lambda span: span.name):
        if not span.is_padding:
            state.update(span.name.encode())
            state.update(content[span.begin : span.end].data)
    return state.hexdigest()


def drop_pages(path: Path) -> None:
    """Have the page cache forget a file that is on disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_pages(path: Path) -> None:
    """Have the page cache hold a file."""
    with path.open("rb", buffering=0) as file:
        into = bytearray(_READ_BYTES)
        while file.readinto(into):
            pass


@contextlib.contextmanager
def contestants(source: Source, scene: Scene, peers: list[PeerProcess]) -> Iterator[dict[str, Contestant]]:
    """Everybody, ready to load; the arena and the loader are gone afterwards."""
    expected = file_digest(source.path)
    with contextlib.ExitStack() as stack:
        arena = CpuArena(source.size_bytes)
        stack.callback(arena.close)
        loaders = stack.enter_context(running_loaders(arena))
        raw = RawReader(source, arena.fds()[0], DEFAULTS.chunk_bytes, DEFAULTS.reader_threads)
        stack.callback(raw.close)
        content = np.frombuffer(mmap.mmap(arena.fds()[0], source.size_bytes), np.uint8)
        loaders.load([source.at(0)])  # verifies the checksums

        def into_arena(read: Callable[[], float]) -> Callable[[], float]:
            def load() -> float:
                content[:] = 0
                seconds = read()
                if not source.is_at(content):
                    raise WrongBytes("the arena holds other bytes than the file's")
                return seconds

            return load

        found = {
            OURS: Contestant(source.path, into_arena(lambda: loaders.load([source.at(0)]))),
            RAW: Contestant(source.path, into_arena(raw.read)),
        }
        for peer in peers:
            found[peer.name] = Contestant(peer.file, lambda peer=peer: peer.load(expected))  # type: ignore[misc]
        yield found


def rates(
    all_: Mapping[str, Contestant],
    size_bytes: int,
    rounds: int,
    before: Callable[[Path], None],
    pairs: int = 1,
) -> dict[str, float]:
    """The median of each in GB/s; who comes first changes from round to round.

    Ours and the limit take a tenth of the others' time: they meet `pairs` times a round, in turns.
    """
    others = [name for name in all_ if name not in (OURS, RAW)]
    order = [OURS, RAW] * pairs + others
    found: dict[str, list[float]] = {name: [] for name in all_}
    for number in range(rounds):
        turn = number % len(order)
        for name in order[turn:] + order[:turn]:
            before(all_[name].file)
            found[name].append(size_bytes / 1e9 / all_[name].load())
    return {name: statistics.median(each) for name, each in found.items()}


def summary(found: Mapping[str, float]) -> dict[str, Any]:
    """One block of the result: ours, the limit, the others, two ratios."""
    others = {name: rate for name, rate in found.items() if name not in (OURS, RAW)}
    peers = {name: rate for name, rate in others.items() if not PEERS[name].mapped}
    return {
        "understudy_gbps": found[OURS],
        "raw_gbps": found[RAW],
        "ratio_raw": found[OURS] / found[RAW],
        "peers": peers,
        "ratio_best_peer": found[OURS] / max(peers.values()) if peers else None,
        "mapped": {name: rate for name, rate in others.items() if PEERS[name].mapped},
    }


def measure(architecture: str, work: Path, plan: Plan) -> dict[str, Any]:
    """Warm and cold figures of one UNet."""
    source, scene = write_unet(architecture, work, narrow=plan.narrow)
    say(f"{architecture}: one UNet of {source.size_bytes / 1e9:.2f} GB")
    with contextlib.ExitStack() as stack:
        peers = []
        for name in plan.peers:
            peers.append(PeerProcess(name, scene, plan.python))
            stack.callback(peers[-1].close)
        with timed("peers are there"):
            for peer in peers:
                peer.wait_ready()
        absent = {peer.name: peer.absent for peer in peers if peer.absent is not None}
        for name, why in absent.items():
            say(f"  {name} is absent: {why}")
        there = [peer for peer in peers if peer.absent is None]
        all_ = stack.enter_context(contestants(source, scene, there))
        with timed("once each"):  # what is done once a process is no part of a load
            for one in all_.values():
                one.load()
        with timed("warm"):
            warm = rates(all_, source.size_bytes, plan.rounds, read_pages, PAIRS)
        with timed("cold"):
            cold = rates(all_, source.size_bytes, plan.cold_rounds, drop_pages)
    rows = [[name, f"{rate:.2f}", f"{cold[name]:.2f}"] for name, rate in warm.items()]
    show_table(f"{architecture} UNet, GB/s", ["", "warm", "cold"], rows)
    return summary(warm) | {"cold": summary(cold), "absent": absent}


def write_unet(architecture: str, work: Path, *, narrow: bool, device: str = "cpu") -> tuple[Source, Scene]:
    """A folder that `from_pretrained` reads, whose weights are a blob as the store's writer writes it.

    `device` is where peers shall load them to.
    """
    import torch

    from benchmarks import real_size
    from benchmarks.real_store import random_blob

    model = {"sd15": real_size.sd15, "sdxl": real_size.sdxl}[architecture](narrow=narrow)
    scene = Scene(work / architecture, device)
    scene.folder.mkdir()
    with torch.device("meta"):
        unet: Any = model.builders["unet"]()
    unet.save_config(scene.folder)
    return Source(scene.file, random_blob(scene.file, model.signatures["unet"])), scene


def in_a_folder(architecture: str, plan: Plan) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return measure(architecture, Path(folder), plan)


def has_room_for(size_bytes: int) -> bool:
    return memory_available_bytes() > _SHARE_OF_MEMORY * size_bytes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a narrow UNet and few rounds, for tests")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only this one (repeatable)")
    parser.add_argument(
        "--rounds", type=int, default=None, help="warm ones, half as many cold (4; 2 when quick)"
    )
    parser.add_argument("--sdxl", action=argparse.BooleanOptionalAction, help="SDXL too; default: if it fits")
    options = parser.parse_args(arguments)
    plan = Plan(tuple(options.peer or PEERS), options.peers_python)
    if options.quick:
        plan = replace(plan, narrow=True, rounds=2, cold_rounds=1)
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds, cold_rounds=max(1, options.rounds // 2))
    found = in_a_folder("sd15", plan)
    if options.sdxl or (options.sdxl is None and not options.quick and has_room_for(_SDXL_BYTES)):
        found["sdxl"] = in_a_folder("sdxl", plan)
    elif not options.quick:
        say(f"no SDXL: {memory_available_bytes() / 2**30:.1f} GiB of memory are free")
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
