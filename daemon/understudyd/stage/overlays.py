"""What an overlay brings to the stage: a few tensors of its own for a component that has all of them.

Overlays that change the same weights, as most adapters of a base do, have one layout: it is kept once, and
views that one of them leaves behind serve the next.
"""

import hashlib
from dataclasses import dataclass
from weakref import WeakValueDictionary

import msgspec

from understudyd.store.adapters.overlays import OverlayPlan
from understudyd.store.records import TensorRecord


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class OverlayLayout:
    """Which weights an overlay holds, and where in its extent."""

    id: str
    tensors: tuple[TensorRecord, ...]


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay over a component, by its key; see `OverlayPlan.key`."""

    key: str
    layout: OverlayLayout


class OverlayLayouts:
    """Finds and makes layouts. They live as long as somebody uses them. Thread-safe."""

    def __init__(self) -> None:
        self._layouts: WeakValueDictionary[str, OverlayLayout] = WeakValueDictionary()

    def of(self, plan: OverlayPlan) -> OverlayLayout:
        """The plan's layout, one and the same object for equal ones."""
        tensors = tuple(weight.folded for weight in plan.weights)
        layout = OverlayLayout(hashlib.sha256(msgspec.json.encode(tensors)).hexdigest(), tensors)
        return self._layouts.setdefault(layout.id, layout)
