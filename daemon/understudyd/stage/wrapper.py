"""The pipeline object: one per request, around shared skeletons.

`from_pretrained` loads the parts and calls the pipeline's constructor; so does this, with parts that are
at hand already, which takes a millisecond.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudyd.stage.classes import resolve
from understudyd.stage.errors import UnknownClass
from understudyd.stage.parts import PartShelf, is_scheduler, own_scheduler
from understudyd.stage.skeleton import Skeleton
from understudyd.store.records import ModelRecord


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a prepared model: where its weights are and what they are bound to."""

    name: str
    blob: str
    skeleton: Skeleton


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Everything a request of this model needs except weights.

    `call_names` are the named arguments of the pipeline's `__call__`. `rewrites_configs`: its
    constructor changes its components' configs, so it may only be called by the holder of the baton.
    """

    name: str
    pipeline_class: type[Any]
    components: tuple[Component, ...]
    parts: Mapping[str, Any]
    arguments: Mapping[str, Any]
    call_names: frozenset[str]
    rewrites_configs: bool

    def open_pipeline(self) -> tuple[Any, list[Any]]:
        """A pipeline of one's own, and the schedulers in it, over the shared components."""
        parts = {name: own_scheduler(p) if is_scheduler(p) else p for name, p in self.parts.items()}
        modules = {component.name: component.skeleton.module for component in self.components}
        pipeline = _construct(self.pipeline_class, {**self.arguments, **parts, **modules})
        return pipeline, [part for part in parts.values() if is_scheduler(part)]


def prepare(
    record: ModelRecord,
    folder: Path,
    skeletons: Mapping[str, Skeleton],
    shelf: PartShelf,
    device: torch.device,
) -> PreparedModel:
    """Assemble a model from skeletons by component and parts from its folder; tries the constructor once.

    Raises whatever the libraries raise about a folder or class they do not accept.
    """
    pipeline_class = _served_class(record.pipeline_class, device)
    parts = shelf.parts(record, folder)
    arguments = {**dict.fromkeys(record.absent), **record.init_kwargs}
    components = tuple(Component(c.name, c.blob.sha256, skeletons[c.name]) for c in record.components)
    return PreparedModel(
        name=record.name,
        pipeline_class=pipeline_class,
        components=components,
        parts=parts,
        arguments=arguments,
        call_names=_call_names(pipeline_class),
        rewrites_configs=_rewrites_configs(pipeline_class, components, {**arguments, **parts}),
    )


def _served_class(name: str, device: torch.device) -> type[Any]:
    """The pipeline's class, told its device.

    Asked for it, a pipeline looks through every submodule for offloading hooks (11 ms for SDXL, in each
    request), or at the parameters, which are not bound yet while the request waits.
    """
    base = resolve("diffusers", name)
    if not hasattr(base, "register_modules"):
        raise UnknownClass(f"diffusers.{name} is not a pipeline")
    told = {"_execution_device": device, "device": device, "__module__": base.__module__}
    return type(base.__name__, (base,), told)


def _call_names(pipeline_class: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(pipeline_class.__call__).parameters) - {"self", "args", "kwargs"}


def _construct(pipeline_class: type[Any], arguments: Mapping[str, Any]) -> Any:
    pipeline = pipeline_class(**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _rewrites_configs(
    pipeline_class: type[Any], components: tuple[Component, ...], arguments: Mapping[str, Any]
) -> bool:
    """Call the constructor on shallow copies, which share tensors but not configs, and compare."""
    copies: dict[str, nn.Module] = {c.name: copy.copy(c.skeleton.module) for c in components}
    before = {name: vars(module).get("_internal_dict") for name, module in copies.items()}
    parts = {name: own_scheduler(p) if is_scheduler(p) else p for name, p in arguments.items()}
    _construct(pipeline_class, {**parts, **copies})
    return any(vars(module).get("_internal_dict") is not before[name] for name, module in copies.items())
