"""200 models, room for 20: `python -m benchmarks.serve [--json] [--quick] [--models N] [--requests N]`.

A closed-loop workload (several client processes, Zipf popularity, images of one or two steps) goes through
the same daemon, set up in three ways, in alternating rounds; the two bounds get every second round:

* all resident: an arena for every model, filled beforehand. No switch ever waits: the upper bound.
* on demand: room for 20, lookahead and prefetching off, first come first served. What an LRU cache of models
  does: the lower bound.
* ours: room for 20, loading ahead.

Loads are slowed to a share of an image's time, since a small file in the page cache would load in no
time. `gap_closed` = (ours - on demand) / (all resident - on demand), in images per second. Every image of
every run is compared with plain diffusers' (`from_pretrained`, same prompt, seed and steps).
"""

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.kit import (
    DaemonProcess,
    DaemonSettings,
    json_line,
    running_daemon,
    say,
    show_table,
    timed,
)
from benchmarks.serve_client import Answer, Ask, Asks
from benchmarks.serve_scene import QUICK, Plan, Scene, Wish, set_scene, wish
from understudy import admin
from understudy.trace import Span, fetch, lane
from understudy_demo.measure import Figures, Served, figures, gap_closed, turns
from understudy_demo.serving import rate_for, short_runtime_dir
from understudy_demo.workload import Request
from understudyd.shell.derived import parse_name
from understudyd.shell.forecast_file import NAME as FORECAST

ALL_RESIDENT, ON_DEMAND, OURS = "all-resident", "on-demand", "ours"
ROUND_LIMIT_S = 180.0  # a round takes some 20 s; after this what is unanswered is lost
TRACE_S = 3600.0
FAREWELL_S = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """What one run came to. `load_ms` is the mean time of a UNet's load, what a model's load mostly is, or of
    an adapter's; `fold_ms` that of the `folds`.

    `throughput_per_s` counts only the rounds that all runs shared, so that it can be compared;
    `round_throughputs_per_s` has each of them.
    """

    completed: int
    lost: int
    wrong: int
    figures: Figures
    throughput_per_s: float
    round_throughputs_per_s: tuple[float, ...]
    load_ms: float | None
    fold_ms: float | None = None
    folds: int = 0


# -- one run --------------------------------------------------------------------------------------------


def perform(plan: Plan, scene: Scene, chosen: Mapping[str, DaemonSettings], work: Path) -> dict[str, Run]:
    """Start a daemon for each of `chosen`, let the client processes loose on one after the other, sum up.

    The workload is cut into rounds: what else happens on the machine meanwhile happens to all daemons
    alike. Each round goes through ours, every second one through the others too, a different one
    first each time. The daemons that have no turn idle.
    """
    asked: dict[str, list[Request]] = {name: [] for name in chosen}
    rounds: dict[str, list[list[Answer]]] = {name: [] for name in chosen}
    with contextlib.ExitStack() as stack:
        (scene.store / FORECAST).unlink(missing_ok=True)  # nobody knows the workload from an earlier run
        daemons = {
            name: stack.enter_context(running_daemon(settings, work / name))
            for name, settings in chosen.items()
        }
        for daemon in daemons.values():
            for model in scene.pinned:
                daemon.ask(admin.Load(name=model))
                daemon.ask(admin.Pin(name=model))
        if (resident := daemons.get(ALL_RESIDENT)) is not None:
            for model in sorted({request.model for request in scene.requests}):
                resident.ask(admin.Load(name=model))
        for number in range(plan.rounds):
            requests = scene.requests[number * plan.round_size : (number + 1) * plan.round_size]
            turn = number // 2 % len(daemons)
            for name in [*daemons, *daemons][turn : turn + len(daemons)]:
                if number % 2 and name != OURS:
                    continue
                asked[name] += requests
                with timed(f"round {number + 1} of {plan.rounds}, {name}"):
                    rounds[name].append(send_from_processes(plan, requests, daemons[name], work / name))

        def shared(name: str) -> list[list[Answer]]:
            return rounds[name][::2] if name == OURS else rounds[name]

        traces = {name: fetch(daemon.ask, TRACE_S).spans for name, daemon in daemons.items()}
    return {
        name: sum_up(asked[name], scene.references, rounds[name], shared(name), traces[name])
        for name in chosen
    }


