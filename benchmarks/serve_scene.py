"""What `benchmarks.serve` plays: the models, the requests, the right images, the sizes.

torch is imported where it is used, so that the rest can be read and tested without it.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.kit import timed
from understudy_demo.workload import Request, Shape, make_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `load_share` is the length of a load in times of an image (of plain
    diffusers on an idle machine; the daemon's own take a little longer).
    """

    models: int = 200
    resident: int = 20
    requests: int = 2000
    clients: int = 4
    outstanding: int = 4
    exponent: float = 0.9
    size: int = 48
    steps: tuple[int, ...] = (1, 2)
    load_share: float = 0.8
    rounds: int = 4
    seed: int = 0

    @property
    def round_size(self) -> int:
        """Requests in a round."""
        return -(-self.requests // self.rounds)


QUICK = Plan(models=20, resident=5, requests=100, clients=2, rounds=2)

Wish = tuple[str, str, int, int]
"""Model, prompt, seed, steps: what an image depends on."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Models on disk and in the store, and what the right images are. `pinned` ones are always resident."""

    store: Path
    requests: list[Request]
    references: Mapping[Wish, str]
    image_s: float
    room_bytes: int
    whole_bytes: int
    load_bytes: float
    pinned: tuple[str, ...] = ()


def set_scene(plan: Plan, work: Path) -> Scene:
    """Make the family (kept in `work` for the next time), ingest it, and paint the references."""
    import torch

    from understudy_demo import baseline, stocking
    from understudy_demo.painted import family_key, make_family

    torch.set_num_threads(1)
    baseline.quiet()
    key = family_key(plan.models, plan.seed)
    with timed(f"{plan.models} models"):
        members = make_family(work / f"family-{key}", plan.models, plan.seed)
    with timed("ingest"):
        records = stocking.stock(work / f"store-{key}", members, lambda name: None)
    requests = workload(plan, [member.name for member in members])
    folders = {member.name: member.path for member in members}
    with timed("reference images by from_pretrained"):
        references, image_s = paint_references(requests, folders)
    own = stocking.own_bytes(records)
    asked_bytes = statistics.mean(own[request.model] for request in requests)
    return Scene(
        store=work / f"store-{key}",
        requests=requests,
        references=references,
        image_s=image_s,
        room_bytes=stocking.room_for(records, plan.resident),
        whole_bytes=stocking.room_for(records, plan.models + 1),
        load_bytes=asked_bytes,
    )


def workload(plan: Plan, models: Sequence[str]) -> list[Request]:
    """Who asks for what, in order; times of arrival are not used: clients send when they have an answer."""
    shape = Shape(
        requests=plan.requests,
        clients=plan.clients,
        rate_per_s=1.0,
        exponent=plan.exponent,
        burst=1.0,
        variants=1,
        steps=plan.steps,
        size=plan.size,
    )
    return make_workload(models, shape, plan.seed)


def wish(request: Request) -> Wish:
    return (request.model, request.prompt, request.seed, request.steps)


def paint_references(
    requests: Sequence[Request], folders: Mapping[str, Path]
) -> tuple[dict[Wish, str], float]:
    """The hash of every distinct image, by plain diffusers; and the mean time of an image when warm."""
    from understudy_demo import baseline

    pipeline: Any = None
    loaded = ""
    hashes: dict[Wish, str] = {}
    times_s: dict[Wish, float] = {}
    for request in sorted({wish(r): r for r in requests}.values(), key=wish):
        if request.model != loaded:
            pipeline, loaded = baseline.load(folders[request.model]), request.model
        started_s = time.monotonic()
        image = baseline.paint(pipeline, request)
        times_s[wish(request)] = time.monotonic() - started_s
        hashes[wish(request)] = sha256(image.convert("RGB").tobytes()).hexdigest()
    by_steps = {
        steps: statistics.median(t for w, t in times_s.items() if w[3] == steps)
        for steps in {w[3] for w in times_s}
    }
    return hashes, statistics.mean(by_steps[request.steps] for request in requests)
