"""Which weights a list of adapters changes, and where the changed ones lie. No torch here.

An overlay holds the folded weights of one component and nothing else; the base's other weights, and its
bytes, stay where they are. Adapters are folded in the order in which they are asked for, which is part of
the result: floating-point sums round.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from understudyd.store.adapters.records import AdapterRecord, TargetRecord, misfit
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import DATA_ALIGN_BYTES, TENSOR_ALIGN_BYTES, SignatureRecord, TensorRecord


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """An adapter and how strongly it is to work."""

    record: AdapterRecord
    scale: float


@dataclass(frozen=True, slots=True)
class FoldTerm:
    """What one adapter adds to a weight; `adapter` counts in the plan's adapters."""

    adapter: int
    target: TargetRecord


@dataclass(frozen=True, slots=True)
class FoldedWeight:
    """A weight of the base, its place in the overlay's extent, and what is added to it, in order."""

    base: TensorRecord
    folded: TensorRecord
    terms: tuple[FoldTerm, ...]


@dataclass(frozen=True, slots=True)
class OverlayPlan:
    """One component's overlay. `weights` are in the order of the base's bytes, each at a multiple of 512.

    `adapters` are those that change this component, in order. `size_bytes` is the extent's, a multiple of
    4096.
    """

    component: str
    adapters: tuple[AppliedAdapter, ...]
    weights: tuple[FoldedWeight, ...]
    size_bytes: int

    def key(self, base_blob: str) -> str:
        """Equal for overlays of equal bytes: one base blob, equal adapters in equal order and strength.

        The component counts, too: an adapter may change two components that have one blob differently.
        """
        applied = [(a.record.content, a.scale) for a in self.adapters]
        return hashlib.sha256(msgspec.json.encode((self.component, base_blob, applied))).hexdigest()


@dataclass(frozen=True, slots=True)
class OverlaidComponent:
    """What a derived model has in place of some of a component's weights.

    `key` is the overlay's, as `plan.key(base_blob)` gives it; `base_blob` the component's blob.
    """

    key: str
    plan: OverlayPlan
    base_blob: str


def plan_overlays(
    components: Mapping[str, SignatureRecord], adapters: Sequence[AppliedAdapter]
) -> tuple[OverlayPlan, ...]:
    """What the adapters change of a model's components (by name), in the components' order.

    Raises `StoreError(adapter_misfit)`, which names the first weight that does not fit, also when an
    adapter is asked for twice.
    """
    names = [applied.record.name for applied in adapters]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise StoreError(
                StoreErrorCode.ADAPTER_MISFIT, f"adapter {name!r} is asked for twice; name it once"
            )
    for applied in adapters:
        if why := misfit(applied.record, components):
            raise StoreError(
                StoreErrorCode.ADAPTER_MISFIT,
                f"adapter {applied.record.name!r} does not fit: the model {why}; use it with its base",
            )
    plans = (_plan(name, signature, adapters) for name, signature in components.items())
    return tuple(plan for plan in plans if plan.weights)


def _plan(component: str, signature: SignatureRecord, adapters: Sequence[AppliedAdapter]) -> OverlayPlan:
    own = [a for a in adapters if component in a.record.components]
    terms: dict[str, list[FoldTerm]] = {}
    for number, applied in enumerate(own):
        for target in applied.record.targets:
            if target.component == component:
                terms.setdefault(target.path, []).append(FoldTerm(number, target))
    weights = []
    at = 0
    for base in signature.tensors:
        if base.path in terms:
            folded = msgspec.structs.replace(base, offset=at)
            weights.append(FoldedWeight(base, folded, tuple(terms[base.path])))
            at += _rounded_up(base.size_bytes, TENSOR_ALIGN_BYTES)
    return OverlayPlan(component, tuple(own), tuple(weights), _rounded_up(at, DATA_ALIGN_BYTES))


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