def send_from_processes(
    plan: Plan,
    requests: Sequence[Request],
    daemon: DaemonProcess,
    folder: Path,
    limit_s: float = ROUND_LIMIT_S,
) -> list[Answer]:
    """All clients connect, then start together. A client that dies leaves its requests unanswered."""
    processes = []
    try:
        for number in range(plan.clients):
            asks = [r for i, r in enumerate(requests) if i % plan.clients == number]
            processes.append(_Client(number, asks, plan, daemon.endpoint, folder))
        for process in processes:
            process.wait_ready()
        for process in processes:
            process.start()
        deadline_s = time.monotonic() + limit_s
        if not all(process.is_done(deadline_s) for process in processes):
            daemon.check()
            say(f"  not done within {limit_s:g} s; the daemon's queue: {daemon.ask(admin.Queue())}")
        return [answer for process in processes for answer in process.answers()]
    finally:
        for process in processes:
            process.close()


def ask(request: Request) -> Ask:
    """What a client asks for; "base+pixel-art@0.8" is a base and an adapter."""
    model, adapters = parse_name(request.model) or (request.model, ())
    return Ask(
        index=request.index, model=model, prompt=request.prompt, seed=request.seed, steps=request.steps,
        size=request.width, adapters=tuple((adapter.name, adapter.scale) for adapter in adapters),
    )  # fmt: skip


