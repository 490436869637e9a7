"""Where blobs are that may have to be loaded, and what people call them."""

from collections import Counter
from dataclasses import dataclass

from understudyd.store.records import BlobRecord
from understudyd.store.store import Store


@dataclass(frozen=True, slots=True)
class BlobPlace:
    """A blob, what to call it in the timeline, and the stores that have it."""

    record: BlobRecord
    label: str
    homes: tuple[Store, ...]


class BlobPlaces:
    """Places by the blobs' sha256. Each is known as long as somebody claims it."""

    def __init__(self) -> None:
        self._places: dict[str, BlobPlace] = {}
        self._claims: Counter[str] = Counter()

    def __getitem__(self, sha256: str) -> BlobPlace:
        return self._places[sha256]

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._places

    def label(self, sha256: str) -> str | None:
        """What people know the blob by; None for one that nobody claims."""
        place = self._places.get(sha256)
        return None if place is None else place.label

    def claim(self, blob: BlobRecord, label: str, home: Store) -> None:
        """Somebody may have this blob loaded, from `home`; the first label counts."""
        known = self._places.get(blob.sha256, BlobPlace(blob, label, ()))
        homes = known.homes if home in known.homes else (*known.homes, home)
        self._places[blob.sha256] = BlobPlace(blob, known.label, homes)
        self._claims[blob.sha256] += 1

    def release(self, sha256: str) -> None:
        """One claim less."""
        self._claims[sha256] -= 1
        if not self._claims[sha256]:
            del self._claims[sha256], self._places[sha256]
