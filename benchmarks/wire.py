"""What the daemon adds to a request: `python -m benchmarks.wire [--json] [--quick]`.

A pipeline that makes nothing is asked for an image through client, front end, core, stage and back, one
request after the other, by a client in a process of its own; over ipc and over tcp. Beside it, in turns, two
processes throw a message of the same size back and forth with plain pyzmq.

Then what the front end's work does to the stage: a pipeline whose steps are mostly the interpreter's runs
alone, and beside 1,000 waiting requests to which 500 a second are added (an old one is taken back for each),
while other models are loaded and their views are built (`interference`).

Expected before the first run, on two cores: raw 0.1 ms; ours five wake-ups of threads and 0.2 ms of Python,
0.5 ms; 1,000 requests a second. Steps 5 % slower: the loop has the interpreter for a tenth of the time.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kit import json_line, percentile, show_table, timed
from benchmarks.wire_scene import NOTHING, OTHERS, STEPS, Scene, daemon_in, free_port
from understudy import Client, Handle, admin

IMAGE_SIDE_PX = 592  # 592 x 592 x 3 bytes of raw pixels are 1.05 MB
SMALL_SIDE_PX = 8
WAITING, PER_S = 1000, 500


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything: `rounds` of `count` requests, `images` large ones; `steps` of the other
    pipeline beside so many `loads`, `interference_rounds` times.
    """

    rounds: int = 5
    count: int = 600
    images: int = 60
    in_flight: int = 32
    interference_rounds: int = 3
    steps: int = 120
    loads: int = 8


class Process:
    """One of `wire_client`'s; `ask` gives it a line and waits for its answer."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.wire_client", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answer()

    def ask(self, **order: Any) -> Any:
        self.tell(**order)
        return self.answer()

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(order or {"go": True}), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Process]:
    made = Process(*arguments)
    try:
        yield made
    finally:
        made.close()


# -- a request's overhead -------------------------------------------------------------------------------


def overhead(endpoint: str, raw_endpoint: str, plan: Plan) -> dict[str, float]:
    """Requests that make nothing, plain round trips beside them; milliseconds."""
    small: list[float] = []
    raw: list[float] = []
    with process("latency", endpoint, NOTHING) as ours, process("raw", raw_endpoint) as plain:
        for one in (ours.ask, plain.ask):
            one(count=plan.count // 4, side_px=SMALL_SIDE_PX)  # first uses
        for _ in range(plan.rounds):
            small += ours.ask(count=plan.count, side_px=SMALL_SIDE_PX)
            raw += plain.ask(count=plan.count)
        images = ours.ask(count=plan.images, side_px=IMAGE_SIDE_PX)
    with process("blocking", endpoint, NOTHING) as blocking:
        blocking.ask(count=plan.count // 4)
        threaded = blocking.ask(count=plan.count)
    with process("throughput", endpoint, NOTHING) as many:
        order = {"count": plan.count, "in_flight": plan.in_flight}
        many.ask(**order)
        seconds = [many.ask(**order) for _ in range(plan.rounds)]
    return {
        "p50_ms": _at(small, 50),
        "p99_ms": _at(small, 99),
        "raw_p50_ms": _at(raw, 50),
        "raw_p99_ms": _at(raw, 99),
        "requests_per_s": plan.count / statistics.median(seconds),
        "image_1mb_p50_ms": _at(images, 50),
        "blocking_client_p50_ms": _at(threaded, 50),
    }


def _at(values: Sequence[float], percent: float) -> float:
    value = percentile(values, percent)
    assert value is not None
    return value


# -- what the front end's work does to the stage ----------------------------------------------------------


def interference(scene: Scene, plan: Plan) -> dict[str, float]:
    """Steps alone and beside everything, in turns; times in milliseconds."""
    alone: list[float] = []
    beside: list[float] = []
    pings: list[float] = []
    floods: list[Mapping[str, float]] = []
    loaded = 0
    others = iter(OTHERS)
    with (
        Client(scene.ipc) as client,
        process("flood", scene.ipc, NOTHING) as flood,
        process("ping", scene.ipc) as pinger,
    ):
        steps_s(_start_steps(client, plan.steps // 4))
        for _ in range(plan.interference_rounds):
            alone += np.diff(steps_s(_start_steps(client, plan.steps))).tolist()
            handle = _start_steps(client, plan.steps)
            flood.ask(waiting=WAITING, per_s=PER_S)
            began_s = time.perf_counter()
            pinger.tell()
            loaded += _load(scene, itertools.islice(others, plan.loads), lambda handle=handle: handle.done)  # type: ignore[misc]
            at_s = steps_s(handle)
            pings += pinger.ask()
            floods.append(flood.ask())
            beside += np.diff(at_s[at_s > began_s]).tolist()
    return {
        "step_p50_ms": 1e3 * _at(alone, 50),
        "step_p50_ratio": _at(beside, 50) / _at(alone, 50),
        "step_p99_ratio": _at(beside, 99) / _at(alone, 99),
        "ping_p50_ms": _at(pings, 50),
        "ping_p99_ms": _at(pings, 99),
        "requests_per_s": statistics.median(one["per_s"] for one in floods),
        "refused": sum(one["refused"] for one in floods),
        "models_loaded": loaded,
    }


def _start_steps(client: Client, steps: int) -> Handle:
    return client.submit(STEPS, "", steps=steps, format="raw", progress=False)


def steps_s(handle: Handle) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The moments at which steps ended, on the clock that this process has too."""
    (payload,) = handle.result().images
    at_s: np.ndarray[Any, np.dtype[np.float64]] = np.frombuffer(payload, np.float64)
    return at_s


def _load(scene: Scene, names: Iterable[str], is_over: Callable[[], bool]) -> int:
    """Load models that were never loaded, one after the other: all their views are new. How many it were."""
    count = 0
    for name in names:
        if is_over():
            break
        scene.daemon.ask(admin.Load(name=name))
        count += 1
    return count


# -- the benchmark --------------------------------------------------------------------------------------


def measure(folder: Path, plan: Plan) -> dict[str, Any]:
    """All figures."""
    with contextlib.ExitStack() as stack:
        with timed("the daemon is there"):
            scene = stack.enter_context(daemon_in(folder))
        raw_ends = [f"ipc://{folder / 'raw.sock'}", f"tcp://127.0.0.1:{free_port()}"]
        stack.enter_context(process("raw_server", *raw_ends))
        with timed("ipc"):
            ipc = overhead(scene.ipc, raw_ends[0], plan)
        with timed("tcp"):
            tcp = overhead(scene.tcp, raw_ends[1], plan)
        with timed("interference"):
            disturbed = interference(scene, plan)
    return ipc | {"tcp": tcp, "interference": disturbed}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="few requests, for tests")
    options = parser.parse_args(arguments)
    plan = Plan() if not options.quick else Plan(
        rounds=2, count=40, images=3, interference_rounds=1, steps=300, loads=1
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="understudy-") as folder:
        found = measure(Path(folder), plan)
    tcp, disturbed = found["tcp"], found["interference"]
    show_table(
        "a request that makes nothing",
        ["figure", "ipc", "tcp"],
        [[key, f"{found[key]:.3f}", f"{tcp[key]:.3f}"] for key in tcp],
    )
    show_table("steps beside the front end", ["figure", ""], [[k, f"{v:.3f}"] for k, v in disturbed.items()])
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
