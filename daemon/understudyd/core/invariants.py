"""What must hold after every event; tests and the simulator call `check`, the daemon can afford not to."""

from understudyd.core.machine import Machine
from understudyd.core.states import BlobState, ExtentState, LoaderState, PartsState, RequestState

_UNDER_WAY = (
    BlobState.LOADING,
    BlobState.FETCHING,
    BlobState.FOLDING,
    BlobState.VIEWING,
    BlobState.MOVING,
)


def check(machine: Machine) -> None:
    """Raise AssertionError when the machine contradicts itself."""
    machine.residency.arena.check()
    machine.queue.check()
    machine.demand.check()
    machine.residency.evictables.check(machine.residency.blobs.values())
    _check_editions(machine)
    _check_blobs(machine)
    _check_overlays(machine)
    _check_copies(machine)
    _check_leases(machine)
    _check_loaders(machine)
    _check_stage(machine)


def _check_editions(machine: Machine) -> None:
    """An edition is its name's, or about to be, or somebody still uses it."""
    catalogue, models = machine.catalogue, machine.residency.models
    assert all(catalogue.editions[model.key] is model for model in models.values())
    for name, model in catalogue.coming.items():
        assert catalogue.editions[model.key] is model and not model.blobs and not models[name].retiring
        assert model.parts.state is PartsState.PREPARING and not model.retiring
    for key, model in catalogue.editions.items():
        assert key == model.key
        is_used = bool(model.leases) or model.parts.state is PartsState.PREPARING
        assert not model.retiring or is_used, f"{key} should be gone"
        assert model.retiring or catalogue.is_current(model) or catalogue.coming[model.name] is model
    assert all(models[name] is model for name, model in machine.residency.pinned.items())


def _check_blobs(machine: Machine) -> None:
    """A blob owns the extent it says it owns, in the state that fits."""
    residency = machine.residency
    fitting: dict[BlobState, set[ExtentState | None]] = {
        BlobState.ABSENT: {None},
        BlobState.FETCHING: {None},
        BlobState.MOVING: {ExtentState.MOVING},
        BlobState.DAMAGED: {None},
        BlobState.LOADING: {ExtentState.FILLING},
        BlobState.FOLDING: {ExtentState.FILLING},
        BlobState.VIEWING: {ExtentState.READY},
        BlobState.RESIDENT: {ExtentState.READY, ExtentState.LEASED},
    }
    assert residency.ready == {name: model for name, model in residency.models.items() if model.is_ready}
    owners = {}
    for blob in residency.blobs.values():
        state = blob.extent.state if blob.extent is not None else None
        assert state in fitting[blob.state], f"{blob.key}: {blob.state} over {state}"
        assert (blob.load_id is not None) == (blob.state in (BlobState.LOADING, BlobState.FETCHING))
        if blob.extent is not None:
            owners[blob.extent.offset] = blob
        is_leased = blob.extent is not None and bool(blob.extent.leases)
        assert blob.models or blob.state in _UNDER_WAY or is_leased, f"{blob.key} is orphaned"
        for name in blob.models:
            assert blob in residency.models[name].all_blobs
    for extent in residency.arena:
        if extent.state is not ExtentState.QUARANTINED:
            assert owners[extent.offset].extent is extent, f"extent at {extent.offset} has no owner"


def _check_overlays(machine: Machine) -> None:
    """Overlays know what they are made of, adapters what for; what is folded from stays where it is."""
    residency = machine.residency
    blobs, fold = residency.blobs.values(), residency.folds.under_way
    assert residency.overlays == {blob.key: blob for blob in blobs if blob.is_overlay}
    for overlay in residency.overlays.values():
        assert tuple(source.info for source in overlay.sources) == overlay.info.made_of
        assert (overlay.state is BlobState.FOLDING) == (fold is not None and fold.overlay is overlay)
        assert overlay.copy is None and overlay.load_id is None
        if overlay.models:
            assert all(residency.blobs[source.key] is source for source in overlay.sources)
    for blob in blobs:
        overlays = {o.key for o in residency.overlays.values() if blob in o.sources[1:]}
        assert blob.overlays.keys() == overlays, f"{blob.key} is for other overlays"
    if fold is not None:
        assert fold.extent is fold.overlay.extent
        assert all(source.state is BlobState.RESIDENT for source in fold.sources)


def _check_copies(machine: Machine) -> None:
    """Every host copy is its blob's; those in use are in use by loads, and by nobody else."""
    copies, blobs = machine.residency.copies, machine.residency.blobs
    copies.pool.check()
    loads = list(machine.residency.loads.values())
    for copy in copies.pool:
        if copy.state is ExtentState.QUARANTINED:
            continue
        assert blobs[copy.blob].copy is copy, f"copy at {copy.offset} has no owner"
        users = [load for load in loads if load.copy is copy]
        assert copy.leases == sum(load.from_pool for load in users)
        assert (copy.state is ExtentState.FILLING) == any(not load.from_pool for load in users)
    for blob in blobs.values():
        assert blob.copy is None or blob.copy in list(copies.pool), f"{blob.key} has a copy nowhere"


def _check_leases(machine: Machine) -> None:
    """Leases are exactly those of requests that hold one."""
    expected: dict[int, int] = {}
    per_model: dict[str, int] = {}
    for request in machine.queue.requests.values():
        if (model := request.lease) is not None:
            assert machine.catalogue.editions[model.key] is model and model.name == request.model
            per_model[model.key] = per_model.get(model.key, 0) + 1
            for blob in model.blobs:
                assert blob.state is BlobState.RESIDENT, f"{request.id} leases {blob.key}: {blob.state}"
                assert blob.extent is not None
                expected[blob.extent.offset] = expected.get(blob.extent.offset, 0) + 1
        assert request.holds_lease or request.state not in (RequestState.ON_DECK, RequestState.RUNNING)
    if (fold := machine.residency.folds.under_way) is not None:
        for blob in fold.sources:
            assert blob.extent is not None
            expected[blob.extent.offset] = expected.get(blob.extent.offset, 0) + 1
    for extent in machine.residency.arena:
        assert extent.leases == expected.get(extent.offset, 0), f"leases of extent at {extent.offset}"
    for model in machine.catalogue.editions.values():
        assert model.leases == per_model.get(model.key, 0)
    assert machine.residency.leases == sum(per_model.values())


def _check_loaders(machine: Machine) -> None:
    """Loads and busy loaders are the same pairs."""
    residency = machine.residency
    busy = {loader.id: loader.load_id for loader in residency.loaders.values() if loader.load_id is not None}
    assert busy == {load.loader_id: load.id for load in residency.loads.values()}
    for loader in residency.loaders.values():
        assert (loader.life.state is LoaderState.BUSY) == (loader.load_id is not None)


def _check_stage(machine: Machine) -> None:
    """The deck and the running set are what the requests' states say."""
    on_deck = {r.id: r for r in machine.queue.requests.values() if r.state is RequestState.ON_DECK}
    assert on_deck == machine.on_deck
    assert len({(r.lease, r.info.batch_key, r.info.priority) for r in on_deck.values()}) <= 1
    running = {r.id for r in machine.queue.requests.values() if r.state is RequestState.RUNNING}
    assert running == set(machine.running)
    assert set(machine.wanted) <= set(machine.residency.models)
    assert set(machine.residency.pinned) <= set(machine.residency.models)
