"""Why a model cannot run here, whoever asks."""

from understudyd.core.entities import Model
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState, PartsState
from understudyd.core.types import ErrorCode


def refusal_of(residency: Residency, model: Model) -> tuple[ErrorCode, str] | None:
    """The code and what to do; None for a model that can run."""
    if model.parts.state is PartsState.BROKEN:
        return ErrorCode.INTERNAL, f"{model.name} could not be prepared: {model.parts.last_reason}"
    unmade = next((b for b in model.blobs if b.is_overlay and b.state is BlobState.DAMAGED), None)
    if unmade is not None:
        return ErrorCode.BAD_REQUEST, f"{model.name} cannot be made: {unmade.life.last_reason}"
    if model.is_unfit:
        return ErrorCode.MODEL_CORRUPT, f"{model.name} is damaged on disk; add it again with --replace"
    too_large = larger_than_arena(residency, model) or larger_than_what_pins_leave(residency, model)
    return None if too_large is None else (ErrorCode.MODEL_TOO_LARGE, too_large)


def larger_than_arena(residency: Residency, model: Model) -> str | None:
    """That it cannot run here even with the arena to itself; None where it can."""
    arena = residency.arena
    needed = sum(arena.rounded(blob.info.size_bytes) for blob in set(model.all_blobs))
    if needed <= arena.size_bytes:
        return None
    return f"{model.name} needs {_size(needed)}, the arena has {_size(arena.size_bytes)}; enlarge the arena"


def larger_than_what_pins_leave(residency: Residency, model: Model) -> str | None:
    """That it cannot run beside what is pinned; None where it can."""
    needed, size_bytes = residency.required_bytes(model), residency.arena.size_bytes
    if needed <= size_bytes:
        return None
    return (
        f"{model.name} and what is pinned need {_size(needed)} together, the arena has {_size(size_bytes)}; "
        "unpin models or enlarge the arena"
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
