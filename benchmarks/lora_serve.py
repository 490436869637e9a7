"""300 adapters over 3 bases, memory for 20 overlays: `python -m benchmarks.lora_serve [--json] [--quick]`.

The workload of `benchmarks.serve` (closed loop, several client processes, Zipf popularity, images of one or
two steps), but what is popular are adapters, each over its base, and the bases themselves. It goes through
the same daemon, set up in three ways, in alternating rounds:

* all resident: an arena for every overlay, all folded beforehand. No switch ever waits: the upper bound.
* fold on demand: room for 20 overlays, lookahead and prefetching off, first come first served: what an LRU
  cache of folded adapters does. The lower bound.
* ours: room for 20 overlays, loading and folding ahead.

The arena of the last two holds the bases, which are pinned, and 20 overlays; adapters take room from
overlays. Loads of adapters are slowed to a share of an image's time, since a small file in the page cache
would load in no time; folds are as slow as they are. `gap_closed` = (ours - on demand) / (all resident - on
demand), in images per second; `gap_closed_p50` is the median of the same over single rounds, which a burst of
other work on the machine does not spoil. Every image of every run is compared with diffusers' own
(`load_lora_weights`, `set_adapters` and `fuse_lora` on a fresh copy; same prompt, seed and steps).
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import serve
from benchmarks.kit import DaemonSettings, json_line, say
from benchmarks.lora_serve_scene import QUICK, LoraPlan, set_scene
from benchmarks.serve import Run
from benchmarks.serve_scene import Scene
from understudy_demo.measure import gap_closed


def benchmark(plan: LoraPlan, work: Path) -> tuple[Scene, dict[str, Run]]:
    """The three runs, by name."""
    work.mkdir(parents=True, exist_ok=True)
    scene = set_scene(plan, work)
    say(f"  an image takes {1e3 * scene.image_s:.1f} ms")
    chosen: Mapping[str, DaemonSettings] = serve.settings(plan, scene, work)
    return scene, serve.perform(plan, scene, chosen, work)


def summary(plan: LoraPlan, runs: Mapping[str, Run]) -> dict[str, float | int | str | None]:
    """The JSON line: figures of our run; `lost` and `wrong_image` count all three runs."""
    ours, found = runs[serve.OURS], serve.summary(plan, runs)
    del found["models"], found["resident"]
    found["throughput_fold_on_demand"] = found.pop("throughput_on_demand_lru")
    return {
        "adapters": plan.adapters,
        "bases": plan.bases,
        "resident_overlays": plan.resident,
        **found,
        "gap_closed_p50": median_gap_closed(runs),
        "image_ms": ours.figures.image_ms,
        "fold_ms": ours.fold_ms,
        "load_ms": ours.load_ms,
        "folds": ours.folds,
        "folds_on_demand": runs[serve.ON_DEMAND].folds,
    }


def median_gap_closed(runs: Mapping[str, Run]) -> float | None:
    """The median over rounds that all runs shared and in which there was a gap; None without any."""
    rounds = zip(
        *(runs[name].round_throughputs_per_s for name in (serve.OURS, serve.ALL_RESIDENT, serve.ON_DEMAND)),
        strict=True,
    )
    closed = [gap_closed(*one) for one in rounds if one[1] > one[2]]
    return statistics.median(closed) if closed else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.lora_serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    parser.add_argument(
        "--quick", action="store_true", help="30 adapters, 100 requests: does it work at all?"
    )
    parser.add_argument("--work", type=Path, default=Path(".work/lora-serve"), help="models and logs go here")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else LoraPlan()
    _, runs = benchmark(plan, options.work)
    serve.show(plan, runs)
    document = summary(plan, runs)
    if options.json:
        json_line(document)
    return 0 if not document["lost"] and not document["wrong_image"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
