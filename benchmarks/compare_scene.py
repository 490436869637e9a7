"""The models and the workload of `benchmarks.compare`: tiny ones of the demo's family, or real-size ones."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from benchmarks.compare_work import Work
from benchmarks.kit import timed
from understudy_demo.workload import Request, Shape, make_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `load` is the rate of arrival in times of what one could paint who never loads."""

    device: str = "cpu"
    size: str = "tiny"
    models: int = 24
    resident: int = 6
    requests: int = 240
    load: float = 1.2
    burst: float = 3.0
    exponent: float = 0.7
    steps: int = 2
    side_px: int = 48
    seed: int = 0

    @classmethod
    def of(cls, device: str, size: str, *, quick: bool) -> Self:
        """By device and size; `quick` is for tests."""
        plan = cls(device=device, size=size)
        if size == "real":
            plan = replace(plan, models=20, resident=5, requests=80, steps=20, side_px=512)
        return replace(plan, models=4, resident=2, requests=12, steps=2) if quick else plan


@dataclass(frozen=True, slots=True)
class Scene:
    """The same models in a store, and the work that everybody is given."""

    store: Path
    work: Work


def set_scene(plan: Plan, folder: Path) -> Scene:
    """Make the models in `folder`, and requests that come at a rate that suits the machine."""
    import torch

    from understudy_demo import baseline

    torch.set_num_threads(1)
    baseline.quiet()
    with timed(f"{plan.models} models"):
        store, folders, budget_bytes = (_real if plan.size == "real" else _tiny)(plan, folder)
    dtype = "float16" if plan.size == "real" else None
    image_s = _image_s(plan, next(iter(folders.values())), dtype)
    shape = Shape(
        requests=plan.requests, clients=4, rate_per_s=plan.load / image_s, exponent=plan.exponent,
        burst=plan.burst, spread_s=image_s, steps=(plan.steps,), size=plan.side_px,
    )  # fmt: skip
    work = Work(
        requests=tuple(make_workload(list(folders), shape, plan.seed)),
        folders={name: str(path) for name, path in folders.items()},
        budget_bytes=budget_bytes,
        device=plan.device,
        dtype=dtype,
    )
    return Scene(store, work)


def _tiny(plan: Plan, folder: Path) -> tuple[Path, Mapping[str, Path], int]:
    from understudy_demo import stocking
    from understudy_demo.painted import make_family

    members = make_family(folder / "family", plan.models, plan.seed)
    records = stocking.stock(folder / "store", members, lambda name: None)
    folders = {member.name: member.path for member in members}
    return folder / "store", folders, stocking.room_for(records, plan.resident)


def _real(plan: Plan, folder: Path) -> tuple[Path, Mapping[str, Path], int]:
    """Fine-tunes of one architecture."""
    import torch

    from benchmarks import real_store
    from benchmarks.real_size import sd15
    from understudy_demo import stocking
    from understudyd.store.store import Store

    store = Store.open(folder / "store", writable=True)
    architecture = sd15()
    dtypes = dict.fromkeys(architecture.builders, torch.float16)
    folders, records = {}, []
    for seed in range(plan.models):
        name = f"model-{seed:02d}"
        records.append(
            real_store.publish(store, architecture, name, seed=seed, dtypes=dtypes, device=plan.device)
        )
        folders[name] = real_store.diffusers_folder(store, name, folder / name)
    return store.path, folders, stocking.room_for(records, plan.resident)


def _image_s(plan: Plan, folder: Path, dtype: str | None, repeats: int = 5) -> float:
    """The median time of an image when nothing is loaded."""
    import torch

    from understudy_demo import baseline

    options = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    pipeline = baseline.load(folder, **options).to(plan.device)
    request = Request(
        index=0, client=0, model="", prompt="a kite", seed=1, steps=plan.steps, width=plan.side_px,
        height=plan.side_px, at_s=0.0,
    )  # fmt: skip
    baseline.paint(pipeline, request)
    times_s = []
    for _ in range(repeats):
        started_s = time.monotonic()
        baseline.paint(pipeline, request)
        times_s.append(time.monotonic() - started_s)
    del pipeline
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return statistics.median(times_s)
