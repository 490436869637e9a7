"""Custom pipeline classes in the daemon: started once, asked for components once per signature."""

import copy
from collections.abc import Callable
from typing import Any

from understudyd.pipelines import CustomPipeline
from understudyd.pipelines.installed import GROUP, PipelineUnavailable, blamed_on, find_installed
from understudyd.stage.errors import SkeletonMismatch
from understudyd.store.records import ModelRecord, SignatureRecord

_RESTART = "repair it and restart the daemon"


class CustomClasses:
    """The classes that this process has started. Not thread-safe: only the preparing thread calls it."""

    def __init__(self) -> None:
        self._started: dict[str, type[CustomPipeline] | str] = {}  # a text says why it could not be

    def start(self, name: str) -> type[CustomPipeline]:
        """The class, its `on_startup` behind it. Raises `PipelineUnavailable`, each time after a failure."""
        if name not in self._started:
            try:
                self._started[name] = _start(name)
            except PipelineUnavailable as error:
                self._started[name] = str(error)
        found = self._started[name]
        if isinstance(found, str):
            raise PipelineUnavailable(found)
        return found


def _start(name: str) -> type[CustomPipeline]:
    installed = find_installed(name)
    found = installed.load()
    with blamed_on(f"on_startup of {installed} failed", _RESTART):
        found.on_startup()
    return found


def is_custom(record: ModelRecord | SignatureRecord) -> bool:
    """Whether it is of an installed class, not of the libraries."""
    return (record.pipeline_library if isinstance(record, ModelRecord) else record.library) == GROUP


def custom_builder(signature: SignatureRecord) -> Callable[[], Any]:
    """What makes the module of a custom component. Raises `PipelineUnavailable`.

    The builder raises `SkeletonMismatch` where the class has no such component any more, and whatever the
    class raises.
    """
    name, _, component = signature.class_name.partition(":")
    pipeline_class = find_installed(name).load()

    def build() -> Any:
        builders = pipeline_class.components(copy.deepcopy(signature.config))
        if component not in builders:
            raise SkeletonMismatch(f"{name} has no component {component} any more; add the model again")
        return builders[component]()

    return build
