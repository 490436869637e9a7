"""The models that are prepared: what requests need of them besides weights.

A derived model is its base with overlays over some components: it shares skeletons, tokenizers and pipeline
classes, so that deriving one costs microseconds.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import torch

from understudyd.pipelines.installed import PipelineUnavailable
from understudyd.stage.compiling import Compiler
from understudyd.stage.custom import CustomModel, blaming, prepare_custom
from understudyd.stage.custom_classes import CustomClasses, is_custom
from understudyd.stage.errors import NotPrepared, StageError
from understudyd.stage.overlays import Overlay, OverlayLayouts
from understudyd.stage.parts import PartShelf
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.views import Layout
from understudyd.stage.wrapper import Component, PreparedModel, prepare
from understudyd.store.adapters.overlays import OverlaidComponent, OverlayPlan
from understudyd.store.records import ModelRecord, SignatureRecord

_log = logging.getLogger(__name__)

Prepared = PreparedModel | CustomModel


class ModelStore(Protocol):
    """What the stage reads of the store, from threads of its own."""

    def model(self, name: str) -> ModelRecord:
        """One model's record."""

    def models(self) -> dict[str, ModelRecord]:
        """Every model that is served; must be cheap."""

    def signature(self, signature_id: str) -> SignatureRecord:
        """A component's shape."""

    def model_folder(self, name: str) -> Path:
        """Where the small files are."""


