"""What `benchmarks.lora_serve` plays: bases, adapters, the requests, the right images, the sizes.

torch is imported where it is used, so that the rest can be read and tested without it.
"""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.kit import say, timed
from benchmarks.serve_scene import Plan, Scene, Wish, wish, workload
from understudy.wire import Adapter
from understudy_demo.workload import Request
from understudyd.shell.derived import derived_name, parse_name

SCALES = (0.6, 0.8, 1.0)
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ATTENTION_HEAD = 32
PAGE_BYTES = 4096
TIMED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan(Plan):
    """`models` counts bases and the combinations of a base and an adapter, `resident` overlays.

    `load_share` is the length of an adapter's load in times of an image. With these `widths`, a UNet's
    channels, and `steps` a fold takes some 3 % of an image. At real size it is less: 0.1 % for Stable
    Diffusion 1.5 on two cores (40 ms of 40 s), under 1 % on a GPU if a fold takes 10 ms there.
    """

    models: int = 303
    bases: int = 3
    rank: int = 32
    size: int = 16
    steps: tuple[int, ...] = (4, 6)
    rounds: int = 20
    widths: tuple[int, int] = (32, 128)

    @property
    def adapters(self) -> int:
        """Each is for one of the bases."""
        return self.models - self.bases


QUICK = LoraPlan(models=33, bases=3, resident=5, requests=100, clients=2, rounds=2, widths=(32, 64))


@dataclass(frozen=True, slots=True)
class Family:
    """Diffusers folders of bases, and LoRA files with the base that each is for, by name."""

    bases: Mapping[str, Path]
    loras: Mapping[str, tuple[str, Path]]

    @property
    def names(self) -> list[str]:
        """What is asked for: the bases, and each adapter on its own one."""
        scales = (SCALES[number % len(SCALES)] for number in range(len(self.loras)))
        combinations = (
            derived_name(base, [Adapter(name, scale)])
            for (name, (base, _)), scale in zip(self.loras.items(), scales, strict=True)
        )
        return [*self.bases, *combinations]


def set_scene(plan: LoraPlan, work: Path) -> Scene:
    """Make bases and adapters (kept in `work` for the next time), ingest them, paint the references."""
    import torch

    from understudy_demo import baseline

    torch.set_num_threads(1)
    baseline.quiet()
    key = f"{plan.models}-{plan.bases}-{plan.rank}-{'-'.join(map(str, plan.widths))}-{plan.seed}"
    with timed(f"{plan.bases} bases and {plan.adapters} adapters"):
        family = make_family(plan, work / f"family-{key}")
    with timed("ingest"):
        room_bytes, whole_bytes, adapter_bytes = stock(plan, work / f"store-{key}", family)
    requests = workload(plan, family.names)
    with timed("reference images by load_lora_weights and fuse_lora"):
        references, image_s = paint_references(requests, family)
    return Scene(
        store=work / f"store-{key}",
        requests=requests,
        references=references,
        image_s=image_s,
        room_bytes=room_bytes,
        whole_bytes=whole_bytes,
        load_bytes=adapter_bytes,
        pinned=tuple(family.bases),
    )


def make_family(plan: LoraPlan, folder: Path) -> Family:
    """Fine-tunes of one architecture that share all but the UNet; adapters with random factors in float16."""
    import torch
    from safetensors.torch import save_file

    from understudy_demo import tiny

    bases = {f"base-{number}": folder / f"base-{number}" for number in range(plan.bases)}
    loras = {}
    layers: list[tuple[str, int, int]] = []
    for number, base in enumerate(bases):
        if layers and bases[base].exists():
            continue
        pipeline = tiny.stable_diffusion(
            number,
            shared_seed=plan.seed,
            own_text_encoder=False,
            block_out_channels=plan.widths,
            attention_head_dim=ATTENTION_HEAD,
        )
        layers = [
            (name, module.out_features, module.in_features)
            for name, module in pipeline.unet.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(LAYERS)
        ]
        tiny.save(pipeline, bases[base])
    for number in range(plan.adapters):
        name, path = f"lora-{number:03}", folder / f"lora-{number:03}.safetensors"
        loras[name] = (f"base-{number % plan.bases}", path)
        if path.exists():
            continue
        torch.manual_seed(10_000 + 1_000 * plan.seed + number)
        state = {}
        for layer, wide_out, wide_in in layers:
            state[f"unet.{layer}.lora_A.weight"] = (0.1 * torch.randn(plan.rank, wide_in)).half()
            state[f"unet.{layer}.lora_B.weight"] = (0.1 * torch.randn(wide_out, plan.rank)).half()
        save_file(state, path, metadata={"format": "pt"})
    return Family(bases, loras)


