"""Host copies that outlived another daemon: which are taken over, and what comes back to the arena first.

Nothing that was written down is believed unseen: a copy of an unknown blob, of another size, or over another
copy is left out. Its bytes are checked later, by the first load that reads them (`HostCopies.adopt`).
"""

from collections.abc import Iterable

from understudyd.core.entities import Blob, Model
from understudyd.core.events import CopiesFound
from understudyd.core.residency import Residency
from understudyd.core.states import IllegalEvent


def adopt(found: CopiesFound, residency: Residency, now_s: float) -> list[Model]:
    """Take the copies over; returns the models to bring back, the most valuable first.

    Raises `IllegalEvent` once there are copies already.
    """
    if next(iter(residency.copies.pool), None) is not None:
        raise IllegalEvent("copies were found in a pool that is in use")
    for kept in found.copies:
        blob = residency.blobs.get(kept.blob)
        if blob is not None and blob.info.size_bytes == kept.size_bytes:
            residency.copies.adopt(blob, kept.offset, now_s)
    return _to_bring_back(found.models, residency)


def _to_bring_back(names: Iterable[str], residency: Residency) -> list[Model]:
    """As many as the arena has room for, of those that are in the pool whole: nothing is read from disk."""
    models: list[Model] = []
    blobs: set[Blob] = set()
    for name in dict.fromkeys(names):
        model = residency.models.get(name)
        if model is None or model.retiring or not all(blob.has_copy for blob in model.files):
            continue
        needed = blobs.union(model.all_blobs)
        if sum(residency.arena.rounded(b.info.size_bytes) for b in needed) <= residency.arena.size_bytes:
            models.append(model)
            blobs = needed
    return models
