"""The machine's state for people: frozen, plain, taken between two events."""

from dataclasses import dataclass

from understudyd.core.entities import Blob
from understudyd.core.machine import Machine
from understudyd.core.queueing import Request
from understudyd.core.states import ExtentState, RequestState
from understudyd.core.types import Tier


@dataclass(frozen=True, slots=True)
class ArenaView:
    """Bytes of the arena by what they are used for; they add up to `size_bytes`."""

    size_bytes: int
    ready_bytes: int
    leased_bytes: int
    filling_bytes: int
    quarantined_bytes: int
    free_bytes: int
    largest_gap_bytes: int
    evictions: int


@dataclass(frozen=True, slots=True)
class ExtentView:
    """One piece of the arena, or a gap (`state` "free")."""

    offset: int
    size_bytes: int
    state: str
    blob: str = ""
    models: tuple[str, ...] = ()
    leases: int = 0


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model: where it is and what holds it there. `waiting` counts its requests in the queue."""

    name: str
    tier: Tier
    pinned: bool
    parts: str
    size_bytes: int
    waiting: int
    leases: int
    chance: float


@dataclass(frozen=True, slots=True)
class BlobView:
    """One blob of a model; `story` is its recent history."""

    key: str
    size_bytes: int
    state: str
    offset: int | None
    shared_by: tuple[str, ...]
    story: str


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request that is not answered yet; waiting ones in expected order."""

    id: str
    client: str
    model: str
    state: str
    waited_s: float
    priority: int
    skips: int
    tier: Tier


def arena(machine: Machine) -> ArenaView:
    """Where the arena's bytes are."""
    held = machine.residency.arena
    return ArenaView(
        size_bytes=held.size_bytes,
        ready_bytes=held.bytes_in(ExtentState.READY),
        leased_bytes=held.bytes_in(ExtentState.LEASED),
        filling_bytes=held.bytes_in(ExtentState.FILLING),
        quarantined_bytes=held.bytes_in(ExtentState.QUARANTINED),
        free_bytes=held.free_bytes,
        largest_gap_bytes=held.largest_gap_bytes,
        evictions=machine.residency.evictions,
    )


def extents(machine: Machine) -> list[ExtentView]:
    """The arena's map by offset, gaps included."""
    views = [ExtentView(offset, size, "free") for offset, size in machine.residency.arena.gaps()]
    for extent in machine.residency.arena:
        blob = machine.residency.blobs.get(extent.blob)
        models = tuple(sorted(blob.models)) if blob is not None else ()
        views.append(
            ExtentView(
                extent.offset, extent.size_bytes, extent.state.value, extent.blob, models, extent.leases
            )
        )
    return sorted(views, key=lambda v: v.offset)


def model(machine: Machine, name: str) -> ModelView:
    """One model. Raises KeyError when it is unknown."""
    entity = machine.residency.models[name]
    bound = entity.is_ready and machine.on_stage == name
    return ModelView(
        name=name,
        tier=Tier.BOUND if bound else entity.tier,
        pinned=name in machine.residency.pinned,
        parts=entity.parts.state.value,
        size_bytes=sum(b.info.size_bytes for b in set(entity.blobs)),
        waiting=len(machine.queue.waiting_for(name)),
        leases=entity.leases,
        chance=machine.forecast.chance(name),
    )


def models(machine: Machine) -> list[ModelView]:
    """All models by name."""
    return [model(machine, name) for name in sorted(machine.residency.models)]


def blobs(machine: Machine, name: str) -> list[BlobView]:
    """A model's blobs in order of first use. Raises KeyError when it is unknown."""
    return [_blob(b) for b in machine.residency.models[name].blobs]


def _blob(blob: Blob) -> BlobView:
    return BlobView(
        key=blob.key,
        size_bytes=blob.info.size_bytes,
        state=blob.state.value,
        offset=blob.extent.offset if blob.extent is not None else None,
        shared_by=tuple(sorted(blob.models)),
        story=blob.life.story(),
    )


def requests(machine: Machine, now_s: float) -> list[RequestView]:
    """Running, then on deck, then waiting ones by expected order of their models."""
    order = machine.policy.expected_order(machine.queue, machine.residency.models, machine.on_stage, now_s)
    place = {name: i for i, name in enumerate(order)}
    rank = {RequestState.ENCODING: 0, RequestState.RUNNING: 1, RequestState.ON_DECK: 2}

    def key(request: Request) -> tuple[int, int, int]:
        return (rank.get(request.state, 3), place.get(request.model, 0), request.seq)

    open_requests = (r for r in machine.queue.requests.values() if r.state is not RequestState.ANSWERED)
    return [
        RequestView(
            id=r.id,
            client=r.info.client,
            model=r.model,
            state=r.state.value,
            waited_s=now_s - r.received_at_s,
            priority=r.info.priority,
            skips=r.skips,
            tier=r.tier,
        )
        for r in sorted(open_requests, key=key)
    ]
