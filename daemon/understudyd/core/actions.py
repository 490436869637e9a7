"""What to do: the only output of the core. Imperatives, immutable, performed in order by the shell.

Each docstring says which event ends the action; the others are done when performed.
"""

from dataclasses import dataclass

from understudyd.core.types import ErrorCode, Tier


@dataclass(frozen=True, slots=True)
class AcceptRequest:
    """Tell the client its place: `position` 0 is next on stage, which should be in `estimated_wait_s`."""

    request_id: str
    position: int
    tier: Tier
    estimated_wait_s: float


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """The one answer of a request: images when `code` is None, else the error."""

    request_id: str
    code: ErrorCode | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Fill `[offset, offset + size_bytes)` of the arena with a blob.

    With `pool_offset` and `from_pool` the bytes come from the host pool; with `pool_offset` alone they are
    left there too. Without `offset` they go to the host pool only. With `must_verify` nobody has checked
    what is in the pool: the load does.

    Ends in `LoadFinished`, `LoadFailed`, `LoadCancelled`, or `LoaderLost` of its loader.
    """

    load_id: int
    loader_id: int
    blob: str
    offset: int | None
    size_bytes: int
    generation: int
    pool_offset: int | None = None
    from_pool: bool = False
    must_verify: bool = False


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """Stop a load between two chunks. The load still ends in one of its own events."""

    load_id: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Make an overlay in `[offset, offset + size_bytes)` out of resident blobs, which are all leased for it.

    `sources` are their keys and offsets: the base component's, then the adapters', in order. Ends in
    `FoldFinished`, `FoldFailed` or `FoldCancelled`. At most one is under way.
    """

    overlay: str
    offset: int
    size_bytes: int
    generation: int
    sources: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class CancelFold:
    """Stop a fold between two steps. It still ends in one of its own events."""

    overlay: str
    generation: int


@dataclass(frozen=True, slots=True)
class PauseLoads:
    """Have every loader, new ones too, rest between two pieces, or go on."""

    is_paused: bool


@dataclass(frozen=True, slots=True)
class MoveExtent:
    """Move a resident blob that nobody uses down to `to_offset`; the two places may overlap.

    Its views were dropped before. Ends in `ExtentMoved` or `MoveFailed`.
    """

    blob: str
    offset: int
    to_offset: int
    size_bytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class BuildViews:
    """Prebuild the blob's tensors over its extent. Ends in `ViewsBuilt` or `ViewsFailed`."""

    blob: str
    offset: int
    generation: int


@dataclass(frozen=True, slots=True)
class DropViews:
    """Forget the blob's tensors before its extent is used again."""

    blob: str
    generation: int


@dataclass(frozen=True, slots=True)
class PrepareModel:
    """Build skeletons, tokenizers, scheduler of an edition of a model.

    Ends in `ModelPrepared` or `ModelPreparationFailed`.
    """

    key: str


@dataclass(frozen=True, slots=True)
class ForgetModel:
    """Drop the prepared parts of an edition that nobody uses any more."""

    key: str


@dataclass(frozen=True, slots=True)
class PutOnDeck:
    """Run this request, with the edition `model`, when the stage is free. Its blobs are leased from now on.

    Ends in `RunStarted` then `RunEnded`, or in `RunEnded` alone; then `LeaseEnded`; and after a
    finished run in `ImagesEncoded` or `EncodingFailed`. `companions` are requests for the same run; each has
    events of its own.
    """

    request_id: str
    model: str
    companions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelRun:
    """End the run at its next checkpoint. It still ends in `RunEnded`."""

    request_id: str
    code: ErrorCode


@dataclass(frozen=True, slots=True)
class RetireModel:
    """The last user of a removed model is gone: its files may be deleted."""

    name: str


@dataclass(frozen=True, slots=True)
class AdoptEdition:
    """From now on the name stands for this edition."""

    name: str
    key: str


@dataclass(frozen=True, slots=True)
class RejectEdition:
    """The edition's small parts cannot be built: its name stands for what it stood for before."""

    name: str
    key: str
    message: str


@dataclass(frozen=True, slots=True)
class RetireEdition:
    """The last user of an edition that was replaced or rejected is gone: what only it used may be deleted."""

    name: str
    key: str


Action = (
    AcceptRequest
    | AnswerRequest
    | StartLoad
    | CancelLoad
    | Fold
    | CancelFold
    | PauseLoads
    | MoveExtent
    | BuildViews
    | DropViews
    | PrepareModel
    | ForgetModel
    | PutOnDeck
    | CancelRun
    | RetireModel
    | AdoptEdition
    | RejectEdition
    | RetireEdition
)
