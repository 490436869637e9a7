"""What `stage.compile` is worth: `python -m benchmarks.compile [--json] [--architecture tiny|sd15]`.

One UNet with random weights, float32 on the CPU, two torch threads: skeletons, views and compiler are the
stage's own. Three fine-tunes lie in one arena and are bound in turn. `tiny` is the UNet of the tests (1 M
parameters, 64 x 64 latents), which fits into minutes on two cores; `sd15` is Stable Diffusion 1.5's (860 M,
24 x 24 latents), whose 30 graphs take a C++ compiler a quarter of an hour there.

* `eager_step_ms`, `compiled_step_ms`: medians of one forward pass at batch 2, by turns; `speed_up` is the
  median of the rounds' ratios.
* `compile_s`: everything compiled with an empty cache; `compile_warm_cache_s`: the same in a new process that
  finds inductor's cache, as after a restart.
* `recompiles`: graphs made after that, over three fine-tunes there and back, two sizes, batches of 1 and 2.
* `max_error_ppm`, of the largest number, between eager and compiled results; `repeats_itself`: bit for bit
  after others.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.kit import json_line, say, show_table

if TYPE_CHECKING:
    from understudyd.stage.compiling import Compiler

FINE_TUNES = 3
ROUNDS = {"tiny": 20, "sd15": 9}
# ATen tells small convolutions of a batch of one from large ones, and dynamo guards on which: none changes.
SIDE, WIDER = {"tiny": 64, "sd15": 24}, 8
TOKENS = 77
THREADS = 2
MOST_ERROR_PPM = 1000.0


def main() -> None:
    """Two lives over one cache."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    parser.add_argument("--architecture", choices=sorted(SIDE), default="tiny")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    parser.add_argument("--life", choices=("first", "second"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        json_line(measure(options.architecture, options.backend, is_first=options.life == "first"))
        return
    with tempfile.TemporaryDirectory(prefix="understudy-compile-") as cache:
        lives = [life(name, options.architecture, options.backend, cache) for name in ("first", "second")]
    found = lives[0] | {"compile_warm_cache_s": lives[1]["compile_s"], "architecture": options.architecture}
    rows = [
        [name, f"{value:.3f}" if isinstance(value, float) else str(value)] for name, value in found.items()
    ]
    show_table(f"{options.architecture} UNet, {options.backend}", ["", ""], rows)
    if options.json:
        json_line(found)
    if found["recompiles"] or found["max_error_ppm"] > MOST_ERROR_PPM or not found["repeats_itself"]:
        raise SystemExit("what was compiled is not what it should be")


def life(name: str, architecture: str, backend: str, cache: str) -> dict[str, Any]:
    """One process's figures."""
    say(f"{name} life")
    command = [sys.executable, "-m", "benchmarks.compile", "--life", name]
    command += ["--architecture", architecture, "--backend", backend]
    environ = dict(os.environ) | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(architecture: str, backend: str, *, is_first: bool) -> dict[str, Any]:
    """Compile; in the first life step by turns, too."""
    import torch

    from benchmarks.real_size import sd15
    from understudy_demo import tiny
    from understudyd.stage.compiling import Compiler
    from understudyd.stage.skeleton import Skeleton
    from understudyd.stage.views import BlobViews, WeightArena
    from understudyd.store.signature import Component

    torch.set_num_threads(THREADS)
    if architecture == "tiny":
        signature = Component("unet", tiny.unet(sample_size=SIDE["tiny"]).eval()).signature
    else:
        with torch.device("meta"):
            signature = Component("unet", sd15().builders["unet"]().eval()).signature
    stride = signature.size_bytes
    memory = torch.empty(FINE_TUNES * stride, dtype=torch.uint8)
    memory.view(torch.float32).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    arena = WeightArena(memory)
    views = [BlobViews.build(arena, signature, i * stride, lambda: None) for i in range(FINE_TUNES)]
    compiler = Compiler(torch.device("cpu"), backend)
    with torch.no_grad(), working(compiler):
        plain, compiled = Skeleton(signature), Skeleton(signature, compiled=compiler.open)
        steps = Steps(SIDE[architecture], signature.config["cross_attention_dim"])
        compiled.bind(views[0])
        steps.run(compiled, batch=2)
        compiled.restore()
        compiler.wait()
        ready = compiler.report()
        if ready.failures:
            raise SystemExit(f"not compiled: {dict(ready.failures)}")
        found = {"graphs": ready.graphs, "compile_s": ready.compile_s}
        if is_first:
            found |= by_turns(plain, compiled, views[0], steps, ROUNDS[architecture])
            found |= there_and_back(plain, compiled, views, steps)
            compiled.restore()
            compiler.wait()
            found["recompiles"] = compiler.report().graphs - ready.graphs
    return found


@contextlib.contextmanager
def working(compiler: "Compiler") -> Iterator[None]:
    """The compiler's thread, with the settings of the calling one."""
    import torch

    def work() -> None:
        torch.set_num_threads(THREADS)
        with torch.no_grad():
            compiler.work()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        compiler.close()
        thread.join()


class Steps:
    """Forward passes of a skeleton's UNet over square inputs, or wider ones."""

    def __init__(self, side: int, width: int) -> None:
        import torch

        self._side = side
        self._draw = torch.Generator().manual_seed(1)
        self._words = torch.randn(2, TOKENS, width, generator=self._draw)
        self._latents = torch.randn(2, 4, side, side + WIDER, generator=self._draw)

    def run(self, skeleton: Any, *, batch: int, is_wide: bool = False) -> Any:
        """One pass."""
        import torch

        width = self._side + (WIDER if is_wide else 0)
        latents = self._latents[:batch, :, :, :width].contiguous()
        return skeleton.module(latents, torch.tensor(500), self._words[:batch]).sample


def by_turns(plain: Any, compiled: Any, views: Any, steps: Steps, rounds: int) -> dict[str, float]:
    """Medians of both."""
    taken: dict[str, list[float]] = {"eager": [], "compiled": []}
    plain.bind(views)
    compiled.bind(views)
    for _ in range(rounds):
        for name, skeleton in (("eager", plain), ("compiled", compiled)):
            started_s = time.perf_counter()
            steps.run(skeleton, batch=2)
            taken[name].append((time.perf_counter() - started_s) * 1e3)
    eager_ms, compiled_ms = (statistics.median(taken[name][1:]) for name in ("eager", "compiled"))
    ratios = [a / b for a, b in zip(taken["eager"][1:], taken["compiled"][1:], strict=True)]
    return {
        "eager_step_ms": eager_ms,
        "compiled_step_ms": compiled_ms,
        "speed_up": statistics.median(ratios),
    }


def there_and_back(plain: Any, compiled: Any, views: list[Any], steps: Steps) -> dict[str, Any]:
    """Every fine-tune, size and batch, against eager and against itself."""
    import torch

    worst, repeats = 0.0, True
    made: dict[tuple[int, int, bool], Any] = {}
    for i in [*range(len(views)), *reversed(range(len(views)))]:
        for batch, is_wide in ((2, False), (2, True), (1, False), (1, True)):
            for skeleton in (plain, compiled):
                skeleton.bind(views[i])
            result = steps.run(compiled, batch=batch, is_wide=is_wide)
            if (key := (i, batch, is_wide)) in made:
                repeats = repeats and torch.equal(made[key], result)
                continue
            made[key] = result
            expected = steps.run(plain, batch=batch, is_wide=is_wide)
            worst = max(worst, float((result - expected).abs().max() / expected.abs().max()))
    return {"max_error_ppm": worst * 1e6, "repeats_itself": repeats}


if __name__ == "__main__":
    main()
