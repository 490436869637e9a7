"""How long adding models takes: `python -m benchmarks.ingest [--json] [--quick] [--models N]`.

Two cases, each a whole `understudyd ingest` process, from its start to its end, import of torch included:

* a scan of a folder tree with N tiny Stable Diffusion fine-tunes (the work per model, not the bytes);
* one single-file checkpoint of Stable Diffusion 1.5's real size in fp16, 2.1 GB of random weights, added like
  a model of the store (the bytes, not the work).

The files are in the page cache, as after a download. `write_mb_s` is a plain sequential write of as many
bytes with one fsync on the same disk: the store cannot be faster.

Expected, before the first run on two cores: 6 s for the imports, 0.15 s a tiny model, and for the checkpoint
2 s of sha256 and what the disk takes.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kit import json_line, say, show_table, timed

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """One ingest process. Times in seconds."""

    wall_s: float
    cpu_s: float


def run_ingest(store: Path, arguments: Sequence[str]) -> Run:
    """Raises `CalledProcessError` when something was refused."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.monotonic()
    command = [sys.executable, "-m", "understudyd.store.ingest", "--json", "--store", str(store), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall_s = time.monotonic() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def make_tree(folder: Path, count: int) -> None:
    """Fine-tunes that share a VAE: every fourth has a text encoder of its own."""
    from understudy_demo import tiny
    from understudyd.store.pretrained import quiet_libraries

    with quiet_libraries():
        for number in range(count):
            pipeline = tiny.stable_diffusion(number, own_text_encoder=number % 4 == 0)
            tiny.save(pipeline, folder / f"group-{number % 10}" / f"tune-{number:04}")


def make_checkpoint(folder: Path, *, quick: bool) -> tuple[Path, Path]:
    """A store with the model that a checkpoint is like, and the checkpoint: (store, file)."""
    import torch

    from benchmarks import real_store
    from benchmarks.original_layout import save_checkpoint
    from benchmarks.real_size import sd15
    from understudyd.store.store import Store

    architecture = sd15(narrow=quick)
    store = Store.open(folder / "store", writable=True)
    dtypes = dict.fromkeys(architecture.builders, torch.float16)
    real_store.publish(store, architecture, "base", seed=0, dtypes=dtypes)
    torch.manual_seed(1)
    modules = {name: build().to(torch.float16) for name, build in architecture.builders.items()}
    return store.path, save_checkpoint(modules, folder / "checkpoint.safetensors")


def write_rate_mb_s(folder: Path, size_bytes: int) -> float:
    """A plain sequential write with one fsync, in MB/s."""
    piece = os.urandom(_PIECE_BYTES)
    path = folder / "plain"
    started_s = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size_bytes // _PIECE_BYTES)):
            file.write(piece)
        os.fsync(file.fileno())
    took_s = time.monotonic() - started_s
    written_bytes = path.stat().st_size
    path.unlink()
    return written_bytes / took_s / 1e6


def measure(*, count: int, quick: bool) -> dict[str, float]:
    """Both cases in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with timed(f"{count} tiny models made"):
            make_tree(folder / "tree", count)
        scan = run_ingest(folder / "many", ["--scan", str(folder / "tree")])
        say(f"  scanned in {scan.wall_s:.1f} s")
        again = run_ingest(folder / "many", ["--scan", str(folder / "tree")])
        say(f"  again, all unchanged, in {again.wall_s:.1f} s")
        with timed("the checkpoint made"):
            store, file = make_checkpoint(folder, quick=quick)
        size_bytes = file.stat().st_size
        plain_mb_s = write_rate_mb_s(folder, size_bytes)
        single = run_ingest(store, ["--name", "m", "--source", str(file), "--like", "base"])
    return {
        "models": count,
        "scan_s": scan.wall_s,
        "scan_cpu_s": scan.cpu_s,
        "scan_ms_per_model": 1000 * scan.wall_s / count,
        "rescan_s": again.wall_s,
        "checkpoint_bytes": size_bytes,
        "checkpoint_s": single.wall_s,
        "checkpoint_cpu_s": single.cpu_s,
        "checkpoint_mb_s": size_bytes / single.wall_s / 1e6,
        "write_mb_s": plain_mb_s,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a narrow checkpoint, for tests")
    parser.add_argument("--models", type=int, default=200, help="how many tiny models the tree holds")
    options = parser.parse_args(arguments)
    found = measure(count=options.models, quick=options.quick)
    show_table("ingest", ["figure", "value"], [[key, f"{value:,.1f}"] for key, value in found.items()])
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
