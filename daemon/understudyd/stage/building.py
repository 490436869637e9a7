"""Building a component's bare module from its signature, without memory for its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from understudyd.stage.classes import resolve
from understudyd.stage.custom_classes import custom_builder, is_custom
from understudyd.stage.errors import SkeletonMismatch
from understudyd.stage.views import dtype_of
from understudyd.store.records import SignatureRecord

_WITHOUT_VALUES = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.rand,
        torch.rand_like,
        torch.randn,
        torch.randn_like,
        torch.randint,
        torch.normal,
    }
)


class WeightlessMode(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
    """Uninitialised and random tensors, the weights-to-be, are meta tensors; all else is computed on the CPU.

    Slower than `torch.device("meta")` and with memory for the small tables, but constructors may read the
    numbers they compute: `torch.linspace(...).tolist()`. Holds for the calling thread only.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send what has no values yet to the meta device."""
        options = dict(kwargs or {})
        if func in _WITHOUT_VALUES:
            options["device"] = "meta"
            options.pop("generator", None)
        return func(*args, **options)


def build_module(signature: SignatureRecord) -> nn.Module:
    """The module in eval mode, its weights on the meta device, without gradients.

    Raises `SkeletonMismatch` for a class that is no module, and whatever its constructor raises.
    """
    construct = _constructor(signature)
    try:
        with torch.device("meta"):
            module = construct()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        # The constructor wanted a number out of a tensor without any. Another cause shows again here.
        with WeightlessMode():
            module = construct()
    if not isinstance(module, nn.Module):
        raise SkeletonMismatch(f"{signature.library}.{signature.class_name} is no torch module")
    return module.eval().requires_grad_(False)


def _constructor(signature: SignatureRecord) -> Callable[[], Any]:
    if is_custom(signature):
        return custom_builder(signature)
    return partial(_construct, resolve(signature.library, signature.class_name), signature)


def _construct(component_class: type[Any], signature: SignatureRecord) -> Any:
    config = dict(signature.config)
    if hasattr(component_class, "from_config"):
        return component_class.from_config(config)
    return _construct_transformer(component_class, config, signature)


def _construct_transformer(model_class: type[Any], values: dict[str, Any], signature: SignatureRecord) -> Any:
    """A transformers model. `dtype=None`: naming one would set torch's default dtype process-wide."""
    config = model_class.config_class.from_dict(values)
    attn = signature.attn_implementation
    options = {} if attn is None else {"attn_implementation": attn}
    module = model_class._from_config(config, dtype=None, **options)
    dtype = next((dtype_of(record) for record in signature.tensors if record.kind == "parameter"), None)
    for owner in (config, *(getattr(config, key) for key in config.sub_configs)):
        if owner is not None:
            owner.dtype = dtype
    return module
