"""One workload, and what serves it today: `python -m benchmarks.compare [--json] [--quick]`.

Requests for many models come in bursts, at the same times for everybody: for the daemon, and for small
programs around diffusers (`benchmarks/baselines`): `from_pretrained` at every switch, an LRU of pipelines in
process, the same with a thread that loads ahead, and on a GPU accelerate's CPU offload (without one there is
nothing to offload from: it is left out). All have the same bytes for weights and compute with one thread;
every image is compared with that of `from_pretrained` at every switch.

`--device cuda --size real` is for a GPU: Stable Diffusion 1.5 in fp16 with random weights. `--size tiny` is
the demo's family. `step_inflation` is the median time of an image that was painted while a load was on its
way, in times of one that was not; all images have the same steps.

Expected before the first run, at tiny size: a load takes as long as an image, so `from_pretrained` at every
switch has half of our throughput, the LRU is in between, and the thread is no better, for it shares the
interpreter: images take half as long again while it loads.
"""

import argparse
import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from benchmarks.baselines import names
from benchmarks.compare_scene import Plan, Scene, set_scene
from benchmarks.compare_work import Answers, Painted, Spent, Work
from benchmarks.kit import (
    DaemonProcess,
    DaemonSettings,
    json_line,
    percentile,
    running_daemon,
    say,
    show_table,
    timed,
)
from understudy import AsyncClient, admin
from understudy.trace import fetch, lane
from understudy_demo.measure import Served, turns
from understudy_demo.serving import short_runtime_dir
from understudy_demo.workload import Request

