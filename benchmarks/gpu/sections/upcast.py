"""SDXL casts its VAE to float32 and back: afterwards every tensor must be in the arena again."""

from typing import Any

import torch
from torch import nn

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.theatre import theatre


def look_for_strays(bench: Bench) -> dict[str, Any]:
    """`leaked_bytes`: what torch's allocator holds after the last image more than after the second."""
    was_upcast: list[bool] = []
    strays: list[str] = []
    held_bytes: list[int] = []
    with theatre(bench, "sdxl") as stage:
        vae = stage.skeleton("AutoencoderKL")

        def note(_module: nn.Module, _args: Any) -> None:
            was_upcast.append(vae.is_dirty)

        hook = vae.module.decoder.register_forward_pre_hook(note)
        for model in [*stage.models] * bench.pick(3, 1):
            stage.play([model], steps=1)
            strays += stage.stage.strays()
            held_bytes.append(torch.cuda.memory_allocated() if bench.is_cuda else 0)
        hook.remove()
    return {
        "images": len(held_bytes),
        "strays": strays[:10],
        "leaked_bytes": held_bytes[-1] - held_bytes[1],
        "checks": {
            "was_upcast_every_time": len(was_upcast) == len(held_bytes) and all(was_upcast),
            "no_tensor_outside_the_arena": not strays,
            "nothing_leaked": held_bytes[-1] <= held_bytes[1],
        },
    }