class Repertoire:
    """Prepares models, on one thread; `find`, `layouts` and `learn` are for any thread."""

    def __init__(
        self,
        store: ModelStore,
        device: torch.device,
        on_touch: Callable[[], None],
        compiler: Compiler | None = None,
    ) -> None:
        """`on_touch` is what every skeleton calls before it computes. `compiler`, if any, compiles."""
        self._compiler = compiler
        self._store = store
        self._device = device
        self._on_touch = on_touch
        self._shelf = PartShelf()
        self._custom = CustomClasses()
        self._overlay_layouts = OverlayLayouts()
        self._skeletons: WeakValueDictionary[tuple[str, int], Skeleton] = WeakValueDictionary()
        self._prepared: dict[str, Prepared] = {}
        self._bases: dict[
            str, Prepared
        ] = {}  # of derived models, also where nobody prepared them for themselves
        self._base_of: dict[str, str] = {}
        self._layouts_of: dict[str, dict[str, Layout]] = {}  # by blob or overlay, then by id

    def start_custom_classes(self) -> None:
        """Import the installed classes that models of the store are of. One that fails is logged."""
        names = {model.pipeline_class for model in self._store.models().values() if is_custom(model)}
        for name in sorted(names):
            try:
                self._custom.start(name)
            except PipelineUnavailable as error:
                _log.error("no model of the pipeline %s can be served: %s", name, error)

    # -- models ------------------------------------------------------------------------------------

    def prepare(self, name: str) -> Prepared:
        """Read a model's folder and build what is not there yet. Raises anything that a library does."""
        self._prepared[name] = self._assemble(name)
        return self._prepared[name]

    def derive(self, name: str, base: str, overlays: Mapping[str, OverlaidComponent]) -> Prepared:
        """Prepare a model that is `base` with overlays by component. Prepares the base if it is not.

        Raises `StageError` for overlays of another base, and what `prepare` does.
        """
        plain = self._base(base)
        if strangers := overlays.keys() - {part.name for part in plain.components}:
            raise StageError(f"{base} has no {', '.join(sorted(strangers))} to lay an overlay over")
        components = tuple(self._overlaid(part, overlays.get(part.name)) for part in plain.components)
        self._bases[base], self._base_of[name] = plain, base
        self._prepared[name] = replace(plain, name=name, components=components)
        return self._prepared[name]

    def forget(self, name: str) -> None:
        """Drop the model's parts, and its skeletons if no other model uses them."""
        prepared = self._prepared.pop(name, None)
        for part in prepared.components if prepared is not None else ():
            self._layouts_of.pop(part.blob, None)  # found again, if another model has the blob
            if part.overlay is not None:
                self._layouts_of.pop(part.overlay.key, None)
        base = self._base_of.pop(name, None)
        if base is not None and base not in self._base_of.values():
            del self._bases[base]

    def find(self, name: str) -> Prepared:
        """A prepared model. Raises `NotPrepared`."""
        try:
            return self._prepared[name]
        except KeyError as error:
            raise NotPrepared(f"model {name} is not prepared") from error

    def tasks(self, name: str) -> list[str]:
        """What a request may name as the task of a prepared model; none for a custom pipeline."""
        prepared = self._prepared.get(name)
        return list(prepared.tasks) if isinstance(prepared, PreparedModel) else []

    def skeletons(self) -> list[Skeleton]:
        """Every skeleton alive."""
        return list(self._skeletons.values())

    # -- what lies in extents ----------------------------------------------------------------------

    def layouts(self, blob: str) -> list[Layout]:
        """What a blob or an overlay is used as; a load may finish before its model is prepared.

        Raises `StageError` if nobody is known to use it.
        """
        if blob not in self._layouts_of:
            for model in self._store.models().values():
                self._learn_signatures(model)
            for prepared in list(self._prepared.values()):
                self._learn_parts(prepared)
        known = self._layouts_of.get(blob)
        if known is None:
            raise StageError(f"no model of the store uses blob {blob[:12]}")
        return list(known.values())

    def learn(self, overlay: str, plan: OverlayPlan) -> None:
        """An overlay is being made that no derived model may have been prepared for yet."""
        self._learn(overlay, self._overlay_layouts.of(plan))

    def _learn(self, key: str, layout: Layout) -> None:
        self._layouts_of.setdefault(key, {})[layout.id] = layout

    def _learn_signatures(self, model: ModelRecord) -> None:
        for component in model.components:
            self._learn(component.blob.sha256, self._store.signature(component.signature))

    def _learn_parts(self, prepared: Prepared) -> None:
        for part in prepared.components:
            self._learn(part.blob, part.skeleton.signature)
            if part.overlay is not None:
                self._learn(part.overlay.key, part.overlay.layout)

    # -- assembling --------------------------------------------------------------------------------

    def _assemble(self, name: str) -> Prepared:
        model, folder = self._store.model(name), self._store.model_folder(name)
        self._learn_signatures(model)
        if not is_custom(model):
            return prepare(model, folder, self._skeletons_of(model), self._shelf, self._device)
        pipeline_class = self._custom.start(model.pipeline_class)
        with blaming(model.pipeline_class):
            return prepare_custom(model, folder, pipeline_class, self._skeletons_of(model), self._device)

    def _base(self, name: str) -> Prepared:
        return self._prepared.get(name) or self._bases.get(name) or self._assemble(name)

    def _overlaid(self, part: Component, given: OverlaidComponent | None) -> Component:
        if given is None:
            return part
        if given.base_blob != part.blob:
            raise StageError(f"an overlay over blob {given.base_blob[:12]} does not fit {part.blob[:12]}")
        layout = self._overlay_layouts.of(given.plan)
        part.skeleton.fit(layout)
        self._learn(given.key, layout)
        return replace(part, overlay=Overlay(given.key, layout))

    def _skeletons_of(self, model: ModelRecord) -> dict[str, Skeleton]:
        """By component. Two components of one signature need a skeleton each."""
        uses: Counter[str] = Counter()
        skeletons: dict[str, Skeleton] = {}
        for component in model.components:
            uses[component.signature] += 1
            skeletons[component.name] = self._skeleton(component.signature, uses[component.signature])
        return skeletons

    def _skeleton(self, signature_id: str, use: int) -> Skeleton:
        skeleton = self._skeletons.get((signature_id, use))
        if skeleton is None:
            opened = {} if self._compiler is None else {"compiled": self._compiler.open}
            skeleton = Skeleton(self._store.signature(signature_id), self._on_touch, self._device, **opened)
            self._skeletons[signature_id, use] = skeleton
        return skeleton
