"""Which models there are: added, replaced while they are used, removed.

A name stands for one edition at a time. An edition that was replaced or removed is alive until nobody uses
it: its leases have ended and it is not being prepared. One that is to take over is *coming* while its small
parts are built, so that no request waits for them; the old one serves meanwhile.

Of derived models there could be more than anybody counts, one for each combination that was ever asked for:
those that nobody uses and that were not asked for the longest are *surplus*.
"""

from collections import OrderedDict
from collections.abc import Iterator, Set

from understudyd.core.actions import (
    Action,
    AdoptEdition,
    ForgetModel,
    RejectEdition,
    RetireEdition,
    RetireModel,
)
from understudyd.core.entities import Model
from understudyd.core.policy import Policy
from understudyd.core.residency import Residency
from understudyd.core.states import PARTS_TABLE, BlobState, IllegalEvent, Lifecycle, PartsState
from understudyd.core.types import BlobInfo, ModelInfo


class Catalogue:
    """`editions` are those that are alive, by key; `coming` those that are to take over, by name.

    `derived` are derived models by name, who was asked for last comes last; kept are `max_derived` of them.
    """

    def __init__(self, residency: Residency, policy: Policy, actions: list[Action], max_derived: int) -> None:
        self.editions: dict[str, Model] = {}
        self.coming: dict[str, Model] = {}
        self.derived: OrderedDict[str, Model] = OrderedDict()
        self._max_derived = max_derived
        self._residency = residency
        self._policy = policy
        self._actions = actions

    def is_current(self, model: Model) -> bool:
        """Its name stands for it."""
        return self._residency.models.get(model.name) is model

    def served(self, name: str) -> Model:
        """The model that may be asked for under this name. Raises `IllegalEvent`."""
        model = self._residency.models.get(name)
        if model is None or model.retiring:
            raise IllegalEvent(f"no model {name!r}")
        return model

    # -- coming -------------------------------------------------------------------------------------

    def add(self, info: ModelInfo, now_s: float) -> None:
        """A model that may be asked for. Its blobs are shared with every model that has the same."""
        if info.name in self._residency.models:
            raise IllegalEvent(f"model {info.name} exists already")
        self._check(info)
        model = self._edition(info)
        self._residency.models[info.name] = model
        self._take_blobs(model, now_s)
        self.asked(model)

    def asked(self, model: Model) -> None:
        """Somebody has asked for it: it is the last derived model to go."""
        if model.info.is_derived:
            self.derived[model.name] = model
            self.derived.move_to_end(model.name)

    def surplus(self, awaited: Set[str]) -> Iterator[Model]:
        """Derived models that can be removed and should be. All but the last one, which has just come."""
        for model in list(self.derived.values())[:-1]:
            if len(self.derived) <= self._max_derived:
                return
            is_preparing = model.parts.state is PartsState.PREPARING
            is_used = model.leases or model.retiring or is_preparing or model.name in awaited
            if not is_used and model.name not in self._residency.pinned:
                yield model

    def replace(self, info: ModelInfo, now_s: float) -> None:
        """Another edition, which takes over at once unless the old one can serve until it is prepared."""
        current = self.served(info.name)
        self._check(info)
        self._drop_coming(info.name, now_s)
        model = self._edition(info)
        if current.parts.state is PartsState.PREPARED and not current.is_unfit:
            self.coming[info.name] = model
            self._residency.prepare(model, now_s)
        else:
            self._adopt(model, now_s)

    def _check(self, info: ModelInfo) -> None:
        if info.key in self.editions:
            raise IllegalEvent(f"edition {info.key} is alive already")
        blobs = self._residency.blobs
        known = {blob.key: blob for model in self.coming.values() for blob in _with_sources(model.info)}
        known |= {blob.key: blobs[blob.key].info for blob in _with_sources(info) if blob.key in blobs}
        for blob in _with_sources(info):
            if known.get(blob.key, blob) != blob:
                raise IllegalEvent(f"blob {blob.key[:12]} of {info.name} has another size than before")
            if blob.made_of and blob.made_of[0] not in info.blobs:
                raise IllegalEvent(f"{info.name} has no component for its overlay {blob.key[:12]}")
            if len({source.key for source in blob.made_of}) < len(blob.made_of):
                raise IllegalEvent(f"overlay {blob.key[:12]} of {info.name} is made of one blob twice")

    def _edition(self, info: ModelInfo) -> Model:
        """An edition without blobs: they count as the name's only once it has taken over."""
        parts = Lifecycle(f"parts of {info.key}", PartsState.UNPREPARED, PARTS_TABLE)
        model = self.editions[info.key] = Model(info, (), parts, max_batch=info.max_batch)
        return model

    def _take_blobs(self, model: Model, now_s: float) -> None:
        model.blobs = tuple(self._residency.blob(blob) for blob in model.info.blobs)
        overlays = [blob for blob in model.blobs if blob.is_overlay]
        for overlay in overlays:
            overlay.sources = tuple(map(self._residency.blob, overlay.info.made_of))
            for adapter in overlay.sources[1:]:
                adapter.overlays[overlay.key] = overlay
        model.adapters = tuple(dict.fromkeys(blob for overlay in overlays for blob in overlay.sources[1:]))
        self._residency.evictables.mark(model.all_blobs)
        for blob in model.all_blobs:
            blob.models.add(model.name)
            if blob.state is BlobState.DAMAGED:
                blob.life.to(BlobState.ABSENT, now_s, f"{model.key} was added anew")

    def _adopt(self, model: Model, now_s: float) -> None:
        """The name stands for this edition; the old one retires."""
        residency, name = self._residency, model.name
        old = residency.models[name]
        residency.models[name] = model
        self.derived.pop(name, None)
        self.asked(model)
        residency.no_longer_ready(name)
        if name in residency.pinned:
            residency.pinned[name] = model
        self._take_blobs(model, now_s)
        for blob in model.all_blobs:
            residency.retries.start_anew(blob)
        self._actions.append(AdoptEdition(name, model.key))
        self._policy.replaced(model)
        residency.evictables.mark(old.all_blobs)
        for blob in (blob for blob in old.all_blobs if blob not in model.all_blobs):
            blob.models.discard(name)
            if not blob.models:
                residency.abandon(blob, now_s)
        residency.changes += 1
        residency.replacements += 1
        residency.note_ready([model])
        old.retiring = True
        self.retire_if_unused(old, now_s)

    def set_max_batch(self, name: str, max_batch: int) -> None:
        """For the edition that serves and for one that is coming. Raises `IllegalEvent`."""
        for model in (self.served(name), self.coming.get(name)):
            if model is not None:
                model.max_batch = max_batch

    # -- preparing ----------------------------------------------------------------------------------

    def preparing(self, key: str) -> Model:
        """The edition that is being prepared. Raises `IllegalEvent`."""
        model = self.editions.get(key)
        if model is None:
            raise IllegalEvent(f"no model {key!r} is being prepared")
        model.parts.require(PartsState.PREPARING)
        return model

    def prepared(self, model: Model, can_batch: bool, now_s: float) -> None:
        """The edition's small parts are at hand: one that was coming takes over."""
        model.can_batch = can_batch
        model.parts.to(PartsState.PREPARED, now_s)
        model.was_out_of_reach = False
        if self.coming.get(model.name) is model:
            del self.coming[model.name]
            self._adopt(model, now_s)
        elif self.is_current(model):
            self._residency.note_ready([model])
        self.retire_if_unused(model, now_s)

    def preparation_failed(self, model: Model, message: str, is_lasting: bool, now_s: float) -> None:
        """The edition cannot be used, for ever or for now; one that was coming is given up."""
        model.parts.to(PartsState.BROKEN if is_lasting else PartsState.UNPREPARED, now_s, message)
        model.was_out_of_reach = not is_lasting
        if self.coming.get(model.name) is model:
            del self.coming[model.name]
            model.retiring = True
            self._actions.append(RejectEdition(model.name, model.key, message))
        self.retire_if_unused(model, now_s)

    # -- going --------------------------------------------------------------------------------------

    def remove(self, model: Model, now_s: float) -> None:
        """The name stands for nothing once its last user is gone."""
        self._drop_coming(model.name, now_s)
        model.retiring = True
        self.retire_if_unused(model, now_s)

    def _drop_coming(self, name: str, now_s: float) -> None:
        model = self.coming.pop(name, None)
        if model is not None:
            model.retiring = True
            self.retire_if_unused(model, now_s)

    def retire_if_unused(self, model: Model, now_s: float) -> None:
        """Let go of a retiring edition nobody uses; blobs that no model is left for leave the arena."""
        if not model.retiring or model.leases or model.parts.state is PartsState.PREPARING:
            return
        del self.editions[model.key]
        if self.is_current(model):
            self._retire_name(model, now_s)
        else:
            self._policy.forget_blobs(model)
            self._actions += [ForgetModel(model.key), RetireEdition(model.name, model.key)]

    def _retire_name(self, model: Model, now_s: float) -> None:
        del self._residency.models[model.name]
        self.derived.pop(model.name, None)
        self._residency.no_longer_ready(model.name)
        self._residency.evictables.mark(model.all_blobs)
        for blob in model.all_blobs:
            blob.models.discard(model.name)
            if not blob.models:
                self._residency.abandon(blob, now_s)
        self._policy.forget(model)
        self._actions += [ForgetModel(model.key), RetireModel(model.name)]


def _with_sources(info: ModelInfo) -> Iterator[BlobInfo]:
    """Its blobs, and what overlays among them are made of."""
    for blob in info.blobs:
        yield from (blob, *blob.made_of)
