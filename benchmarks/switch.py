"""How long a switch between two resident models takes: `python -m benchmarks.switch [--json] [--quick]`.

Real-size Stable Diffusion 1.5 and SDXL in fp16, two models each, every component different. Requests
alternate A, B, A, ... through the real stage: its threads, its baton, a real pipeline object each.
Whole images would take minutes apiece on a small CPU and add nothing to what is measured, so each request
is stopped at its first stage operation: the call of the text encoder, with everything bound.

* bind: the time to point every component at the other model's weights.
* visible: from the end of one request's last stage operation to the first one of the next, which was
  waiting; the processor's caches are flushed in between, as by an image.
* proof: after a switch, on the stage, every bound tensor is hashed and compared with what was written
  for that model. The benchmark fails if one differs.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.real_size import Architecture, RandomWeights, RealSizeStore, checksums, sd15, sdxl
from understudy.trace import Span
from understudyd.core.events import Event, LeaseEnded, ModelPrepared, RunEnded, RunStarted, ViewsBuilt
from understudyd.core.types import ErrorCode
from understudyd.stage.run import RunParams
from understudyd.stage.stage import Stage

MODELS = ("model-a", "model-b")
SETTLE_S = 0.002
CACHE_BYTES = 64 << 20
EVENT_TIMEOUT_S = 120.0

ARCHITECTURES: dict[str, Callable[..., Architecture]] = {"sd15": sd15, "sdxl": sdxl}


class WrongBytes(Exception):
    """A bound tensor does not hold what was written for its model."""


class Theatre:
    """One architecture's two models in an arena, and a stage over them."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.spans: list[Span] = []
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._seen: set[Event] = set()
        self._rounds = 0
        self._scratch = torch.zeros(CACHE_BYTES, dtype=torch.uint8)
        self._written: dict[str, dict[str, dict[str, int]]] = {}
        self._store = RealSizeStore(architecture, MODELS, folder)
        self.arena = torch.empty(len(MODELS) * architecture.size_bytes, dtype=torch.uint8)
        self.stage = Stage(
            self.arena,
            self._store,
            emit=self._events.put,
            record=self.spans.append,
        )
        self._fill()
        for name in MODELS:
            self.stage.prepare_model(name)
            self._wait(ModelPrepared(name))

    def _fill(self) -> None:
        offset = 0
        for seed, name in enumerate(MODELS):
            weights = RandomWeights(seed)
            self._written[name] = {}
            for component in self._store.model(name).components:
                signature = self._store.signature(component.signature)
                extent = self.arena[offset : offset + signature.size_bytes]
                self._written[name][component.name] = weights.write(extent, signature)
                self.stage.build_views(component.blob.sha256, offset, 1)
                self._wait(ViewsBuilt(component.blob.sha256, 1))
                offset += signature.size_bytes

    def switch(self, times: int, check: Callable[[int], bool]) -> int:
        """Alternate the models `times` times; returns how many tensors were hashed and found right."""
        self._rounds += 1
        order = [(f"{self._rounds}-{i}", MODELS[i % len(MODELS)]) for i in range(times + 1)]
        last_id = order[-1][0]
        playing = enumerate(order)
        is_over = threading.Event()
        checked = 0

        def stop_here(_module: Any, _args: Any) -> None:
            nonlocal checked
            i, (request_id, model) = next(playing)
            if check(i):
                checked += self._check(model)
            while not (request_id == last_id or self.stage.someone_waits() or is_over.is_set()):
                is_over.wait(SETTLE_S / 10)
            self._scratch.add_(1)
            time.sleep(SETTLE_S)
            self.stage.cancel_run(request_id, ErrorCode.CANCELLED)  # the next checkpoint is a call away

        first = self._skeleton(next(iter(self.architecture.signatures.values())).id)
        hook = first.module.register_forward_pre_hook(stop_here)
        try:
            for request_id, model in order:
                self.stage.put_on_deck(request_id, model, RunParams(prompt="a red circle", seed=1))
                self._wait(RunStarted(request_id))
            for request_id, _ in order:  # each has told its spans by then
                self._wait(LeaseEnded(request_id))
        finally:
            is_over.set()
            hook.remove()
        return checked

    def _skeleton(self, signature_id: str) -> Any:
        return next(s for s in self.stage.skeletons() if s.signature.id == signature_id)

    def _check(self, model: str) -> int:
        checked = 0
        for part, signature in self.architecture.signatures.items():
            found = checksums(self._skeleton(signature.id).tensors())
            wrong = [path for path, digest in self._written[model][part].items() if found.get(path) != digest]
            if wrong or len(found) != len(signature.tensors):
                raise WrongBytes(f"{model}: {part} is bound to other bytes at {wrong[:3]}")
            checked += len(found)
        return checked

    def _wait(self, event: Event) -> None:
        while event not in self._seen:
            seen = self._events.get(timeout=EVENT_TIMEOUT_S)
            self._seen.add(seen)
            if isinstance(seen, RunEnded) and seen.code is not ErrorCode.CANCELLED:
                raise RuntimeError(f"a request ended with {seen}")


def measure(architecture: Architecture, switches: int) -> dict[str, float | int]:
    """Medians and tails over `switches` switches, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        theatre = Theatre(architecture, Path(folder))
        try:
            gc.collect()
            gc.freeze()  # as the daemon does once it has started
            theatre.switch(4, check=lambda i: False)  # first touches
            theatre.spans.clear()
            checked = theatre.switch(switches, check=lambda i: i in (1, switches))
        finally:
            theatre.stage.close()
            gc.unfreeze()
    binds = [(span.end_s - span.start_s) * 1e3 for span in theatre.spans if span.lane == "bind"][1:]
    runs = [(span.start_s, span.end_s) for span in theatre.spans if span.lane == "stage"]
    visible = [(after[0] - before[1]) * 1e3 for before, after in itertools.pairwise(runs)]
    return {
        "tensors": architecture.tensor_count,
        "model_bytes": architecture.size_bytes,
        "switches": len(binds),
        "bind_ms_p50": round(statistics.median(binds), 3),
        "bind_ms_p99": round(_percentile(binds, 0.99), 3),
        "visible_ms_p50": round(statistics.median(visible), 3),
        "visible_ms_p99": round(_percentile(visible, 0.99), 3),
        "tensors_checked": checked,
    }


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--quick", action="store_true", help="narrow channels and few switches, for tests")
    parser.add_argument("--only", choices=sorted(ARCHITECTURES), help="one architecture")
    parser.add_argument("--switches", type=int, default=None, help="per architecture (200; 10 when quick)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    switches = options.switches or (10 if options.quick else 200)
    results = {}
    print(f"{'':6} {'tensors':>8} {'GB':>6} {'switches':>9}  bind p50/p99 ms   visible p50/p99 ms  hashed")
    for name in [options.only] if options.only else ARCHITECTURES:
        results[name] = found = measure(ARCHITECTURES[name](narrow=options.quick), switches)
        print(
            f"{name:6} {found['tensors']:8} {found['model_bytes'] / 1e9:6.2f} {found['switches']:9}  "
            f"{found['bind_ms_p50']:6.3f} / {found['bind_ms_p99']:6.3f}   "
            f"{found['visible_ms_p50']:6.3f} / {found['visible_ms_p99']:6.3f}     {found['tensors_checked']}"
        )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
