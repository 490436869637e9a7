"""The things the machine keeps: blobs, models, loads, folds, loaders. Data and questions, no decisions."""

from collections.abc import Set
from dataclasses import dataclass, field

from understudyd.core.extents import Extent
from understudyd.core.states import BlobState, ExtentState, Lifecycle, LoaderState, PartsState
from understudyd.core.types import BlobInfo, ModelInfo, Tier


@dataclass(eq=False, slots=True)
class Blob:
    """Weights of one component: in the arena (`extent`), in the host pool (`copy`), in both or in neither.

    `failures` counts loads in a row that did not end well, `corrupt_reads` those of them that read wrong
    bytes, `give_ups` how often that was too many. It is not loaded before `retry_at_s`. One that `is_guess`
    was loaded or folded because it was likely, and nothing has used it since.

    An overlay has `sources`, out of which it is folded: the base component's blob, then those of adapters. An
    adapter has the `overlays` that it is needed for; it is none of any model's own blobs.
    """

    info: BlobInfo
    life: Lifecycle[BlobState]
    models: set[str] = field(default_factory=set)
    sources: "tuple[Blob, ...]" = ()
    overlays: "dict[str, Blob]" = field(default_factory=dict)
    extent: Extent | None = None
    copy: Extent | None = None
    load_id: int | None = None
    failures: int = 0
    corrupt_reads: int = 0
    give_ups: int = 0
    retry_at_s: float = 0.0
    is_guess: bool = False

    @property
    def key(self) -> str:
        """The blob's content address."""
        return self.info.key

    @property
    def state(self) -> BlobState:
        """Where it is in its life."""
        return self.life.state

    @property
    def is_overlay(self) -> bool:
        """It is folded, not loaded."""
        return bool(self.info.made_of)

    @property
    def is_at_hand(self) -> bool:
        """It can be loaded from the host pool, or folded out of what is resident."""
        if self.is_overlay:
            return all(source.state is BlobState.RESIDENT for source in self.sources)
        return self.has_copy

    @property
    def is_made(self) -> bool:
        """An overlay that needs its adapters no more, as long as it stays."""
        return self.life.state in (BlobState.VIEWING, BlobState.RESIDENT, BlobState.MOVING)

    @property
    def users(self) -> Set[str]:
        """The models that need it now: nobody needs an adapter while all its overlays are there."""
        if not self.overlays:
            return self.models
        return {name for overlay in self.overlays.values() if not overlay.is_made for name in overlay.models}

    @property
    def has_copy(self) -> bool:
        """It can be loaded from the host pool."""
        return self.copy is not None and self.copy.life.state in (ExtentState.READY, ExtentState.LEASED)


@dataclass(eq=False, slots=True)
class Model:
    """One edition of a model and its blobs in order of first use, overlays last.

    `adapters` are the blobs of which, and of its own, its overlays are made: needed to make one, not to run.
    A retiring one, removed or replaced, takes no requests any more. `was_out_of_reach`: the last attempt to
    prepare it failed for a reason that may pass; only somebody who asks for it has it tried again.
    `max_batch` is what an operator allows, `can_batch` whether its pipeline can; the stage tells.
    """

    info: ModelInfo
    blobs: tuple[Blob, ...]
    parts: Lifecycle[PartsState]
    adapters: tuple[Blob, ...] = ()
    retiring: bool = False
    leases: int = 0
    was_out_of_reach: bool = False
    max_batch: int = 1
    can_batch: bool = True

    @property
    def name(self) -> str:
        """The model's name."""
        return self.info.name

    @property
    def key(self) -> str:
        """What tells this edition from the name's others."""
        return self.info.key

    @property
    def is_resident(self) -> bool:
        """Every blob can be bound."""
        for blob in self.blobs:  # noqa: SIM110  asked of hundreds of models per event, `all` takes twice as long
            if blob.life.state is not BlobState.RESIDENT:
                return False
        return True

    @property
    def all_blobs(self) -> tuple[Blob, ...]:
        """Its own, and the adapters of which its overlays are made."""
        return (*self.blobs, *self.adapters) if self.adapters else self.blobs

    @property
    def files(self) -> tuple[Blob, ...]:
        """What of all that is loaded, not folded."""
        return tuple(b for b in self.all_blobs if not b.info.made_of) if self.adapters else self.blobs

    def needed(self) -> tuple[Blob, ...]:
        """What must be there, or come, before it can run, in the order in which to fetch and make it."""
        if not self.adapters:
            return self.blobs
        unmade = [blob for blob in self.blobs if blob.info.made_of and not blob.is_made]
        if not unmade:
            return self.blobs
        adapters = [blob for blob in self.adapters if any(blob in overlay.sources for overlay in unmade)]
        own = [blob for blob in self.blobs if blob not in unmade]
        return (*own, *adapters, *unmade)

    @property
    def is_unfit(self) -> bool:
        """It cannot run until it is added anew: parts that cannot be built, or a damaged file or overlay."""
        if self.parts.state is PartsState.BROKEN:
            return True
        for blob in self.all_blobs:
            if blob.life.state is BlobState.DAMAGED:  # seldom, and this is asked as often as the above
                return any(blob.state is BlobState.DAMAGED for blob in self.needed())
        return False

    @property
    def is_ready(self) -> bool:
        """Resident, and its small parts are at hand: it can go on deck."""
        return self.parts.state is PartsState.PREPARED and self.is_resident

    @property
    def tier(self) -> Tier:
        """Where its slowest blob is."""
        if self.is_resident:
            return Tier.RESIDENT
        absent = [b for b in self.needed() if b.state in (BlobState.ABSENT, BlobState.DAMAGED)]
        if any(not (b.has_copy or b.is_overlay) for b in absent):
            return Tier.DISK
        return Tier.HOST if any(b.is_at_hand for b in absent) else Tier.LOADING


@dataclass(eq=False, slots=True)
class Load:
    """A blob under way to the arena (`extent`), the host pool (`copy`) or both.

    `from_pool`: the copy was there before and is read. `had_company`: another load was under way meanwhile.
    """

    id: int
    blob: Blob
    loader_id: int
    extent: Extent | None
    copy: Extent | None
    from_pool: bool
    started_at_s: float
    is_cancelling: bool = False
    had_company: bool = False


@dataclass(eq=False, slots=True)
class Folding:
    """An overlay that is being made of `sources`, which stay where they are until it has ended."""

    overlay: Blob
    sources: tuple[Blob, ...]
    extent: Extent
    started_at_s: float
    is_cancelling: bool = False


@dataclass(eq=False, slots=True)
class Loader:
    """A loader process, as far as the core knows it."""

    id: int
    life: Lifecycle[LoaderState]
    load_id: int | None = None