def stock(plan: LoraPlan, path: Path, family: Family) -> tuple[int, int, int]:
    """Ingest what the store lacks; arena bytes for `plan.resident` overlays, for everything, of an adapter.

    The bases come on top in both. No room is set aside for adapters in the first: they take overlays'.
    """
    from understudyd.store.adapters.files import AdapterFile
    from understudyd.store.adapters.ingest import AdapterOptions, add_adapters
    from understudyd.store.adapters.overlays import AppliedAdapter, plan_overlays
    from understudyd.store.adapters.shelf import AdapterShelf
    from understudyd.store.ingest import ingest_many
    from understudyd.store.store import Store

    store, shelf = Store.open(path, writable=True), AdapterShelf(Store.open(path, writable=False))
    have = set(store.names())
    ingest_many(store, [item for item in family.bases.items() if item[0] not in have])
    have = set(shelf.names())
    files = defaultdict(list)
    for name, (base, file) in family.loras.items():
        if name not in have:
            files[base].append(AdapterFile(file, name, str(file), file.stat().st_size))
    for base, its_files in files.items():
        results = add_adapters(store, its_files, AdapterOptions(base=base))
        if refused := [result.why for result in results if result.outcome == "refused"]:
            raise RuntimeError(f"{len(refused)} adapters were refused: {refused[0]}")
    records = [store.model(name) for name in family.bases]
    signatures = {c.name: store.signature(c.signature) for c in records[0].components}
    adapters = [shelf.adapter(name) for name in family.loras]
    (overlay,) = plan_overlays(signatures, [AppliedAdapter(adapters[0], 1.0)])
    blobs = {c.blob.sha256: c.blob.size_bytes for record in records for c in record.components}
    bases_bytes = _pages(blobs.values())
    say(
        f"  a base's UNet is {signatures['unet'].size_bytes / 2**20:.1f} MiB, an overlay of it "
        f"{overlay.size_bytes / 2**20:.1f} MiB, an adapter {adapters[0].blob.size_bytes / 2**20:.1f} MiB"
    )
    whole = [size for adapter in adapters for size in (overlay.size_bytes, adapter.blob.size_bytes)]
    some = [overlay.size_bytes] * plan.resident
    return bases_bytes + _pages(some), bases_bytes + _pages(whole), adapters[0].blob.size_bytes


def _pages(sizes: Iterable[int]) -> int:
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


def paint_references(requests: Sequence[Request], family: Family) -> tuple[dict[Wish, str], float]:
    """The hash of every distinct image, by diffusers; and the mean time of an image of a plain base.

    Each adapter is loaded and fused into a fresh copy of the base's UNet: what diffusers unfuses drifts.
    """
    from understudy_demo import baseline

    asked: defaultdict[str, dict[str, dict[Wish, Request]]] = defaultdict(lambda: defaultdict(dict))
    for request in requests:
        base = (parse_name(request.model) or (request.model,))[0]
        asked[base][request.model][wish(request)] = request
    hashes: dict[Wish, str] = {}
    times_s: list[float] = []
    for base, by_model in asked.items():
        pipeline = baseline.load(family.bases[base])
        plain = pipeline.unet
        for model, wishes in by_model.items():
            pipeline.unet = copy.deepcopy(plain)
            _, adapters = parse_name(model) or ("", ())
            fuse(pipeline, adapters, family)
            for one, request in wishes.items():
                image = baseline.paint(pipeline, request)
                hashes[one] = sha256(image.convert("RGB").tobytes()).hexdigest()
        times_s.append(_image_s(pipeline, plain, requests))
    return hashes, statistics.mean(times_s)


def fuse(pipeline: Any, adapters: Sequence[Adapter], family: Family) -> None:
    """Into the pipeline's UNet, by diffusers."""
    for adapter in adapters:
        pipeline.load_lora_weights(str(family.loras[adapter.name][1]), adapter_name=adapter.name)
    if adapters:
        names = [adapter.name for adapter in adapters]
        pipeline.set_adapters(names, [adapter.scale for adapter in adapters])
        pipeline.fuse_lora(components=["unet"], adapter_names=names)


def _image_s(pipeline: Any, unet: Any, requests: Sequence[Request]) -> float:
    """The mean time of the requests' images with this UNet, when nothing disturbs: the best of a few."""
    from understudy_demo import baseline

    pipeline.unet = unet
    times_s: defaultdict[int, list[float]] = defaultdict(list)
    for steps in {request.steps for request in requests}:
        request = next(request for request in requests if request.steps == steps)
        for _ in range(TIMED):
            started_s = time.monotonic()
            baseline.paint(pipeline, request)
            times_s[steps].append(time.monotonic() - started_s)
    return statistics.mean(min(times_s[request.steps]) for request in requests)
