"""Understudy on a real GPU: `python -m benchmarks.gpu [--out FILE] [--device cuda|cpu] [--size real|tiny]`.

Writes one JSON file, anew after every section, and a table. Without a GPU it says so, writes `"gpu": null`
and exits 0; `--device cpu` runs the sections that mean something there, to try the check itself. Exit status
1 when a section broke or a check is false, 2 when something that it needs is not installed.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.runner import Results

NEEDED = ("torch", "diffusers", "transformers", "safetensors", "msgspec", "xxhash", "numpy", "rich")
NEEDED_ON_A_GPU = ("cuda.bindings",)
DRIVER_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")  # the last two: WSL, Jetson
LIMIT_S = 540.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the JSON file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["real", "tiny"], default="real")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections")
    parser.add_argument("--work", type=Path, help="a folder with 20 GB of room (default: a temporary one)")
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="write cost profiles to simulate with")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="keep it here too, for docs/benchmarks.md"
    )
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all sections together")
    options = parser.parse_args(arguments)
    if missing := missing_packages(NEEDED):
        return _say_missing(missing) if any(map(os.path.exists, DRIVER_NODES)) else _say_no_driver(options)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="understudy-gpu-") as work:
        return check(options, Path(work))


def check(options: argparse.Namespace, work: Path) -> int:
    """Find the GPU, then run the sections; the exit status."""
    # Asked whether there is a GPU, torch shall not touch it: a process that did cannot be forked any more.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.machine import describe_machine, find_gpu
    from benchmarks.gpu.runner import Results, run_apart

    bench = Bench(options.device, options.size, work)
    probe = run_apart("gpu", find_gpu, bench, 60.0)
    if (broken := probe.get("error")) is not None:
        print(f"the GPU cannot be used: {broken}\n{probe.get('traceback', '')}", file=sys.stderr)
        return 1
    gpu: dict[str, Any] | None = probe["gpu"]
    head = {
        "gpu": gpu,
        **({"why": probe["why"]} if gpu is None else {}),
        "device": options.device,
        "size": options.size,
        "machine": describe_machine(),
    }
    results = Results(options.out, head | {"started_unix_s": time.time()})
    results.write()
    if gpu is None and options.device == "cuda":
        print(f"nothing to check: {probe['why']}", file=sys.stderr)
        return 0
    if gpu is not None and (missing := missing_packages(NEEDED_ON_A_GPU)):
        return _say_missing(missing)
    return check_all(bench, results, options)


def check_all(bench: "Bench", results: "Results", options: argparse.Namespace) -> int:
    """Run the sections and report; the exit status. Imports what they need, once for all."""
    from benchmarks.gpu.kept import keep
    from benchmarks.gpu.measured import write_profiles
    from benchmarks.gpu.report import show
    from benchmarks.gpu.runner import run_all
    from benchmarks.gpu.sections import ON_DEMAND, SECTIONS
    from understudy_demo import baseline

    baseline.quiet()
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about what its users call
    names = {section.name for section in (*SECTIONS, *ON_DEMAND)}
    if unknown := set(options.only or ()) - names:
        print(
            f"no section {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}", file=sys.stderr
        )
        return 2
    chosen = [section for section in (*SECTIONS, *ON_DEMAND) if section.name in (options.only or ())]
    chosen = chosen or list(SECTIONS)
    run_all(bench, chosen, results, options.limit_s)
    document = results.head | {"sections": results.sections}
    show(document)
    for path in write_profiles(document, options.profiles) if options.profiles else []:
        print(f"cost profile: {path}", file=sys.stderr)
    if options.results and (kept := keep(document | {"failed": results.failed()}, options.results)):
        print(f"kept: {kept}; now make docs-benchmarks", file=sys.stderr)
    for name in results.failed():
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if results.failed() else 0


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in names if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _say_no_driver(options: argparse.Namespace) -> int:
    """No GPU, and not even the packages to ask it with."""
    why = "there is no NVIDIA driver here"
    options.out.write_text(json.dumps({"gpu": None, "why": why}, indent=1) + "\n")
    print(f"nothing to check: {why}", file=sys.stderr)
    return 0


def _say_missing(names: list[str]) -> int:
    print(f"missing here: {', '.join(names)}; install them, or put them on PYTHONPATH", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
