"""A stack of Flux's transformer blocks, twice: loads, binds and steps of the architecture beyond UNets.

Published width, as many of its 19 double and 38 single blocks as memory and time allow, random weights in
bfloat16. Two variants lie in one arena. A step is one call over a 1024-pixel image's tokens; the second
variant is loaded again and again from the host pool meanwhile, which is what overlap costs there.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import GIB, Bench, gbps
from benchmarks.gpu.runner import Skip
from benchmarks.gpu.sections.steps import StepClock
from benchmarks.kit import percentile
from benchmarks.loaders import Loaders, Source
from benchmarks.real_store import random_component
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import BlobViews, WeightArena
from understudyd.store.records import SignatureRecord

STACKS = ((6, 12), (3, 6))
"""Double and single blocks, the larger first; 7.6 and 4 GB."""

TOKENS, TEXT_TOKENS = 4096, 512
RESERVE_BYTES = 8 * GIB
BIND_TARGET_MS, P50_TARGET = 1.0, 1.03
_ROUNDS = 9


def measure_blocks(bench: Bench) -> dict[str, Any]:
    """Milliseconds and GB (1e9 bytes) per second, medians."""
    blocks, sources, signature = _make(bench)
    size_bytes = signature.size_bytes
    with bench.arena(2 * size_bytes) as arena, bench.host_pool(size_bytes) as pool:
        skeleton = Skeleton(signature, device=torch.device(bench.device))
        with bench.loaders(arena, host_pool=pool) as loaders:
            places = [source.at(place * size_bytes) for place, source in enumerate(sources)]
            loaders.load([places[0], sources[1].at(size_bytes, pool_offset=0)])
            from_pool = sources[1].at(size_bytes, pool_offset=0, from_pool=True)
            weights = WeightArena(arena.tensor())
            views = [BlobViews.build(weights, signature, i * size_bytes, lambda: None) for i in range(2)]
            stack = Stack(bench, skeleton, views)
            images = [stack.call(which) for which in (0, 1, 0)]
            found = {
                "double_blocks": blocks[0],
                "single_blocks": blocks[1],
                "size_bytes": size_bytes,
                "disk_gbps": _rate(size_bytes, lambda: loaders.load([places[1]])),
                "pool_gbps": _rate(size_bytes, lambda: loaders.load([from_pool])),
                "bind_ms": stack.bind_ms(),
                **_steps(bench, stack, loaders, from_pool),
            }
        is_there = [
            source.is_at(bench.content(arena, place * size_bytes, size_bytes))
            for place, source in enumerate(sources)
        ]
    return found | {
        "checks": {
            "same_again_after_another": torch.equal(images[0], images[2]),
            "models_differ": not torch.equal(images[0], images[1]),
            "finite": all(bool(image.isfinite().all()) for image in images),
            "checksums": all(is_there),
        },
        "targets": {
            f"bind_under_{BIND_TARGET_MS:g}_ms": found["bind_ms"]["p50"] < BIND_TARGET_MS,
            f"step_p50_within_{P50_TARGET:g}": found["step_p50_ratio"] <= P50_TARGET,
        },
    }


class Stack:
    """The one module, and what it is called with."""

    def __init__(self, bench: Bench, skeleton: Skeleton, views: list[BlobViews]) -> None:
        self.module: nn.Module = skeleton.module
        self._bench = bench
        self._skeleton = skeleton
        self._views = views
        self._inputs = _inputs(bench)

    @torch.inference_mode()
    def call(self, which: int) -> Tensor:
        """What this variant makes of the same noise, on the CPU."""
        self._skeleton.bind(self._views[which])
        (made,) = self.module(**self._inputs, return_dict=False)
        copied: Tensor = made.cpu()
        return copied

    def bind_ms(self) -> dict[str, float]:
        """From one variant to the other and back, many times."""
        taken = []
        for number in range(self._bench.pick(200, 6)):
            started_s = time.perf_counter()
            self._skeleton.bind(self._views[number % 2])
            taken.append((time.perf_counter() - started_s) * 1e3)
        return {"p50": percentile(taken, 50) or 0.0, "p99": percentile(taken, 99) or 0.0}


def _make(bench: Bench) -> tuple[tuple[int, int], list[Source], SignatureRecord]:
    """The largest stack that fits, and both variants on disk."""
    for blocks in bench.pick(STACKS, ((1, 1),)):
        with torch.device("meta"):
            module = _build(bench, blocks)
        size_bytes = 2 * sum(parameter.numel() for parameter in module.parameters())
        has_memory = not bench.is_cuda or bench.free_bytes() > 2 * size_bytes + RESERVE_BYTES
        if has_memory and shutil.disk_usage(bench.work).free > 2 * size_bytes:
            break
    else:
        raise Skip(f"two stacks of {STACKS[-1]} blocks do not fit GPU and disk")
    found = [_write(bench, blocks, seed) for seed in range(2)]
    if bench.is_cuda:
        torch.cuda.empty_cache()  # they were drawn there
    return blocks, [source for source, _ in found], found[0][1]


def _write(bench: Bench, blocks: tuple[int, int], seed: int) -> tuple[Source, SignatureRecord]:
    path = Path(bench.work / f"blocks-{seed}.safetensors")
    dtype = torch.bfloat16
    made = random_component(path, lambda: _build(bench, blocks), dtype, seed=seed, device=bench.device)
    return Source(path, made[1]), made[0]


def _build(bench: Bench, blocks: tuple[int, int]) -> nn.Module:
    """Flux.1's config but for its depth; narrow when tiny."""
    from diffusers import FluxTransformer2DModel

    narrow = {
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "in_channels": 4, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    real = {"guidance_embeds": True}
    module: nn.Module = FluxTransformer2DModel(
        num_layers=blocks[0], num_single_layers=blocks[1], **bench.pick(real, narrow | real)
    )
    return module


def _inputs(bench: Bench) -> dict[str, Tensor]:
    tokens, text_tokens = bench.pick((TOKENS, TEXT_TOKENS), (16, 8))
    channels, joint, pooled = bench.pick((64, 4096, 768), (4, 32, 32))
    generator = torch.Generator("cpu").manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(bench.device, torch.bfloat16)

    side = int(tokens**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return {
        "hidden_states": noise(1, tokens, channels),
        "encoder_hidden_states": noise(1, text_tokens, joint),
        "pooled_projections": noise(1, pooled),
        "timestep": torch.tensor([0.5], device=bench.device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=bench.device, dtype=torch.bfloat16),
        "img_ids": ids.reshape(tokens, 3).to(bench.device),
        "txt_ids": torch.zeros(text_tokens, 3, device=bench.device),
    }


def _steps(bench: Bench, stack: Stack, loaders: Loaders, load: Any) -> dict[str, float]:
    """Times of a call alone, and while the other variant's place is being filled at full rate."""
    clock = StepClock(bench, stack.module)

    def times_ms() -> list[float]:
        clock.take_ms()
        for _ in range(bench.pick(40, 3)):
            stack.call(0)
        return clock.take_ms()

    times_ms()
    alone, beside = [], []
    for _ in range(2):
        alone += times_ms()
        with loaders.kept_busy([load]):
            beside += times_ms()
    medians = statistics.median(alone), statistics.median(beside)
    return {
        "step_ms_p50": medians[0],
        "step_beside_load_ms_p50": medians[1],
        "step_p50_ratio": medians[1] / medians[0],
    }


def _rate(size_bytes: int, load: Callable[[], float]) -> float:
    return statistics.median(gbps(size_bytes, load()) for _ in range(_ROUNDS))
