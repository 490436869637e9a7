"""Models with adapters folded in: what the core takes for models of their own.

They are made when somebody asks for them. Such a model has the blobs of its base, and for each component that
an adapter changes an overlay, which is made of the base's blob and of the adapters' blobs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from understudy.wire import Adapter
from understudyd.core.types import BlobInfo, ModelInfo
from understudyd.shell.adapter_book import AdapterBook, AdapterRefused
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.served import ServedModels
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan
from understudyd.store.records import BlobRecord
from understudyd.store.union import FoundAdapter, FoundModel


def derived_name(base: str, adapters: Sequence[Adapter]) -> str:
    """The name of a base with adapters; no model's own name has a "+"."""
    return "+".join((base, *(f"{adapter.name}@{adapter.scale!r}" for adapter in adapters)))


def parse_name(name: str) -> tuple[str, tuple[Adapter, ...]] | None:
    """What a derived model's name says, a missing scale being 1; None for a name that is none."""
    base, *terms = name.split("+")
    adapters = []
    for term in terms:
        adapter, at, scale = term.partition("@")
        try:
            adapters.append(Adapter(adapter, float(scale) if at else 1.0))
        except ValueError:
            return None
    return (base, tuple(adapters)) if adapters else None


@dataclass(frozen=True, slots=True)
class Derived:
    """An edition of a derived model: the base's edition, what was asked for, and what is folded."""

    info: ModelInfo
    base: FoundModel
    base_key: str
    adapters: tuple[Adapter, ...]
    found: tuple[FoundAdapter, ...]
    overlays: Mapping[str, OverlaidComponent]

    @property
    def base_name(self) -> str:
        """The base's name."""
        return self.base.record.name

    @property
    def ingredients(self) -> tuple[object, ...]:
        """Equal for those that are made of the same."""
        return (self.base_key, *((f.record.content, f.home.path) for f in self.found))

    @property
    def blobs(self) -> list[tuple[BlobRecord, str, FoundModel | FoundAdapter]]:
        """What may have to be loaded for it: each blob with its label and where it is."""
        name = self.base_name
        base = [(c.blob, f"{name} {c.name}", self.base) for c in self.base.record.components]
        return [*base, *((f.record.blob, f"lora {f.record.name}", f) for f in self.found)]


class DerivedModels:
    """`editions` are those that somebody still uses, by key; a name stands for the `latest`.

    Changed by the event loop's thread only; the stage's reads `editions`.
    """

    def __init__(self, served: ServedModels, book: AdapterBook, settings: ModelSettings) -> None:
        self.editions: dict[str, Derived] = {}
        self.latest: dict[str, Derived] = {}
        self._adopted: dict[str, str] = {}
        self._plans: dict[str, OverlayPlan] = {}
        self._labels: dict[str, str] = {}
        self._uses: Counter[str] = Counter()
        self._adapters: Counter[str] = Counter()
        self._served = served
        self._book = book
        self._settings = settings

    def __contains__(self, name: str) -> bool:
        return name in self.latest

    def current(self, name: str) -> Derived:
        """What the name stands for. Raises KeyError."""
        return self.editions[self._adopted[name]]

    def plan(self, overlay: str) -> OverlayPlan:
        """What an overlay holds. Raises KeyError when no edition has it any more."""
        return self._plans[overlay]

    def is_adapter(self, blob: str) -> bool:
        """It is folded, and never bound."""
        return self._adapters[blob] > 0

    def label(self, overlay: str) -> str | None:
        """What people know an overlay by."""
        return self._labels.get(overlay)

    def of_base(self, name: str) -> list[str]:
        """The names of what is derived from a model."""
        return [derived for derived, latest in self.latest.items() if latest.base_name == name]

    def of_adapter(self, name: str) -> list[str]:
        """The names of those that have an adapter in them."""
        return [d for d, latest in self.latest.items() if any(a.name == name for a in latest.adapters)]

    def uses_adapter(self, name: str) -> bool:
        """Some edition has this adapter in it."""
        return any(a.name == name for edition in self.editions.values() for a in edition.adapters)

    # -- editions -----------------------------------------------------------------------------------

    def derive(self, base: str, adapters: Sequence[Adapter], name: str) -> Derived:
        """What this name stands for, made of what is served now; nothing is kept. Raises `AdapterRefused`."""
        model, base_key = self._served.current(base), self._served.current_key(base)
        found = tuple(self._book.find(adapter.name) for adapter in adapters)
        blobs = {c.name: c.blob for c in model.record.components}
        overlays = {
            plan.component: OverlaidComponent(plan.key(sha256), plan, sha256)
            for plan in self._book.plans(model, adapters)
            for sha256 in (blobs[plan.component].sha256,)
        }
        if not overlays:
            raise AdapterRefused("adapter_misfit", f"the adapters change nothing of {base!r}; leave them out")
        infos = [_blob_info(c.blob) for c in model.record.components]
        infos += [_overlay_info(overlaid, blobs[part]) for part, overlaid in overlays.items()]
        max_batch = self._settings.of(base).max_batch
        editions = (ModelInfo(name, tuple(infos), i, max_batch, is_derived=True) for i in count())
        info = next(info for info in editions if info.key not in self.editions)
        return Derived(info, model, base_key, tuple(adapters), found, overlays)

    def enter(self, derived: Derived) -> None:
        """The core is told of this edition."""
        self.editions[derived.info.key] = self.latest[derived.info.name] = derived
        for blob, label, found in derived.blobs:
            self._served.places.claim(blob, label, found.home)
        self._adapters.update(found.record.blob.sha256 for found in derived.found)
        for component, overlaid in derived.overlays.items():
            self._uses[overlaid.key] += 1
            self._plans[overlaid.key] = overlaid.plan
            self._labels.setdefault(overlaid.key, f"{derived.info.name} {component}")

    def adopt(self, name: str, key: str) -> None:
        """From now on the name stands for this edition."""
        self._adopted[name] = key

    def forget_name(self, name: str) -> Derived:
        """The name stands for nothing any more; returns its last edition."""
        del self.latest[name]
        return self.forget(self._adopted.pop(name))

    def forget(self, key: str) -> Derived:
        """Nobody uses this edition any more."""
        gone = self.editions.pop(key)
        for blob, _, _ in gone.blobs:
            self._served.places.release(blob.sha256)
        self._adapters.subtract(found.record.blob.sha256 for found in gone.found)
        self._adapters = +self._adapters  # without those that are gone
        for overlaid in gone.overlays.values():
            self._uses[overlaid.key] -= 1
            if not self._uses[overlaid.key]:
                del self._uses[overlaid.key], self._plans[overlaid.key], self._labels[overlaid.key]
        return gone


def _blob_info(blob: BlobRecord) -> BlobInfo:
    return BlobInfo(blob.sha256, blob.size_bytes)


def _overlay_info(overlaid: OverlaidComponent, base: BlobRecord) -> BlobInfo:
    """Two adapters may have one blob, of which the core is told once; `plan.key` has both."""
    adapters = dict.fromkeys(_blob_info(applied.record.blob) for applied in overlaid.plan.adapters)
    return BlobInfo(overlaid.key, overlaid.plan.size_bytes, made_of=(_blob_info(base), *adapters))
