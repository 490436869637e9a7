"""What an adapter may be for: the models of a store as diffusers' LoRA loaders see them."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import diffusers
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

from understudyd.store.adapters.records import BaseRecord, structure_id
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.records import ModelRecord, SignatureRecord
from understudyd.store.store import Store
from understudyd.store.weightless import build_weightless, construct_from_config


@dataclass(frozen=True)
class Base:
    """One structure that models of a store have: those in `models` differ in weights and dtypes only.

    `family` is diffusers' loader class, `signatures` those of the components that it may change, in order of
    first use.
    """

    family: Any
    signatures: Mapping[str, SignatureRecord]
    models: tuple[str, ...]

    @cached_property
    def records(self) -> tuple[BaseRecord, ...]:
        """The components as an adapter's record names them."""
        return tuple(
            BaseRecord(component=name, class_name=signature.class_name, structure=structure_id(signature))
            for name, signature in self.signatures.items()
        )

    def build(self) -> dict[str, nn.Module]:
        """The components, without weights. Raises whatever a constructor raises."""
        with quiet_libraries():
            return {name: build_weightless(_constructor(s)) for name, s in self.signatures.items()}


def loader_family(pipeline_class: str) -> Any | None:
    """Diffusers' LoRA loader class of a pipeline; None for a pipeline that takes no LoRAs."""
    cls = getattr(diffusers, pipeline_class, None)
    if not isinstance(cls, type):
        return None
    loaders = (c for c in cls.__mro__ if issubclass(c, LoraBaseMixin) and c is not LoraBaseMixin)
    return next((c for c in loaders if not issubclass(c, diffusers.DiffusionPipeline)), None)


def base_of(store: Store, record: ModelRecord) -> Base | None:
    """A model as a base; None if diffusers has no LoRAs for its pipeline. Raises `StoreError`."""
    family = loader_family(record.pipeline_class) if record.pipeline_library == "diffusers" else None
    if family is None:
        return None
    loadable = frozenset(family._lora_loadable_modules)  # the only place that says which
    signatures = {c.name: store.signature(c.signature) for c in record.components if c.name in loadable}
    return Base(family, signatures, (record.name,))


def find_bases(stores: Sequence[Store], name: str | None = None) -> list[Base]:
    """The bases among the stores' models, each structure once; or only that of the model `name`.

    Raises `StoreError`: there is no such model, or none that takes LoRAs.
    """
    found: dict[Any, Base] = {}
    for store, record in _records(stores, name):
        if (base := base_of(store, record)) is not None:
            key = (base.family, base.records)
            models = found[key].models if key in found else ()
            found[key] = Base(base.family, base.signatures, (*models, record.name))
    if not found:
        raise StoreError(
            StoreErrorCode.ADAPTER_MISFIT,
            f"{name} is of a pipeline that takes no LoRAs"
            if name is not None
            else "the store has no model that takes LoRAs; add the base model first",
        )
    return list(found.values())


def _records(stores: Sequence[Store], name: str | None) -> Iterator[tuple[Store, ModelRecord]]:
    """Every model, the first store's of each name; or the first of that name. Raises `StoreError`."""
    if name is not None:
        for store in stores[:-1]:
            with contextlib.suppress(StoreError):
                yield store, store.model(name)
                return
        yield stores[-1], stores[-1].model(name)
        return
    seen: set[str] = set()
    for store in stores:
        models = store.models()
        yield from ((store, record) for other, record in models.items() if other not in seen)
        seen |= models.keys()


def _constructor(signature: SignatureRecord) -> Any:
    try:
        cls = getattr(importlib.import_module(_library(signature)), signature.class_name)
    except (ImportError, AttributeError) as error:
        raise StoreError(
            StoreErrorCode.UNKNOWN_CLASS,
            f"{signature.library}.{signature.class_name} is not installed; upgrade {signature.library}",
        ) from error
    return partial(construct_from_config, cls, signature.config, signature.attn_implementation)


def _library(signature: SignatureRecord) -> str:
    """The module to import a component's class from; ingest has written no other."""
    library = signature.library
    if library in ("diffusers", "transformers") or library.startswith("diffusers.pipelines."):
        return library
    raise StoreError(StoreErrorCode.UNKNOWN_CLASS, f"{library!r:.80} is neither diffusers nor transformers")
