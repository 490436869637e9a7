"""Which pipeline classes do which task over the components of one model.

Diffusers keeps the relation in the tables of its auto pipelines: classes of one family share a key, and a
key ends in "-controlnet" where the family's classes take one.
"""

import functools
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from diffusers.pipelines import auto_pipeline

TEXT_TO_IMAGE = "text-to-image"
IMAGE_TO_IMAGE = "image-to-image"
INPAINTING = "inpainting"
WITH_CONTROLNET = "-controlnet"

_TABLES: Mapping[str, Mapping[str, type[Any]]] = {
    TEXT_TO_IMAGE: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    IMAGE_TO_IMAGE: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    INPAINTING: auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
_NEEDS: Mapping[str, tuple[str, ...]] = {
    TEXT_TO_IMAGE: (),
    IMAGE_TO_IMAGE: ("image",),
    INPAINTING: ("image", "mask_image"),
}
_CONTROLNET = re.compile(r"-controlnet(-union|-inpaint)?")


def is_task(name: str) -> bool:
    """Whether the protocol knows the task; a model may still lack what it takes."""
    return name.removesuffix(WITH_CONTROLNET) in _TABLES


@functools.cache
def task_classes(pipeline_class: str) -> Mapping[str, type[Any]]:
    """The classes by task, for a model that was saved as this class; empty for a class without a family."""
    family = next(
        (key for table in _TABLES.values() for key in table if _is(table[key], pipeline_class)), None
    )
    if family is None:
        return {}
    plain = _CONTROLNET.sub("", family)
    found = {}
    for task, table in _TABLES.items():
        if plain in table:
            found[task] = table[plain]
        if family != plain and family in table:
            found[task + WITH_CONTROLNET] = table[family]
    return found


def needed_images(pipeline_class: str, taken: Collection[str]) -> tuple[str, ...]:
    """Of the inputs taken, those without which a class of the tables has nothing to do.

    Signatures do not tell: there every image is optional.
    """
    places = (
        (task, key)
        for task, table in _TABLES.items()
        for key, each in table.items()
        if _is(each, pipeline_class)
    )
    task, key = next(places, (TEXT_TO_IMAGE, ""))
    needed = _NEEDS[task]
    if _CONTROLNET.search(key):
        needed = (*needed, "control_image" if "control_image" in taken else "image")
    return tuple(name for name in needed if name in taken)


def missing_components(pipeline_class: type[Any], given: Collection[str]) -> list[str]:
    """What the constructor demands and the model does not have."""
    return [
        name
        for name, parameter in _constructor(pipeline_class).items()
        if parameter.default is parameter.empty
        and name not in given
        and name not in _optional(pipeline_class)
    ]


def constructor_arguments(pipeline_class: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is given, what the constructor takes; optional components that are not given are None."""
    names = _constructor(pipeline_class)
    left_out = (
        name for name, p in names.items() if p.default is p.empty and name in _optional(pipeline_class)
    )
    return {**dict.fromkeys(left_out), **{name: value for name, value in given.items() if name in names}}


def fits_unet(task: str, given: Mapping[str, Any]) -> bool:
    """A UNet made for inpainting takes mask and masked image beside the latents: no other task has these."""
    unet, vae = given.get("unet"), given.get("vae")
    if task.startswith(INPAINTING) or unet is None or vae is None:
        return True
    made_for, latent = unet.config.get("in_channels"), vae.config.get("latent_channels")
    return made_for is None or latent is None or bool(made_for == latent)


def wanted_task(names: Collection[str]) -> str | None:
    """The task that these input names tell of."""
    suffix = WITH_CONTROLNET if "control_image" in names else ""
    if "mask_image" in names:
        return INPAINTING + suffix
    return IMAGE_TO_IMAGE + suffix if "image" in names else None


def what_to_send(task: str) -> str:
    """The input images that make a request one for this task, in words."""
    words = ["an image", "a mask"][: len(_NEEDS[task.removesuffix(WITH_CONTROLNET)])]
    if task.endswith(WITH_CONTROLNET):
        words.append("a control image")
    return " and ".join(words) or "no image"


def _is(pipeline_class: type[Any], name: str) -> bool:
    return pipeline_class.__name__ == name


def _optional(pipeline_class: type[Any]) -> Collection[str]:
    optional: Collection[str] = pipeline_class._optional_components
    return optional


def _constructor(pipeline_class: type[Any]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(pipeline_class.__init__).parameters)
    parameters.pop("self", None)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in parameters.items() if p.kind not in kinds}
