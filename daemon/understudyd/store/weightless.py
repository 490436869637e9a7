"""Building modules without memory for their weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


def build_weightless(construct: Callable[[], Any]) -> Any:
    """What `construct` makes, its weights on the meta device. Raises whatever it raises."""
    try:
        with torch.device("meta"):
            return construct()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        # The constructor wanted a number out of a tensor without any. Another cause shows again here.
        with WeightlessMode():
            return construct()


def construct_from_config(
    component_class: Any, config: dict[str, Any], attn_implementation: str | None
) -> Any:
    """A module of diffusers or transformers, as its record's config describes it.

    `dtype=None`: naming one would set torch's default dtype process-wide.
    """
    if hasattr(component_class, "from_config"):
        return component_class.from_config(dict(config))
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    made = component_class.config_class.from_dict(dict(config))
    return component_class._from_config(made, dtype=None, **options)
