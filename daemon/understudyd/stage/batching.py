"""One pipeline call for several requests: its keyword arguments, and whose picture is whose.

Which pipelines can is read from their signatures: one that makes images, and whose prompts and generator may
be lists, one item an image. Each request has a generator of its own, seeded as when it runs alone, so its
noise is the same, bit for bit. What is computed from it may differ in the last bits: products of larger
matrices are summed in another order.
"""

import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from understudyd.stage.calls import CallFacts, alternatives
from understudyd.stage.errors import StageError
from understudyd.stage.keywords import BATCHES
from understudyd.stage.pictures import Made

_TEXTS = ("prompt", "negative_prompt")


def can_share(call: CallFacts) -> bool:
    """One call can serve several requests."""
    optional = "negative_prompt" not in call.keywords or _takes_list(call, "negative_prompt", str)
    return (
        not call.gives_video
        and optional
        and _takes_list(call, "prompt", str)
        and _takes_list(call, "generator", torch.Generator)
    )


def _takes_list(call: CallFacts, name: str, item: type[Any]) -> bool:
    keyword = call.keywords.get(name)
    return keyword is not None and any(
        typing.get_origin(kind) is list and typing.get_args(kind) == (item,)
        for kind in alternatives(keyword.kind)
    )


def shared_arguments(each: Sequence[Mapping[str, Any]], images: Sequence[int]) -> dict[str, Any]:
    """From every request's own arguments, and how many images it wants, to those of one call.

    Texts and generators become lists with one item an image. Raises `StageError` if the rest is not equal.
    """
    rest = _settings(each[0])
    if any(_settings(other) != rest for other in each):
        raise StageError("requests with different settings cannot share a run")
    shared = {name: value for name, value in rest.items() if value is not _LISTED}
    for name in rest.keys() - shared.keys():
        shared[name] = [own[name] for own, count in zip(each, images, strict=True) for _ in range(count)]
    return shared


_LISTED = object()


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree: all values but those that each request has an item of."""
    return {
        name: _LISTED if _is_listed(name, value) else value
        for name, value in arguments.items()
        if name not in BATCHES
    }


def _is_listed(name: str, value: Any) -> bool:
    return name == "generator" or (name.startswith(_TEXTS) and isinstance(value, str))


def split(made: Made, images: Sequence[int]) -> list[Made]:
    """Each request's part, in order. Raises `StageError` when the pipeline made another number of images."""
    value = made.value
    if not isinstance(value, Tensor | np.ndarray | list | tuple) or len(value) != sum(images):
        count = len(value) if hasattr(value, "__len__") else 1
        raise StageError(f"the pipeline made {count} images for {sum(images)}")
    parts, begin = [], 0
    for count in images:
        parts.append(replace(made, value=value[begin : begin + count]))
        begin += count
    return parts
