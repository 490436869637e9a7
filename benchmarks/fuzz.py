"""`python -m benchmarks.fuzz --json`: hostile frames by the million, and a well-behaved client beside them.

A real daemon serves a tiny model. First the client has it to itself, then `benchmarks.hostile` talks to it
as well, from a process of its own. Reported are the client's answers (all must come, with the right images),
their time by the clock, and the daemon's memory before and after. Exit code 1 when it did not hold.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kit import DaemonSettings, json_line, percentile, running_daemon, say, show_table
from understudy import Client, admin

QUIET_REQUESTS, LEAST_REQUESTS = 100, 10
SEEDS = 8
SETTLE_S = 3.0
MODEL, _ARENA_BYTES = "good", 16 * 1024 * 1024
_PAGE_BYTES = 4096


@dataclass
class Seen:
    """What the well-behaved client saw."""

    sent: int = 0
    right: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def percentile_ms(self, percent: float) -> float:
        """Of the time by the clock from asking to the image."""
        return 1e3 * (percentile(self.latencies_s, percent) or 0.0)


class Asker:
    """One request after the other; the same seed must give the same image, each time."""

    def __init__(self, client: Client, model: str, steps: int) -> None:
        self._client = client
        self._model = model
        self._steps = steps
        self._known: dict[int, tuple[bytes, ...]] = {}

    def ask(self, is_enough: Callable[[int], bool]) -> Seen:
        """Until it is enough, given the number of requests."""
        seen = Seen()
        while not is_enough(seen.sent):
            seed = seen.sent % SEEDS
            seen.sent += 1
            started_s = time.monotonic()
            result = self._client.generate(
                self._model, "a red circle", seed=seed, steps=self._steps, width=64, height=64
            )
            seen.latencies_s.append(time.monotonic() - started_s)
            images = tuple(result.images)
            seen.right += self._known.setdefault(seed, images) == images
        return seen


@dataclass(frozen=True)
class Figures:
    """What is reported; sizes in MB are 10**6 bytes of memory that belongs to the daemon alone."""

    frames: int
    messages: int
    frames_per_s: float
    requests: int
    answered_right: int
    quiet_p50_ms: float
    quiet_p99_ms: float
    p50_ms: float
    p99_ms: float
    p99_ratio: float
    memory_growth_mb: float

    def holds(self, *, ratio: float = 2.0, growth_mb: float = 50.0) -> bool:
        """Every answer came and was right, in time, and no memory was lost."""
        answered = self.requests == self.answered_right and self.requests > 0
        return answered and self.p99_ratio < ratio and self.memory_growth_mb < growth_mb


def measure(
    store: Path,
    folder: Path,
    frames: int,
    *,
    model: str = MODEL,
    seed: int = 0,
    steps: int = 4,
    quiet_requests: int = QUIET_REQUESTS,
) -> Figures:
    """Run it. `store` has the model; the daemon's files go to `folder`."""
    settings = DaemonSettings(store=store, runtime_dir=folder / "run", arena_bytes=_ARENA_BYTES)
    with running_daemon(settings, folder) as daemon, Client(daemon.endpoint) as client:
        asker = Asker(client, model, steps)
        asker.ask(lambda asked: asked >= SEEDS)  # first uses, and the right images
        quiet = asker.ask(lambda asked: asked >= quiet_requests)
        pid = int(daemon.ask(admin.Status())["pid"])
        before = private_bytes(pid)
        say(f"  quiet: p99 {quiet.percentile_ms(99):.1f} ms; now {frames} hostile frames")
        command = [sys.executable, "-m", "benchmarks.hostile", daemon.endpoint]
        with subprocess.Popen(
            [*command, "--frames", str(frames), "--seed", str(seed)], stdout=subprocess.PIPE, text=True
        ) as attack:
            beside = asker.ask(lambda asked: attack.poll() is not None and asked >= LEAST_REQUESTS)
            assert attack.stdout is not None
            sent, messages, attack_s = attack.stdout.read().split()
        until_s = time.monotonic() + SETTLE_S
        settled = asker.ask(lambda asked: time.monotonic() > until_s)
        daemon.check()
        growth = private_bytes(pid) - before
    return Figures(
        frames=int(sent),
        messages=int(messages),
        frames_per_s=int(sent) / float(attack_s),
        requests=beside.sent + settled.sent,
        answered_right=beside.right + settled.right,
        quiet_p50_ms=quiet.percentile_ms(50),
        quiet_p99_ms=quiet.percentile_ms(99),
        p50_ms=beside.percentile_ms(50),
        p99_ms=beside.percentile_ms(99),
        p99_ratio=beside.percentile_ms(99) / quiet.percentile_ms(99),
        memory_growth_mb=growth / 1e6,
    )


def private_bytes(pid: int) -> int:
    """Resident memory that no other process shares: neither the arena nor libraries."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


def make_store(folder: Path) -> Path:
    """A store with the tiny model."""
    import torch

    from understudy_demo import tiny
    from understudyd.store.ingest import ingest_many
    from understudyd.store.store import Store

    torch.set_num_threads(1)
    store = Store.open(folder / "store", writable=True)
    ingest_many(store, [(MODEL, tiny.save(tiny.stable_diffusion(1), folder / MODEL))])
    return store.path


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line for programs on stdout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="understudy-fuzz-") as name:
        folder = Path(name)
        figures = measure(make_store(folder), folder, arguments.frames, seed=arguments.seed)
    if arguments.json:
        json_line(vars(figures))
    else:
        show_table(
            "hostile frames", ["figure", "value"], [(k, f"{v:,.1f}") for k, v in vars(figures).items()]
        )
    return 0 if figures.holds() else 1


if __name__ == "__main__":
    raise SystemExit(main())
