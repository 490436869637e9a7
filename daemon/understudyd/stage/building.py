"""Building a component's bare module from its signature, without memory for its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from understudyd.stage.classes import resolve
from understudyd.stage.custom_classes import custom_builder, is_custom
from understudyd.stage.errors import SkeletonMismatch
from understudyd.stage.views import dtype_of
from understudyd.store.records import SignatureRecord
from understudyd.store.weightless import build_weightless, construct_from_config


def build_module(signature: SignatureRecord) -> nn.Module:
    """The module in eval mode, its weights on the meta device, without gradients.

    Raises `SkeletonMismatch` for a class that is no module, and whatever its constructor raises.
    """
    construct = _constructor(signature)
    module = build_weightless(construct)
    if not isinstance(module, nn.Module):
        raise SkeletonMismatch(f"{signature.library}.{signature.class_name} is no torch module")
    return module.eval().requires_grad_(False)


def _constructor(signature: SignatureRecord) -> Callable[[], Any]:
    if is_custom(signature):
        return custom_builder(signature)
    return partial(_construct, resolve(signature.library, signature.class_name), signature)


def _construct(component_class: type[Any], signature: SignatureRecord) -> Any:
    module = construct_from_config(component_class, signature.config, signature.attn_implementation)
    if not hasattr(component_class, "from_config"):
        _name_dtype(module.config, signature)
    return module


def _name_dtype(config: Any, signature: SignatureRecord) -> None:
    """A transformers config says which dtype its model is in."""
    dtype = next((dtype_of(record) for record in signature.tensors if record.kind == "parameter"), None)
    for owner in (config, *(getattr(config, key) for key in config.sub_configs)):
        if owner is not None:
            owner.dtype = dtype
