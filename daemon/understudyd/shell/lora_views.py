"""Adapters, and models with adapters, as documents for people and as entries for clients. Changes nothing."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from understudy.wire import ModelEntry
from understudyd.core import snapshot
from understudyd.core.machine import Machine
from understudyd.core.states import BlobState
from understudyd.core.types import Tier
from understudyd.shell.adapter_book import AdapterBook
from understudyd.shell.adapter_keeper import AdapterKeeper
from understudyd.shell.derived import Derived
from understudyd.shell.tally import Tally
from understudyd.store.adapters.overlays import OverlaidComponent
from understudyd.store.union import FoundAdapter


def blob_tier(machine: Machine, key: str) -> Tier:
    """Where a blob or an overlay is; one that the core does not know is on disk."""
    blob = machine.residency.blobs.get(key)
    if blob is None:
        return Tier.DISK
    match blob.state:
        case BlobState.RESIDENT | BlobState.MOVING:
            return Tier.RESIDENT
        case BlobState.ABSENT | BlobState.DAMAGED | BlobState.FETCHING:
            return Tier.HOST if blob.has_copy else Tier.DISK
        case _:
            return Tier.LOADING


def lora_entries(book: AdapterBook, machine: Machine) -> list[ModelEntry]:
    """Adapters as clients see them, by name."""
    return [
        ModelEntry(
            name=name,
            pipeline=found.record.family,
            size_bytes=found.record.blob.size_bytes,
            tier=blob_tier(machine, found.record.blob.sha256).value,
            kind="lora",
            base=found.record.base_model,
        )
        for name, found in sorted(book.found.items())
    ]


class LoraViews:
    """Documents about what `keeper` keeps."""

    def __init__(self, keeper: AdapterKeeper, machine: Machine, tally: Tally) -> None:
        self._keeper = keeper
        self._machine = machine
        self._tally = tally

    def listing(self, now_s: float) -> dict[str, Any]:
        """Every adapter, and every combination of a model and adapters that the core knows."""
        derived = self._keeper.derived
        overlays = self._overlays_by_adapter(derived.latest.values())
        return {
            "loras": [
                self._row(found, overlays[name], now_s)
                for name, found in sorted(self._keeper.book.found.items())
            ],
            "combinations": [
                self._combination(derived.current(name), now_s) for name in sorted(derived.latest)
            ],
        }

    def adapter(self, name: str, now_s: float) -> dict[str, Any]:
        """One adapter in full. Raises KeyError."""
        found = self._keeper.book.found[name]
        record, facts = found.record, found.record.facts
        combinations = [
            self._keeper.derived.current(n) for n in sorted(self._keeper.derived.of_adapter(name))
        ]
        overlays = self._overlays_by_adapter(combinations)[name]
        return self._row(found, overlays, now_s) | {
            "family": record.family,
            "fits": self._keeper.book.bases(record),
            "weights": len(record.targets),
            "components": list(record.components),
            "trigger_words": list(facts.trigger_words),
            "licence": facts.licence,
            "description": facts.description,
            "source": record.source,
            "store": str(found.home.path),
            "shadowed": [str(path) for path in found.shadowed],
            "combinations": [self._combination(derived, now_s) for derived in combinations],
        }

    def derived(self, name: str, now_s: float) -> dict[str, Any]:
        """One combination in full. Raises KeyError."""
        derived = self._keeper.derived.current(name)
        view = snapshot.model(self._machine, name)
        return self._combination(derived, now_s) | {
            "parts": view.parts,
            "waiting": view.waiting,
            "leases": view.leases,
            "max_batch": view.max_batch,
            "can_batch": view.can_batch,
            "chance_next": round(view.chance, 4),
            "components": self._components(derived),
        }

    def _components(self, derived: Derived) -> list[dict[str, Any]]:
        """The base's blobs, the overlays over them, and the adapters that those are made of."""
        rows = []
        for component in derived.base.record.components:
            blob = component.blob
            rows.append(self._part(component.name, "base", blob.sha256, blob.size_bytes))
            overlaid = derived.overlays.get(component.name)
            if overlaid is not None:
                rows.append(self._overlay(component.name, overlaid))
        for found in derived.found:
            record = found.record
            rows.append(self._part(record.name, "lora", record.blob.sha256, record.blob.size_bytes))
        return rows

    def _overlay(self, component: str, overlaid: OverlaidComponent) -> dict[str, Any]:
        """What it is made of beside the base, how long that takes, how likely it is needed next."""
        size_bytes = overlaid.plan.size_bytes
        return self._part(component, "overlay", overlaid.key, size_bytes) | {
            "made_of": [[applied.record.name, applied.scale] for applied in overlaid.plan.adapters],
            "fold_s": round(self._machine.outlook.estimates.fold_s(size_bytes), 4),
            "chance_next": round(self._machine.forecast.chance(overlaid.key), 4),
        }

    def _part(self, name: str, role: str, key: str, size_bytes: int) -> dict[str, Any]:
        blob = self._machine.residency.blobs.get(key)
        return {
            "name": name,
            "role": role,
            "blob": key,
            "size_bytes": size_bytes,
            "tier": blob_tier(self._machine, key).value,
            "host_copy": blob is not None and blob.has_copy,
            "shared_by": [] if blob is None else sorted(blob.models),
            "history": "" if blob is None else blob.life.story(),
        }

    def _overlays_by_adapter(self, combinations: Iterable[Derived]) -> defaultdict[str, set[str]]:
        """Keys of the overlays that have each adapter in them."""
        overlays: defaultdict[str, set[str]] = defaultdict(set)
        for derived in combinations:
            for found in derived.found:
                changed = (derived.overlays[part].key for part in found.record.components)
                overlays[found.record.name].update(changed)
        return overlays

    def _row(self, found: FoundAdapter, overlays: Collection[str], now_s: float) -> dict[str, Any]:
        record = found.record
        resident = sum(blob_tier(self._machine, key) is Tier.RESIDENT for key in overlays)
        return {
            "name": record.name,
            "base": record.base_model,
            "ranks": list(record.ranks),
            "size_bytes": record.blob.size_bytes,
            "tier": blob_tier(self._machine, record.blob.sha256).value,
            "overlays": len(overlays),
            "overlays_resident": resident,
            **self._use(record.name, now_s),
        }

    def _combination(self, derived: Derived, now_s: float) -> dict[str, Any]:
        name = derived.info.name
        sizes = {overlaid.key: overlaid.plan.size_bytes for overlaid in derived.overlays.values()}
        view = snapshot.model(self._machine, name) if name in self._machine.residency.models else None
        return {
            "name": name,
            "base": derived.base_name,
            "adapters": [[adapter.name, adapter.scale] for adapter in derived.adapters],
            "ranks": sorted({rank for found in derived.found for rank in found.record.ranks}),
            "size_bytes": sum(sizes.values()),
            "tier": Tier.DISK.value if view is None else view.tier.value,
            "pinned": view is not None and view.pinned,
            **self._use(name, now_s),
        }

    def _use(self, name: str, now_s: float) -> dict[str, Any]:
        used_at_s = self._tally.last_used_at_s.get(name)
        return {
            "requests": self._tally.by_name[name],
            "last_used_s_ago": None if used_at_s is None else round(now_s - used_at_s, 1),
        }
