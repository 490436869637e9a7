"""The machine's state for people: frozen, plain, taken between two events."""

from dataclasses import dataclass

from understudyd.core.entities import Blob
from understudyd.core.extents import ArenaMap
from understudyd.core.machine import Machine
from understudyd.core.request import Request
from understudyd.core.states import ExtentState, RequestState
from understudyd.core.types import Tier


@dataclass(frozen=True, slots=True)
class ArenaView:
    """Bytes of the arena by what they are used for; they add up to `size_bytes`."""

    size_bytes: int
    ready_bytes: int
    leased_bytes: int
    filling_bytes: int
    moving_bytes: int
    quarantined_bytes: int
    free_bytes: int
    largest_gap_bytes: int
    evictions: int


@dataclass(frozen=True, slots=True)
class HostPoolView:
    """Bytes of the host pool by what they are used for; they add up to `size_bytes`.

    `in_use_bytes` are read by loads. `copies` counts blobs that can be loaded from the pool.
    """

    size_bytes: int
    ready_bytes: int
    in_use_bytes: int
    filling_bytes: int
    quarantined_bytes: int
    free_bytes: int
    largest_gap_bytes: int
    copies: int
    evictions: int


@dataclass(frozen=True, slots=True)
class ExtentView:
    """One piece of the arena or the host pool, or a gap (`state` "free")."""

    offset: int
    size_bytes: int
    state: str
    blob: str = ""
    models: tuple[str, ...] = ()
    leases: int = 0


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model: where it is and what holds it there. `waiting` counts its requests in the queue.

    One that `is_derived` shares all but overlays with another model.
    """

    name: str
    tier: Tier
    pinned: bool
    parts: str
    size_bytes: int
    waiting: int
    leases: int
    chance: float
    max_batch: int
    can_batch: bool
    is_derived: bool = False


@dataclass(frozen=True, slots=True)
class BlobView:
    """One blob of a model; `made_of` others if it is an overlay; `story` is its recent history."""

    key: str
    size_bytes: int
    state: str
    offset: int | None
    has_copy: bool
    shared_by: tuple[str, ...]
    story: str
    made_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request that is not answered yet; waiting ones in expected order.

    `starts_in_s`: when it should be on stage if they run in that order; 0 for those that are.
    """

    id: str
    client: str
    model: str
    state: str
    waited_s: float
    priority: int
    skips: int
    tier: Tier
    starts_in_s: float


def arena(machine: Machine) -> ArenaView:
    """Where the arena's bytes are."""
    held = machine.residency.arena
    return ArenaView(
        size_bytes=held.size_bytes,
        ready_bytes=held.bytes_in(ExtentState.READY),
        leased_bytes=held.bytes_in(ExtentState.LEASED),
        filling_bytes=held.bytes_in(ExtentState.FILLING),
        moving_bytes=held.bytes_in(ExtentState.MOVING),
        quarantined_bytes=held.bytes_in(ExtentState.QUARANTINED),
        free_bytes=held.free_bytes,
        largest_gap_bytes=held.largest_gap_bytes,
        evictions=machine.residency.evictions,
    )


def host_pool(machine: Machine) -> HostPoolView:
    """Where the host pool's bytes are."""
    copies = machine.residency.copies
    return HostPoolView(
        size_bytes=copies.pool.size_bytes,
        ready_bytes=copies.pool.bytes_in(ExtentState.READY),
        in_use_bytes=copies.pool.bytes_in(ExtentState.LEASED),
        filling_bytes=copies.pool.bytes_in(ExtentState.FILLING),
        quarantined_bytes=copies.pool.bytes_in(ExtentState.QUARANTINED),
        free_bytes=copies.pool.free_bytes,
        largest_gap_bytes=copies.pool.largest_gap_bytes,
        copies=sum(blob.has_copy for blob in machine.residency.blobs.values()),
        evictions=copies.evictions,
    )


def extents(machine: Machine) -> list[ExtentView]:
    """The arena's map by offset, gaps included."""
    return _extents(machine, machine.residency.arena)


def pool_extents(machine: Machine) -> list[ExtentView]:
    """The host pool's map by offset, gaps included."""
    return _extents(machine, machine.residency.copies.pool)


def _extents(machine: Machine, held: ArenaMap) -> list[ExtentView]:
    views = [ExtentView(offset, size, "free") for offset, size in held.gaps()]
    for extent in held:
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
        max_batch=entity.max_batch,
        can_batch=entity.can_batch,
        is_derived=entity.info.is_derived,
    )


def models(machine: Machine) -> list[ModelView]:
    """All models by name, but for derived ones."""
    found = machine.residency.models.items()
    return [model(machine, name) for name, one in sorted(found) if not one.info.is_derived]


def derived(machine: Machine) -> list[ModelView]:
    """Derived models, who was asked for last first."""
    return [model(machine, name) for name in reversed(machine.catalogue.derived)]


def blobs(machine: Machine, name: str) -> list[BlobView]:
    """A model's blobs in order of first use, adapters last. Raises KeyError when it is unknown."""
    return [_blob(b) for b in machine.residency.models[name].all_blobs]


def _blob(blob: Blob) -> BlobView:
    return BlobView(
        key=blob.key,
        size_bytes=blob.info.size_bytes,
        state=blob.state.value,
        offset=blob.extent.offset if blob.extent is not None else None,
        has_copy=blob.has_copy,
        shared_by=tuple(sorted(blob.models)),
        story=blob.life.story(),
        made_of=tuple(source.key for source in blob.sources),
    )


def requests(machine: Machine, now_s: float) -> list[RequestView]:
    """Running, then on deck, then waiting ones by expected order of their models."""
    order = machine.policy.expected_order(machine.queue, machine.demand, machine.on_stage)
    place = {name: i for i, name in enumerate(order)}
    rank = {RequestState.ENCODING: 0, RequestState.RUNNING: 1, RequestState.ON_DECK: 2}

    def key(request: Request) -> tuple[int, int, float, int]:
        return (rank.get(request.state, 3), place.get(request.model, 0), request.tag, request.seq)

    open_requests = (r for r in machine.queue.requests.values() if r.state is not RequestState.ANSWERED)
    starts_in_s, outlook = 0.0, machine.outlook
    free_s = outlook.stage_free_in_s(now_s)
    views = []
    for request in sorted(open_requests, key=key):
        match request.state:
            case RequestState.ON_DECK:
                starts_in_s = outlook.rest_s(now_s)
            case RequestState.WAITING:
                model = machine.residency.models[request.model]
                starts_in_s = max(starts_in_s, free_s, outlook.ready_in_s(model, now_s))
        views.append(_request(request, machine.queue.skips_of(request), now_s, starts_in_s))
        if request.state is RequestState.WAITING:
            starts_in_s += outlook.run_s(request)
    return views


def _request(request: Request, skips: int, now_s: float, starts_in_s: float) -> RequestView:
    return RequestView(
        id=request.id,
        client=request.info.client,
        model=request.model,
        state=request.state.value,
        waited_s=now_s - request.received_at_s,
        priority=request.info.priority,
        skips=skips,
        tier=request.tier,
        starts_in_s=starts_in_s,
    )
