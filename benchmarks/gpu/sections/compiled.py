"""Three fine-tunes through compiled blocks: what a step gains, what compiling takes, and no recompiles."""

import statistics
from typing import Any

import torch

from benchmarks import real_store
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections.steps import StepClock
from benchmarks.gpu.theatre import Theatre, theatre

KIND, LETTERS = "sd15", "abc"
ROUNDS = 3
MOST_DIFFERENT = 8  # of 255, the mean over an image: half precision, rounded elsewhere


def measure_compiled(bench: Bench) -> dict[str, Any]:
    """Milliseconds per denoising step, as ever and compiled, by turns. `compile_s` is with an empty cache if
    nothing was compiled on this machine before; `recompiles` is over all fine-tunes, there and back.

    Tiny it is dynamo's part alone: a C++ compiler would take minutes.
    """
    _add_third(bench)
    backend = bench.pick("inductor", "eager")
    steps = bench.pick(20, 2)
    with (
        theatre(bench, KIND, letters=LETTERS) as plain,
        theatre(bench, KIND, letters=LETTERS, compile_backend=backend) as compiled,
    ):
        compiled.play(compiled.models[:1])
        compiled.stage.wait_compiled()
        ready = compiled.stage.compile_report()
        assert ready is not None
        clocks = [StepClock(bench, t.module("UNet2DConditionModel")) for t in (plain, compiled)]
        taken: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for which, stage in enumerate((plain, compiled)):
                clocks[which].take_ms()
                stage.play(stage.models[:1], steps=steps)
                taken[which] += clocks[which].take_ms()
        first = _images(compiled, compiled.models)
        again = _images(compiled, compiled.models[::-1])[::-1]
        expected = _images(plain, plain.models)
        compiled.stage.wait_compiled()
        after = compiled.stage.compile_report()
        strays = compiled.stage.strays()
    assert after is not None
    eager_ms, compiled_ms = (statistics.median(times) for times in taken)
    difference = max(_difference(one, other) for one, other in zip(first, expected, strict=True))
    return {
        "backend": backend,
        "eager_step_ms": eager_ms,
        "compiled_step_ms": compiled_ms,
        "speed_up": eager_ms / compiled_ms,
        "compile_s": ready.compile_s,
        "graphs": ready.graphs,
        "recompiles": after.graphs - ready.graphs,
        "mean_difference": difference,
        "checks": {
            "compiled": ready.graphs > 0 and not ready.failures,
            "no_recompiles": after.graphs == ready.graphs,
            "repeats_itself": first == again,
            "close_to_eager": difference <= MOST_DIFFERENT,
            "no_tensor_outside_the_arena": not strays,
        },
    }


def _add_third(bench: Bench) -> None:
    store, architecture = bench.store(), bench.architecture(KIND)
    if f"{KIND}-c" not in store.names():
        real_store.publish(
            store, architecture, f"{KIND}-c", seed=2, dtypes=bench.dtypes(KIND), device=bench.device
        )


def _images(stage: Theatre, models: tuple[str, ...]) -> list[bytes]:
    return [result.images[0] for result in stage.play(models, seed=7, steps=4)]


def _difference(one: bytes, other: bytes) -> float:
    """The mean over all raw values."""
    pair = [torch.frombuffer(bytearray(raw), dtype=torch.uint8).float() for raw in (one, other)]
    return float((pair[0] - pair[1]).abs().mean())
