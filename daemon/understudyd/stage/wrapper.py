"""The pipeline object: one per request, around shared skeletons.

`from_pretrained` loads the parts and calls the pipeline's constructor; so does this, with parts that are
at hand already, which takes a millisecond.
"""

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudyd.stage.batching import can_share
from understudyd.stage.calls import CallFacts, read_call
from understudyd.stage.classes import resolve
from understudyd.stage.errors import BadRequest, UnknownClass
from understudyd.stage.overlays import Overlay
from understudyd.stage.parts import PartShelf, is_scheduler
from understudyd.stage.schedulers import other_scheduler, own_scheduler
from understudyd.stage.skeleton import Skeleton
from understudyd.stage.tasks import (
    constructor_arguments,
    fits_unet,
    is_task,
    missing_components,
    needed_images,
    task_classes,
    wanted_task,
)
from understudyd.stage.views import ResidentBlobs
from understudyd.store.records import ModelRecord

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a prepared model: where its weights are and what they are bound to.

    With an `overlay`, that one's weights come in place of some of the blob's.
    """

    name: str
    blob: str
    skeleton: Skeleton
    overlay: Overlay | None = None

    def bind(self, resident: ResidentBlobs) -> bool:
        """Bind what is resident; False when it is bound already. Raises `NotResident`."""
        base = resident.views(self.blob, self.skeleton.signature)
        if self.overlay is None:
            return self.skeleton.bind(base)
        return self.skeleton.bind(base, resident.views(self.overlay.key, self.overlay.layout))


@dataclass(frozen=True, slots=True)
class ServedTask:
    """One pipeline class over the components of a model.

    `call` says what the pipeline's `__call__` takes and gives. `names` are the constructor's arguments,
    `defaults` those of them that the model does not have. `images` are the inputs that it takes,
    `needed_images` those it must have. `rewrites_configs`: the constructor changes its components' configs,
    so it may only be called by the holder of the baton.
    """

    pipeline_class: type[Any]
    call: CallFacts
    names: frozenset[str]
    defaults: Mapping[str, Any]
    images: tuple[str, ...]
    needed_images: tuple[str, ...]
    rewrites_configs: bool


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Everything a request of this model needs except weights.

    `own` is the pipeline that the model was saved as, `tasks` what else its components can do, by name.
    """

    name: str
    components: tuple[Component, ...]
    parts: Mapping[str, Any]
    arguments: Mapping[str, Any]
    own: ServedTask
    tasks: Mapping[str, ServedTask]

    @property
    def can_batch(self) -> bool:
        """One call can serve several requests, whichever of the tasks that need no images they are for."""
        served = (self.own, *self.tasks.values())
        return all(can_share(task.call) for task in served if not task.needed_images)

    def task_for(self, task: str | None, inputs: Collection[str]) -> ServedTask:
        """The pipeline for a request with inputs of these names. Raises `BadRequest`.

        Without a task it is the model's own, unless that takes no such inputs and another one does.
        """
        if task is None:
            fits = set(inputs) <= set(self.own.images)
            return self.own if fits else self.tasks.get(wanted_task(inputs) or "", self.own)
        found = self.tasks.get(task)
        if found is None:
            can = (
                f"it can do {', '.join(self.tasks)}"
                if self.tasks
                else "leave the task out for its own pipeline"
            )
            why = f"{self.name} cannot do {task}" if is_task(task) else f"task {task!r:.40} is unknown"
            raise BadRequest(f"{why}; {can}")
        return found

    def open_pipeline(self, task: ServedTask, scheduler: str | None = None) -> tuple[Any, list[Any]]:
        """A pipeline of one's own, and the schedulers in it, over the shared components.

        `scheduler` names the class that replaces the model's own. Raises `BadRequest` if that does not fit.
        """
        parts = {name: own_scheduler(p) if is_scheduler(p) else p for name, p in self.parts.items()}
        if scheduler is not None:
            if "scheduler" not in parts:
                raise BadRequest(f"{self.name} has no scheduler to replace; leave the scheduler out")
            parts["scheduler"] = other_scheduler(self.parts["scheduler"], scheduler)
        modules = {component.name: component.skeleton.module for component in self.components}
        given = {**task.defaults, **self.arguments, **parts, **modules}
        pipeline = _construct(task.pipeline_class, {name: given[name] for name in task.names})
        return pipeline, [part for part in parts.values() if is_scheduler(part)]


def prepare(
    record: ModelRecord,
    folder: Path,
    skeletons: Mapping[str, Skeleton],
    shelf: PartShelf,
    device: torch.device,
) -> PreparedModel:
    """Assemble a model from skeletons by component and parts from its folder; tries each constructor once.

    Raises whatever the libraries raise about a folder or class they do not accept.
    """
    parts = shelf.parts(record, folder)
    arguments = {**dict.fromkeys(record.absent), **record.init_kwargs}
    components = tuple(Component(c.name, c.blob.sha256, skeletons[c.name]) for c in record.components)
    given = {**arguments, **parts, **{c.name: c.skeleton.module for c in components}}
    own = _serve(resolve("diffusers", record.pipeline_class), given, device)
    tasks = {}
    for task, pipeline_class in task_classes(record.pipeline_class).items():
        if pipeline_class.__name__ == record.pipeline_class:
            tasks[task] = own
        elif not missing_components(pipeline_class, given.keys() - set(record.absent)) and fits_unet(
            task, given
        ):
            tasks[task] = _serve(pipeline_class, given, device)
    return PreparedModel(record.name, components, parts, arguments, own, tasks)


def _serve(base: type[Any], given: Mapping[str, Any], device: torch.device) -> ServedTask:
    served = _served_class(base, device)
    arguments = constructor_arguments(base, given)
    call = read_call(base)
    adapters = () if given.get("image_encoder") is not None else ("ip_adapter", "negative_ip_adapter")
    images = tuple(name for name in call.image_names if not name.startswith(adapters))
    demanded = (name for name in images if call.keywords[name].is_required)
    return ServedTask(
        pipeline_class=served,
        call=call,
        names=frozenset(arguments),
        defaults={name: value for name, value in arguments.items() if name not in given},
        images=images,
        needed_images=tuple(dict.fromkeys([*needed_images(base.__name__, images), *demanded])),
        rewrites_configs=_rewrites_configs(served, arguments),
    )


def _served_class(base: type[Any], device: torch.device) -> type[Any]:
    """The pipeline's class, told its device.

    Asked for it, a pipeline looks through every submodule for offloading hooks (11 ms for SDXL, in each
    request), or at the parameters, which are not bound yet while the request waits.
    """
    if not hasattr(base, "register_modules"):
        raise UnknownClass(f"{base.__module__}.{base.__name__} is not a pipeline")
    told = {"_execution_device": device, "device": device, "__module__": base.__module__}
    return type(base.__name__, (base,), told)


def _construct(pipeline_class: type[Any], arguments: Mapping[str, Any]) -> Any:
    pipeline = pipeline_class(**arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _rewrites_configs(pipeline_class: type[Any], arguments: Mapping[str, Any]) -> bool:
    """Call the constructor on shallow copies, which share tensors but not configs, and compare."""
    copies = {name: copy.copy(part) for name, part in arguments.items() if isinstance(part, nn.Module)}
    before = {name: vars(module).get("_internal_dict") for name, module in copies.items()}
    parts = {name: own_scheduler(p) if is_scheduler(p) else p for name, p in arguments.items()}
    _construct(pipeline_class, {**parts, **copies})
    return any(vars(module).get("_internal_dict") is not before[name] for name, module in copies.items())
