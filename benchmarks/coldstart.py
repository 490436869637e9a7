"""From nothing to the first image: `python -m benchmarks.coldstart [--json] [--quick] [--device cpu|cuda]`.

Starts the daemon on a store with one real-size Stable Diffusion 1.5 (random weights, in the page cache) and
asks for one image of one step as soon as it is ready. On the CPU the weights are fp32 and the image is 64
pixels wide, because a whole one would take minutes of arithmetic that is not what is measured.

The phases are the daemon's own, from the lane "start-up" of its timeline: device = its loaders up, the arena
standing; import = torch, diffusers and the stage, from when it begins; weights = the first load's start to
the last one's end; warm-up = one request per architecture. `first_image_s` counts from the start of the
process, and `overlapped_s` is what the phases add up to beyond the time that at least one of them took: work
that was done while other work was done.

Expected, before the first run on two cores: import 9 s, of which the weights' 1 s (4.3 GB, half of them
verified by each of two loaders) is hidden wholly; device 2 s, most of it the arena's pages.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.kit import DaemonProcess, DaemonSettings, json_line, running_daemon, say, show_table, timed
from understudy import Client
from understudy.trace import START_UP, Span, fetch, lane

MODEL = "model"
ROUNDS = 3
PHASES = {
    "import_s": ("import", "stage"),
    "device_s": ("loaders", "arena"),
    "weights_s": ("weights",),
    "warmup_s": ("warm-up",),
}
_TRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A store with one model, and how large an image is asked for."""

    store: Path
    size_bytes: int
    side_px: int
    device: str


def set_scene(folder: Path, *, quick: bool, device: str) -> Scene:
    """Make the model, in this device's dtype."""
    import torch

    from benchmarks import real_store
    from benchmarks.real_size import sd15
    from understudyd.store.store import Store

    latent_side = 64 if device == "cuda" else 8
    architecture = sd15(narrow=quick, sample_size=latent_side)
    dtype = torch.float16 if device == "cuda" else torch.float32
    store = Store.open(folder / "store", writable=True)
    dtypes = dict.fromkeys(architecture.builders, dtype)
    record = real_store.publish(store, architecture, MODEL, seed=0, dtypes=dtypes, device=device)
    return Scene(store.path, record.size_bytes, 8 * latent_side, device)


def start_once(scene: Scene, folder: Path) -> dict[str, float]:
    """One life of the daemon."""
    settings = DaemonSettings(
        store=scene.store, runtime_dir=folder / "run", arena_bytes=scene.size_bytes + (64 << 20)
    )
    with mock.patch.dict(os.environ, {"UNDERSTUDY__DEVICE__KIND": scene.device}):
        started_s = time.monotonic()
        with running_daemon(settings, folder / "daemon") as daemon:
            with Client(daemon.endpoint) as client:
                client.generate(
                    MODEL, "a red circle", seed=1, steps=1, width=scene.side_px, height=scene.side_px
                )
            first_image_s = time.monotonic() - started_s
            spans = start_up_spans(daemon)
    phases = phases_of(spans)
    at_least_one_s = covered_s(spans[name] for names in PHASES.values() for name in names)
    return phases | {
        "first_image_s": first_image_s,
        "overlapped_s": sum(phases.values()) - at_least_one_s,
    }


def start_up_spans(daemon: DaemonProcess) -> dict[str, Span]:
    """The spans of the start-up, by name."""
    return {span.name: span for span in lane(fetch(daemon.ask, _TRACE_S).spans, START_UP)}


def phases_of(spans: Mapping[str, Span]) -> dict[str, float]:
    """The benchmark's phases from the daemon's. Raises `KeyError` naming a span that is missing."""
    return {phase: covered_s([spans[name] for name in names]) for phase, names in PHASES.items()}


def covered_s(spans: Iterable[Span]) -> float:
    """How long at least one of them lasted."""
    covered_s, until_s = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start_s):
        covered_s += max(0.0, span.end_s - max(span.start_s, until_s))
        until_s = max(until_s, span.end_s)
    return covered_s


def measure(*, quick: bool, device: str) -> dict[str, float]:
    """Medians over a few lives of the daemon, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        with timed("the model"):
            scene = set_scene(Path(folder), quick=quick, device=device)
        say(f"one model of {scene.size_bytes / 1e9:.2f} GB")
        rounds = []
        for number in range(1 if quick else ROUNDS):
            with timed(f"start {number + 1}"):
                rounds.append(start_once(scene, Path(folder) / f"round-{number}"))
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="a narrow model, once, for tests")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    found = measure(quick=options.quick, device=options.device)
    show_table("cold start", ["phase", "seconds"], [[key, f"{value:.2f}"] for key, value in found.items()])
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
