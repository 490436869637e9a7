"""Against fragmentation: room for a model that finds none though the arena is large enough.

Best fit and clearing a window do nearly always. They cannot where what must stay, as pinned blobs do, lies
between the gaps. Then ready extents are moved, which on a GPU takes milliseconds: a copy within the device.

Also what an operator has evicted.
"""

from collections.abc import Mapping

from understudyd.core.entities import Model
from understudyd.core.extents import Extent
from understudyd.core.residency import Residency
from understudyd.core.states import BlobState, ExtentState


def make_room(residency: Residency, model: Model, prices: Mapping[Extent, float], now_s: float) -> bool:
    """Evict what is cheapest until the free bytes suffice, then move one extent if no gap does.

    For when nothing is under way and no lease stands. Returns whether anything was done; a move ends in an
    event, after which this is asked again if need be.
    """
    arena = residency.arena
    lacking = [arena.rounded(b.info.size_bytes) for b in model.needed() if b.state is BlobState.ABSENT]
    evictions = residency.evictions
    for extent in _victims(residency, model, prices):
        if arena.free_bytes >= sum(lacking):
            break
        residency.evict(residency.blobs[extent.blob], now_s, f"room for {model.name}")
    if arena.free_bytes >= sum(lacking) and not all(arena.largest_gap_bytes >= size for size in lacking):
        extent_to_move = arena.next_slide(max(lacking), lambda extent: _is_movable(residency, extent))
        if extent_to_move is not None:
            residency.begin_move(residency.blobs[extent_to_move.blob], now_s)
            return True
    return residency.evictions != evictions


def _victims(residency: Residency, model: Model, prices: Mapping[Extent, float]) -> list[Extent]:
    """What may be evicted, the cheapest first; what has no price last, and never the model's own blobs."""
    own = {blob.key for blob in model.needed()}
    evictable = [e for e in residency.arena if e.blob not in own and residency.evictable(e) is not None]
    return sorted(evictable, key=lambda extent: (prices.get(extent, float("inf")), extent.offset))


def _is_movable(residency: Residency, extent: Extent) -> bool:
    """Ready and with views; pinned or not."""
    blob = residency.blobs.get(extent.blob)
    if extent.state is not ExtentState.READY or blob is None or blob.extent is not extent:
        return False
    return blob.state is BlobState.RESIDENT


def evict_model(residency: Residency, model: Model, now_s: float) -> None:
    """Evict what no other resident model shares and nobody holds."""
    for blob in model.all_blobs:
        others = (residency.models[m] for m in blob.models if m != model.name)
        if blob.extent is None or any(other.is_resident for other in others):
            continue
        if residency.evictable(blob.extent) is not None:
            residency.evict(blob, now_s, "operator")