OURS = "understudy"
_TRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. The visible switch is how long nothing was painted before an image of another model,
    although something was wanted; in milliseconds, None without a switch.
    """

    images_per_s: float
    switch_ms_p50: float | None
    switch_ms_p95: float | None
    switch_ms_p99: float | None
    image_ms: float
    step_inflation: float | None
    memory_mb: float
    loads: int


# -- runs -----------------------------------------------------------------------------------------------


def run_baseline(name: str, work: Work, folder: Path) -> Answers:
    """One of `benchmarks.baselines`, in a process of its own."""
    work_path, answers_path = folder / f"{name}-work.json", folder / f"{name}-answers.json"
    work_path.write_bytes(msgspec.json.encode(work))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.baselines", name, str(work_path), str(answers_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"the baseline {name} ended with status {process.returncode}")
    return msgspec.json.decode(answers_path.read_bytes(), type=Answers)


def run_ours(work: Work, scene: Scene, folder: Path) -> Answers:
    """The daemon with its defaults."""
    settings = DaemonSettings(
        store=scene.store, runtime_dir=short_runtime_dir(folder / "run"), arena_bytes=work.budget_bytes
    )
    environ = {"UNDERSTUDY__DEVICE__KIND": work.device, "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environ), running_daemon(settings, folder / "daemon") as daemon:
        served, hashes = asyncio.run(_replay(daemon.endpoint, work.requests))
        spans = fetch(daemon.ask, _TRACE_S).spans
        memory_bytes = _memory_bytes(daemon, work)
    taken = turns(served, lane(spans, "stage"))
    return Answers(
        painted=tuple(
            Painted(
                index=turn.served.index,
                model=turn.served.model,
                arrived_s=turn.served.sent_s,
                started_s=turn.span.start_s,
                ended_s=turn.span.end_s,
                sha256=hashes[turn.served.index],
            )
            for turn in taken
        ),
        loads=tuple(
            Spent(name=span.name, started_s=span.start_s, ended_s=span.end_s)
            for span in spans
            if span.lane.startswith("loader") and span.start_s >= served[0].sent_s
        ),
        memory_bytes=memory_bytes,
    )


async def _replay(endpoint: str, requests: Sequence[Request]) -> tuple[list[Served], dict[int, str]]:
    """Each request at its time; when it was wanted and answered, and the hash of its pixels."""
    hashes: dict[int, str] = {}
    async with AsyncClient(endpoint) as client:
        first = requests[0]
        await _paint(client, first)  # as for everybody, the first image does not count
        origin_s = time.monotonic()

        async def one(request: Request) -> Served:
            wanted_s = origin_s + request.at_s
            await asyncio.sleep(max(0.0, wanted_s - time.monotonic()))
            hashes[request.index] = await _paint(client, request)
            return Served(request.index, request.model, "", wanted_s, time.monotonic())

        return list(await asyncio.gather(*map(one, requests))), hashes


async def _paint(client: AsyncClient, request: Request) -> str:
    result = await client.generate(
        request.model, request.prompt, seed=request.seed, steps=request.steps, width=request.width,
        height=request.height, format="raw",
    )  # fmt: skip
    return hashlib.sha256(b"".join(result.images)).hexdigest()


def _memory_bytes(daemon: DaemonProcess, work: Work) -> int:
    """What daemon and loaders hold, shared memory once; on a GPU also the arena."""
    parent = int(daemon.ask(admin.Status())["pid"])
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    host_bytes = sum(_proportional_bytes(pid) for pid in (parent, *map(int, children)))
    return host_bytes + (work.budget_bytes if work.device == "cuda" else 0)


def _proportional_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


# -- sums -----------------------------------------------------------------------------------------------


def figures(answers: Answers) -> Figures:
    """Sum a run up."""
    painted = sorted(answers.painted, key=lambda one: one.started_s)
    gaps_ms, free_s, before = [], float("-inf"), ""
    for number, one in enumerate(painted):
        wanted_s = min(other.arrived_s for other in painted[number:])
        if one.model != before:
            gaps_ms.append(1e3 * max(0.0, one.started_s - max(free_s, wanted_s)))
        free_s, before = one.ended_s, one.model
    elapsed_s = painted[-1].ended_s - min(one.arrived_s for one in painted)
    return Figures(
        images_per_s=len(painted) / elapsed_s,
        switch_ms_p50=percentile(gaps_ms, 50),
        switch_ms_p95=percentile(gaps_ms, 95),
        switch_ms_p99=percentile(gaps_ms, 99),
        image_ms=1e3 * statistics.median(one.ended_s - one.started_s for one in painted),
        step_inflation=inflation(painted, answers.loads),
        memory_mb=answers.memory_bytes / 1e6,
        loads=len(answers.loads),
    )


def inflation(painted: Sequence[Painted], loads: Sequence[Spent]) -> float | None:
    """Median time of images that were painted while something was being loaded, over that of the others."""
    beside, alone = [], []
    for one in painted:
        is_beside = any(load.started_s < one.ended_s and one.started_s < load.ended_s for load in loads)
        (beside if is_beside else alone).append(one.ended_s - one.started_s)
    return statistics.median(beside) / statistics.median(alone) if beside and alone else None


def wrong_images(runs: Mapping[str, Answers]) -> int:
    """How many images are not those of `from_pretrained` at every switch."""
    right = {one.index: one.sha256 for one in runs["per_switch"].painted}
    return sum(right[one.index] != one.sha256 for answers in runs.values() for one in answers.painted)


def summary(runs: Mapping[str, Answers]) -> dict[str, Any]:
    """Everybody's figures, and ours in times of the best of the others."""
    found = {name: figures(answers) for name, answers in runs.items()}
    others = [one for name, one in found.items() if name != OURS]
    return {
        "requests": len(runs[OURS].painted),
        "wrong_images": wrong_images(runs),
        "throughput_ratio": found[OURS].images_per_s / max(one.images_per_s for one in others),
        **{name: asdict(one) for name, one in found.items()},
    }


# -- the benchmark --------------------------------------------------------------------------------------


def measure(plan: Plan, folder: Path, programs: Sequence[str] | None = None) -> dict[str, Any]:
    """Everybody, one after the other; of the `programs` only these, "per_switch" among them, and ours."""
    scene = set_scene(plan, folder)
    say(f"  {plan.models} models, room for {plan.resident}: {scene.work.budget_bytes / 1e6:.0f} MB")
    runs = {}
    for name in programs or names(plan.device):
        with timed(name):
            runs[name] = run_baseline(name, scene.work, folder)
    with timed(OURS):
        runs[OURS] = run_ours(scene.work, scene, folder)
    return summary(runs)


def show(found: Mapping[str, Any]) -> None:
    runs = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    rows = [
        [key, *("-" if run[key] is None else f"{run[key]:.2f}" for run in runs.values())]
        for key in Figures.__dataclass_fields__
    ]
    show_table(f"{found['requests']} requests, {found['wrong_images']} wrong images", ["", *runs], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="few models and requests, for tests")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--work", type=Path, help="where the models go (default: a temporary folder)")
    options = parser.parse_args(arguments)
    plan = Plan.of(options.device, options.size, quick=options.quick)
    if plan.device == "cpu":
        say("  CPU offload means nothing without a GPU: left out")
    with tempfile.TemporaryDirectory(prefix="understudy-", dir=options.work) as folder:
        found = measure(plan, Path(folder))
    show(found)
    if options.json:
        json_line(found)


if __name__ == "__main__":
    main()
