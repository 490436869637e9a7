"""What the stage folds: overlays, one at a time, out of blobs that lie in the arena."""

from understudyd.core.actions import Action, CancelFold, Fold
from understudyd.core.decisions import Decisions
from understudyd.core.entities import Blob, Folding
from understudyd.core.extents import Extent
from understudyd.core.states import IllegalEvent


class Folds:
    """The fold that is `under_way`, if any. `changes` counts starts and ends."""

    def __init__(self, actions: list[Action], decisions: Decisions | None = None) -> None:
        self.under_way: Folding | None = None
        self.changes = 0
        self._actions = actions
        self._decisions = decisions

    def find(self, overlay: str, generation: int) -> Folding:
        """The fold of that overlay into its extent. Raises `IllegalEvent` when it is not under way."""
        fold = self.under_way
        if fold is None or (fold.overlay.key, fold.extent.generation) != (overlay, generation):
            raise IllegalEvent(f"{overlay[:12]} is not being folded as generation {generation}")
        return fold

    def start(self, overlay: Blob, extent: Extent, now_s: float) -> Folding:
        """Have the stage make the overlay in this extent; its sources have been leased."""
        assert self.under_way is None
        self.changes += 1
        sources = []
        for blob in overlay.sources:
            assert blob.extent is not None
            sources.append((blob.key, blob.extent.offset))
        size_bytes, generation = overlay.info.size_bytes, extent.generation
        self._actions.append(Fold(overlay.key, extent.offset, size_bytes, generation, tuple(sources)))
        self.under_way = Folding(overlay, overlay.sources, extent, now_s)
        return self.under_way

    def cancel(self, fold: Folding) -> None:
        """Ask the stage to stop between two steps."""
        if not fold.is_cancelling:
            if self._decisions is not None:
                self._decisions.stopped(fold.overlay, is_to_host=False)
            fold.is_cancelling = True
            self._actions.append(CancelFold(fold.overlay.key, fold.extent.generation))

    def end(self) -> None:
        """The stage has done with it, one way or another, and takes the next."""
        self.changes += 1
        self.under_way = None
