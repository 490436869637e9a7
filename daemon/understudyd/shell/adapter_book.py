"""The adapters that are served, which models they fit, and what folding them into one changes.

Nothing here touches a store: records and signatures were read when the stores were looked at.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

from understudy.wire import Adapter
from understudyd.names import unknown
from understudyd.shell.served import ServedModels
from understudyd.store.adapters.overlays import AppliedAdapter, OverlayPlan, plan_overlays
from understudyd.store.adapters.records import AdapterRecord, misfit
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import SignatureRecord
from understudyd.store.union import FoundAdapter, FoundModel

_KEPT_PLANS = 128
_KEPT_MISFITS = 10_000
_LISTED = 5

Refusal = Literal["unknown_adapter", "adapter_misfit", "bad_request", "load_failed"]


class AdapterRefused(Exception):
    """A request's adapters cannot be had; `code` is the wire protocol's."""

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(message)
        self.code: Refusal = code


class AdapterBook:
    """`found` is by name. Only the event loop's thread uses this."""

    def __init__(self, served: ServedModels) -> None:
        self.found: dict[str, FoundAdapter] = {}
        self._served = served
        self._misfits: dict[tuple[str, tuple[str, ...]], str | None] = {}  # by content and signatures
        self._plans: OrderedDict[tuple[object, ...], tuple[OverlayPlan, ...]] = OrderedDict()

    def find(self, name: str) -> FoundAdapter:
        """The adapter of this name. Raises `AdapterRefused(unknown_adapter)`."""
        found = self.found.get(name)
        if found is None:
            listing = (
                "`understudyctl loras` lists them" if self.found else "none are here: add one with add-lora"
            )
            raise AdapterRefused("unknown_adapter", unknown("adapter", name, self.found, listing))
        return found

    def put(self, name: str, found: FoundAdapter | None) -> None:
        """From now on the name stands for this one, or for none."""
        if found is None:
            del self.found[name]
        else:
            self.found[name] = found

    # -- which models -------------------------------------------------------------------------------

    def bases(self, record: AdapterRecord) -> list[str]:
        """Every served model that the adapter fits, by name."""
        models = self._served.records
        return [name for name in sorted(models) if self._fits(record, self._served.current(name))]

    def base_of(self, found: FoundAdapter) -> str:
        """The model to use an adapter with where none is named: its own, or the only one that it fits.

        Raises `AdapterRefused`, with the models there are to choose from.
        """
        record = found.record
        own = record.base_model
        if own in self._served.records and self._fits(record, self._served.current(own)):
            return own
        match self.bases(record):
            case [name]:
                return name
            case []:
                raise AdapterRefused(
                    "adapter_misfit",
                    f"no model here fits the adapter {record.name!r}; add the base model it was made for",
                )
            case names:
                shown = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
                raise AdapterRefused(
                    "bad_request",
                    f"the adapter {record.name!r} fits {len(names)} models ({shown}); name one of these as "
                    "the model, and it as an adapter",
                )

    def _fits(self, record: AdapterRecord, model: FoundModel) -> bool:
        shapes = tuple(component.signature for component in model.record.components)
        key = (record.content, shapes)
        if key not in self._misfits:
            if len(self._misfits) >= _KEPT_MISFITS:
                self._misfits.clear()
            try:
                self._misfits[key] = misfit(record, signatures_of(model))
            except StoreError:  # its store is away, and was never read whole
                return False
        return self._misfits[key] is None

    # -- what is changed ----------------------------------------------------------------------------

    def plans(self, model: FoundModel, adapters: Sequence[Adapter]) -> tuple[OverlayPlan, ...]:
        """What these adapters, in this order, change of a model. Raises `AdapterRefused`."""
        names = [adapter.name for adapter in adapters]
        applied = [AppliedAdapter(self.find(adapter.name).record, adapter.scale) for adapter in adapters]
        shapes = tuple((c.name, c.signature) for c in model.record.components)
        key = (shapes, *((a.record.content, a.scale) for a in applied))
        if len(set(names)) == len(names) and key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        try:
            plans = plan_overlays(signatures_of(model), applied)
        except StoreError as error:
            is_misfit = error.code is StoreErrorCode.ADAPTER_MISFIT
            raise AdapterRefused("adapter_misfit" if is_misfit else "load_failed", error.message) from error
        self._plans[key] = plans
        while len(self._plans) > _KEPT_PLANS:
            self._plans.popitem(last=False)
        return plans


def signatures_of(model: FoundModel) -> Mapping[str, SignatureRecord]:
    """A model's components by name, which its home read when it was looked at. Raises `StoreError`."""
    return {c.name: model.home.signature(c.signature) for c in model.record.components}
