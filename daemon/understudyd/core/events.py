"""What happened: the only input of the core. Nouns in the past tense, immutable.

Each event names who reports it. The stage and the loader pool import these and emit them; they never
see an action's consequences.
"""

from dataclasses import dataclass

from understudyd.core.policy import PolicySettings
from understudyd.core.types import ErrorCode, ModelInfo, Outcome, RequestInfo

# -- front end and admin socket ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A client asks. Ends in exactly one `AnswerRequest`."""

    request: RequestInfo


@dataclass(frozen=True, slots=True)
class RequestCancelled:
    """The client or an operator takes a request back. Unknown and answered ids are ignored.

    `code` and `message` are its answer's.
    """

    request_id: str
    code: ErrorCode = ErrorCode.CANCELLED
    message: str = "the request was cancelled"


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client will not read answers any more: all its requests are cancelled."""

    client: str


@dataclass(frozen=True, slots=True)
class ModelAdded:
    """The store has a new model."""

    model: ModelInfo


@dataclass(frozen=True, slots=True)
class ModelReplaced:
    """The store has another edition of a model. Ends in `AdoptEdition`, `RejectEdition` or `RetireEdition`.

    What runs or is on deck finishes with the old edition; what waits, and what comes, gets the new one as
    soon as its small parts are at hand.
    """

    model: ModelInfo


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    """An operator removes a model: waiting requests fail, running ones finish, then `RetireModel`."""

    name: str


@dataclass(frozen=True, slots=True)
class PinChanged:
    """A pinned model is loaded when there is room and never evicted."""

    name: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class MaxBatchChanged:
    """From now on one run may make so many images for several requests; 1: each request runs alone."""

    name: str
    max_batch: int


@dataclass(frozen=True, slots=True)
class LoadWanted:
    """An operator wants the model resident, once, as soon as no waiting request needs the loaders."""

    name: str


@dataclass(frozen=True, slots=True)
class EvictWanted:
    """An operator wants the model's unshared, unleased blobs out of the arena."""

    name: str


@dataclass(frozen=True, slots=True)
class AdmissionChanged:
    """Draining starts (`is_open` false) or ends: new requests are refused with `draining`."""

    is_open: bool


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """An operator's choices have changed. The order of the queue and the bounds on overtaking have not."""

    policy: PolicySettings
    max_waiting: int


@dataclass(frozen=True, slots=True)
class KeptCopy:
    """Bytes of the host pool that hold a blob, as somebody wrote down."""

    blob: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CopiesFound:
    """The host pool outlived another daemon; told once, when the models are known and nothing was loaded.

    Nobody has looked at the bytes yet: the first load of each copy checks them. `models` are those that were
    of most use, the most valuable first: they come back to the arena as far as the pool holds them.
    """

    copies: tuple[KeptCopy, ...]
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CopiesDropWanted:
    """An operator wants every host copy forgotten that no load uses."""


# -- loader pool -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoaderReady:
    """A loader process has opened the arena and takes loads."""

    loader_id: int


@dataclass(frozen=True, slots=True)
class LoaderLost:
    """A loader is dead or declared dead; a copy of it may still be in flight."""

    loader_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class LoaderReaped:
    """The lost loader's process is gone for good (waited for). Always follows `LoaderLost`."""

    loader_id: int


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """Every byte of the load is in its extents and visible to the stage."""

    load_id: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The load wrote nothing that may be used. `code` is MODEL_CORRUPT or LOAD_FAILED."""

    load_id: int
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class LoadCancelled:
    """The loader has stopped writing for this load, as it was told."""

    load_id: int


# -- stage -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ViewsBuilt:
    """The blob's tensors can be bound."""

    blob: str
    generation: int


@dataclass(frozen=True, slots=True)
class ViewsFailed:
    """The blob's tensors could not be built."""

    blob: str
    generation: int
    message: str


@dataclass(frozen=True, slots=True)
class FoldFinished:
    """Every byte of the overlay is in place and visible to the stage."""

    overlay: str
    generation: int


@dataclass(frozen=True, slots=True)
class FoldFailed:
    """The overlay could not be made: nothing writes to its extent any more. BAD_REQUEST: it never can be."""

    overlay: str
    generation: int
    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class FoldCancelled:
    """The fold was stopped; nothing writes to its extent any more."""

    overlay: str
    generation: int


@dataclass(frozen=True, slots=True)
class ExtentMoved:
    """Every byte of the blob is at its new place and visible to the stage."""

    blob: str
    generation: int


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """The blob's bytes are of no use any more, neither here nor there."""

    blob: str
    generation: int
    message: str


@dataclass(frozen=True, slots=True)
class ModelPrepared:
    """Skeletons, tokenizers and small parts of this edition of a model are at hand.

    `can_batch`: one call of its pipeline can serve several requests.
    """

    key: str
    can_batch: bool = True


@dataclass(frozen=True, slots=True)
class ModelPreparationFailed:
    """The edition's small parts cannot be built: requests that wait for it fail.

    `is_lasting`: nor can they later. Otherwise, where its files cannot be reached at the moment, the next
    request has it tried again.
    """

    key: str
    message: str
    is_lasting: bool = True


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A request on deck holds the baton; the deck is free when all on it do."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The request gave the baton away, or never got it (cancelled or failed on deck).

    One that is cancelled in a batch ends at once; its lease lasts as long as the others' run.
    """

    request_id: str
    outcome: Outcome
    code: ErrorCode | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """The device has finished the last use of the request's blobs. Follows `RunEnded`."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ImagesEncoded:
    """The finished run's images are ready to be sent."""

    request_id: str


@dataclass(frozen=True, slots=True)
class EncodingFailed:
    """The finished run's images could not be encoded."""

    request_id: str
    message: str


# -- clock -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticked:
    """`next_deadline_s()` has come."""


Event = (
    RequestReceived
    | RequestCancelled
    | ClientGone
    | ModelAdded
    | ModelReplaced
    | ModelRemoved
    | PinChanged
    | MaxBatchChanged
    | LoadWanted
    | EvictWanted
    | AdmissionChanged
    | SettingsChanged
    | CopiesFound
    | CopiesDropWanted
    | LoaderReady
    | LoaderLost
    | LoaderReaped
    | LoadFinished
    | LoadFailed
    | LoadCancelled
    | ViewsBuilt
    | ViewsFailed
    | FoldFinished
    | FoldFailed
    | FoldCancelled
    | ExtentMoved
    | MoveFailed
    | ModelPrepared
    | ModelPreparationFailed
    | RunStarted
    | RunEnded
    | LeaseEnded
    | ImagesEncoded
    | EncodingFailed
    | Ticked
)