class _Client:
    """One client process."""

    def __init__(
        self, number: int, requests: Sequence[Request], plan: Plan, endpoint: str, folder: Path
    ) -> None:
        asks = tuple(map(ask, requests))
        work = folder / f"client-{number}-asks.json"
        work.write_bytes(msgspec.json.encode(Asks(outstanding=plan.outstanding, asks=asks)))
        self._answers = folder / f"client-{number}-answers.json"
        self._answers.unlink(missing_ok=True)
        command = ["benchmarks.serve_client", endpoint, str(work), str(self._answers)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def is_done(self, deadline_s: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        return self._process.poll() is not None

    def answers(self) -> list[Answer]:
        """What came back; a client that is still waiting is stopped, and notes what it had."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(FAREWELL_S)
        if not self._answers.exists():
            return []
        return msgspec.json.decode(self._answers.read_bytes(), type=list[Answer])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def sum_up(
    requests: Sequence[Request],
    references: Mapping[Wish, str],
    rounds: Sequence[Sequence[Answer]],
    shared: Sequence[Sequence[Answer]],
    spans: Sequence[Span],
) -> Run:
    """Figures of a run. The order of service is the stage's own, from the daemon's trace."""
    answers = [answer for answers in rounds for answer in answers]
    for answer in answers:
        if answer.message:
            say(f"  request {answer.index} ({answer.model}): {answer.message}")
    answered = Counter(answer.index for answer in answers if answer.outcome != "none")
    images = [answer for answer in answers if answer.outcome == "image"]
    expected = {request.index: references[wish(request)] for request in requests}
    models = {request.index: request.model for request in requests}
    served = [Served(a.index, models[a.index], a.tier, a.sent_s, a.ended_s) for a in images]
    taken = turns(served, lane(spans, "stage"))
    began_s = min(one.sent_s for one in served)
    during = [span for span in spans if span.start_s >= began_s]
    return Run(
        completed=len(images),
        lost=sum(answered[request.index] != 1 for request in requests),
        wrong=sum(answer.sha256 != expected[answer.index] for answer in images),
        figures=figures(taken, elapsed_s=sum(_elapsed_s(answers) for answers in rounds)),
        throughput_per_s=_throughput_per_s(shared),
        round_throughputs_per_s=tuple(_throughput_per_s([answers]) for answers in shared),
        load_ms=_mean_ms(filter(_is_own_load, during)),
        fold_ms=_mean_ms(lane(during, "fold")),
        folds=len(lane(during, "fold")),
    )


def _throughput_per_s(rounds: Sequence[Sequence[Answer]]) -> float:
    images = sum(answer.outcome == "image" for answers in rounds for answer in answers)
    return images / max(sum(_elapsed_s(answers) for answers in rounds), 1e-9)


def _elapsed_s(answers: Sequence[Answer]) -> float:
    """From the first request of a round to its last answer."""
    if not answers:
        return 0.0
    return max(answer.ended_s for answer in answers) - min(answer.sent_s for answer in answers)


def _is_own_load(span: Span) -> bool:
    """A model's UNet, or an adapter."""
    return span.lane.startswith("loader") and (span.name.endswith(" unet") or span.name.startswith("lora "))


def _mean_ms(spans: Iterable[Span]) -> float | None:
    times_s = [span.end_s - span.start_s for span in spans]
    return 1e3 * statistics.mean(times_s) if times_s else None


# -- the benchmark --------------------------------------------------------------------------------------


def settings(plan: Plan, scene: Scene, work: Path) -> dict[str, DaemonSettings]:
    """The three daemons: ours has the defaults, and loads slowed to `load_share` of an image's time."""
    ours = DaemonSettings(
        store=scene.store,
        runtime_dir=short_runtime_dir(work / "run-ours"),
        arena_bytes=scene.room_bytes,
        rate_limit_bytes_per_s=rate_for(scene.load_bytes, plan.load_share * scene.image_s),
    )
    resident_dir, demand_dir = (short_runtime_dir(work / f"run-{i}") for i in ("resident", "demand"))
    return {
        ALL_RESIDENT: replace(ours, runtime_dir=resident_dir, arena_bytes=scene.whole_bytes),
        ON_DEMAND: replace(ours, runtime_dir=demand_dir, lookahead=0, order="fcfs", prefetch=False),
        OURS: ours,
    }


def plan_of(*, quick: bool, models: int | None = None, requests: int | None = None) -> Plan:
    """The plan that the command's options ask for."""
    plan = QUICK if quick else Plan()
    if models is not None:
        plan = replace(plan, models=models, resident=max(1, models // 10))
    return plan if requests is None else replace(plan, requests=requests)


def benchmark(plan: Plan, work: Path) -> dict[str, Run]:
    """The three runs, by name."""
    work.mkdir(parents=True, exist_ok=True)
    scene = set_scene(plan, work)
    say(f"  an image takes {1e3 * scene.image_s:.1f} ms, a model is {scene.load_bytes / 2**20:.1f} MiB")
    return perform(plan, scene, settings(plan, scene, work), work)


def summary(plan: Plan, runs: Mapping[str, Run]) -> dict[str, float | int | str | None]:
    """The JSON line: figures of our run; `lost` and `wrong_image` count all three runs."""
    ours, resident, demand = runs[OURS], runs[ALL_RESIDENT], runs[ON_DEMAND]
    try:
        closed = gap_closed(
            ours.throughput_per_s,
            resident.throughput_per_s,
            demand.throughput_per_s,
        )
    except ValueError as error:
        say(f"  no gap to close: {error}")
        closed = None
    return {
        "models": plan.models,
        "resident": plan.resident,
        "requests": plan.requests,
        "completed": ours.completed,
        "lost": sum(run.lost for run in runs.values()),
        "wrong_image": sum(run.wrong for run in runs.values()),
        "switch_share": ours.figures.switch_share,
        "distinct_models": ours.figures.models,
        "visible_switch_ms_p50": ours.figures.switch_ms_p50,
        "visible_switch_ms_p99": ours.figures.switch_ms_p99,
        "idle_while_waiting_percent": ours.figures.idle_while_waiting_percent,
        "idle_while_waiting_percent_on_demand": demand.figures.idle_while_waiting_percent,
        "throughput": ours.throughput_per_s,
        "throughput_all_resident": resident.throughput_per_s,
        "throughput_on_demand_lru": demand.throughput_per_s,
        "gap_closed": closed,
    }


def show(plan: Plan, runs: Mapping[str, Run]) -> None:
    """The three runs side by side."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = {
        "completed": lambda r: f"{r.completed}",
        "lost": lambda r: f"{r.lost}",
        "wrong images": lambda r: f"{r.wrong}",
        "models served": lambda r: f"{r.figures.models}",
        "requests that switch": lambda r: f"{100 * r.figures.switch_share:.0f} %",
        "image, mean ms": lambda r: ms(r.figures.image_ms),
        "load, mean ms": lambda r: ms(r.load_ms),
        "fold, mean ms": lambda r: ms(r.fold_ms),
        "load / image": lambda r: ms(r.load_ms and r.load_ms / r.figures.image_ms),
        "visible switch p50, ms": lambda r: ms(r.figures.switch_ms_p50),
        "visible switch p99, ms": lambda r: ms(r.figures.switch_ms_p99),
        "idle while work waits": lambda r: f"{r.figures.idle_while_waiting_percent:.1f} %",
        "images per second": lambda r: f"{r.throughput_per_s:.2f}",
    }
    title = f"{plan.models} models, room for {plan.resident}, {plan.clients} client processes"
    show_table(title, ["", *runs], [[label, *map(of, runs.values())] for label, of in rows.items()])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="20 models, 100 requests: does it work at all?")
    parser.add_argument("--models", type=int, default=None, help="with room for a tenth of them (200)")
    parser.add_argument("--requests", type=int, default=None, help="(2000)")
    parser.add_argument("--work", type=Path, default=Path(".work/serve"), help="models and logs go here")
    chosen = parser.parse_args(argv)
    plan = plan_of(quick=chosen.quick, models=chosen.models, requests=chosen.requests)
    runs = benchmark(plan, chosen.work)
    show(plan, runs)
    document = summary(plan, runs)
    if chosen.json:
        json_line(document)
    return 0 if not document["lost"] and not document["wrong_image"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
