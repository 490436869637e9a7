"""Independent books about folds: what is read, what is written, told by events and actions alone."""

from dataclasses import dataclass

from understudyd.core import actions as ac
from understudyd.core.types import BlobInfo


@dataclass
class FoldLedger:
    """At most one fold is under way; what it reads stays where it is until it has ended."""

    under_way: ac.Fold | None = None
    is_told_to_stop: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Overlay and generation of the fold under way."""
        assert self.under_way is not None
        return self.under_way.overlay, self.under_way.generation

    @property
    def sources(self) -> set[str]:
        """Blobs that nobody may evict, move or write to."""
        return set() if self.under_way is None else {key for key, _ in self.under_way.sources}

    def start(self, fold: ac.Fold, overlay: BlobInfo, resident: dict[str, int]) -> None:
        """`resident` are the offsets of what can be bound."""
        assert self.under_way is None, "one fold at a time"
        assert fold.size_bytes == overlay.size_bytes
        assert [key for key, _ in fold.sources] == [source.key for source in overlay.made_of]
        for key, offset in fold.sources:
            assert resident.get(key) == offset, f"{fold} reads {key}, which is not there"
        self.under_way, self.is_told_to_stop = fold, False

    def stop(self, cancel: ac.CancelFold) -> None:
        assert self.key == (cancel.overlay, cancel.generation) and not self.is_told_to_stop
        self.is_told_to_stop = True

    def ended(self, overlay: str, generation: int) -> None:
        assert self.key == (overlay, generation)
        self.under_way = None
