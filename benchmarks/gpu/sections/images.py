"""A, B, A through the stage, bit for bit what `from_pretrained` paints on the same device."""

import gc
import hashlib
import shutil
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks import real_store
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.theatre import PROMPT, RESERVE_BYTES, theatre
from understudyd.stage.encode import encode_images
from understudyd.stage.pictures import Made

SEED = 7


def compare_images(bench: Bench, kind: str) -> dict[str, Any]:
    """The reference paints each image twice: where it differs from itself, nothing could be compared."""
    if not bench.is_cuda:
        torch.set_num_threads(1)  # as the stage: another number adds in another order
    bench.need(2 * bench.architecture(kind).size_bytes + RESERVE_BYTES)
    steps = bench.pick(4, 1)
    expected = {name: _reference(bench, kind, name, steps) for name in (f"{kind}-a", f"{kind}-b")}
    with theatre(bench, kind) as stage:
        a, b = stage.models
        order = (a, b, a)
        results = stage.play(order, seed=SEED, steps=steps)
        strays = stage.stage.strays()
    painted = [_digest(result.images[0]) for result in results]
    wanted = [expected[name][0] for name in order]
    return {
        "steps": steps,
        "side_px": results[0].infos[0].width,
        "run_s": [r.timings.run_ended_at_s - r.timings.first_op_at_s for r in results],
        "checks": {
            "equal_to_from_pretrained": painted == wanted,
            "reference_repeats_itself": all(first == second for first, second in expected.values()),
            "models_differ": painted[0] != painted[1],
            "no_tensor_outside_the_arena": not strays,
        },
    }


def _reference(bench: Bench, kind: str, name: str, steps: int) -> tuple[str, str]:
    """The digests of the same image, painted twice by a pipeline of diffusers' own."""
    folder = real_store.diffusers_folder(bench.store(), name, bench.work / f"reference-{name}")
    pipeline = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=bench.dtypes(kind), local_files_only=True
    ).to(bench.device)
    pipeline.set_progress_bar_config(disable=True)
    digests = []
    for _ in range(2):
        images = pipeline(
            PROMPT,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="pt",
        ).images
        digests.append(_digest(encode_images(Made(images.cpu(), is_video=False), "raw")[0][0]))
    del pipeline, images
    gc.collect()
    if bench.is_cuda:
        torch.cuda.empty_cache()
    shutil.rmtree(folder)
    return digests[0], digests[1]


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()
