"""Reading a LoRA the way diffusers does: its own loader, run on a base without weights.

The many formats (kohya, A1111 and Civitai names, diffusers old and new, PEFT) are told apart and converted
by the `lora_state_dict` of the base's pipeline, and which rank and alpha a layer gets is read off the
layers that its `load_lora_weights` injects: alphas, rank and alpha patterns and their matching rules are
the library's, and so are its surprises. What reaches the layers is checked against the base weight by
weight.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from understudyd.store.adapters.bases import Base
from understudyd.store.adapters.records import TargetKind
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.pretrained import quiet_libraries
from understudyd.store.records import SignatureRecord
from understudyd.store.signature import dtype_name

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_NAME = "adapter"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class ConvertedTarget:
    """A weight of the base and what changes it; the fields are those of `TargetRecord`."""

    component: str
    module_path: str
    kind: TargetKind
    shape: tuple[int, ...]
    alpha: float
    alpha_dtype: str | None
    is_rank_stabilised: bool
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return int(self.down.shape[0])


Factors = dict[tuple[str, str], dict[str, Tensor]]
"""`{(component, module path): {".lora_A.weight": A, ".lora_B.weight": B}}`"""


def convert(path: Path, base: Base) -> list[ConvertedTarget]:
    """Everything that the LoRA at `path` changes in `base`, in the order of the base's weights.

    Raises `StoreError`: `adapter_misfit` names the first weight that does not fit, `not_plain_lora` and
    `corrupt_source` say what is wrong with the file.
    """
    with _translated(path):
        modules = base.build()
    factors: Factors = {}

    def on_state(state: Mapping[str, Any]) -> None:
        factors.update(_factors(path, state, modules))
        _check(path, factors, base, modules)
        _check_finite(path, factors)

    with _translated(path), quiet_libraries():
        host = _host(base.family, modules, on_state)
        host.load_lora_weights(str(path), adapter_name=_NAME, use_safetensors=True, local_files_only=True)
    return sorted(
        _read_layers(path, factors, modules),
        key=lambda target: _order(base)[target.component, f"{target.module_path}.weight"],
    )


def _order(base: Base) -> dict[tuple[str, str], int]:
    paths = ((name, t.path) for name, signature in base.signatures.items() for t in signature.tensors)
    return {place: number for number, place in enumerate(paths)}


def _host(
    family: Any, modules: Mapping[str, nn.Module], on_state: Callable[[Mapping[str, Any]], None]
) -> Any:
    """A pipeline as far as its LoRA loader cares. `on_state` is shown the factors that it converted."""

    class Host(family):  # type: ignore[misc]
        """The loader with components."""

        hf_device_map = None

        def __init__(self) -> None:
            self.components = dict(modules)
            for name in family._lora_loadable_modules:
                setattr(self, name, modules.get(name))

        @classmethod
        def lora_state_dict(cls, *args: Any, **kwargs: Any) -> Any:
            found = super().lora_state_dict(*args, **kwargs)
            on_state(found[0] if isinstance(found, tuple) else found)
            return found

    return Host()


# -- what the library converted --------------------------------------------------------------------


def peft_names(keys: Mapping[str, Any], *, is_transformers: bool) -> dict[str, Any]:
    """The names that the library's loader gives to the factors of one component. Raises `ValueError`."""
    if is_transformers:
        return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(keys))))
    if keys and "lora_A" in next(iter(keys)):
        return dict(keys)
    return dict(convert_unet_state_dict_to_peft(dict(keys)))


def _factors(path: Path, state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Factors:
    factors: Factors = {}
    rest = dict(state)
    for name, module in modules.items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): rest.pop(k) for k in list(rest) if k.startswith(prefix)}
        if not own:
            continue
        named = peft_names(own, is_transformers=isinstance(module, PreTrainedModel))
        for key, tensor in named.items():
            module_path, end = _split(path, key)
            if isinstance(module, PreTrainedModel) and not hasattr(module, "text_model"):
                module_path = module_path.removeprefix("text_model.")  # as the loader does
            factors.setdefault((name, module_path), {})[end] = tensor
    if rest:
        key = next(iter(rest))
        raise _misfit(path, f"has {key!r:.100}, but the base has no such component")
    if not factors:
        raise _misfit(path, "changes nothing of this base")
    return factors


def _split(path: Path, key: str) -> tuple[str, str]:
    for end in (_DOWN, _UP):
        if key.endswith(end):
            return key.removesuffix(end), end
    raise StoreError(
        StoreErrorCode.NOT_PLAIN_LORA, f"{path.name} has {key!r:.100}, which is no factor of a LoRA"
    )


# -- against the base ------------------------------------------------------------------------------


def _check(path: Path, factors: Factors, base: Base, modules: Mapping[str, nn.Module]) -> None:
    tied = {name: _tied_weights(signature) for name, signature in base.signatures.items()}
    named = {name: dict(module.named_modules()) for name, module in modules.items()}
    for (component, module_path), pair in factors.items():
        where = f"{component}.{module_path}"
        layer = named[component].get(module_path)
        if layer is None:
            raise _misfit(path, f"changes {where}, which the base has not")
        if len(pair) != 2:
            raise StoreError(
                StoreErrorCode.CORRUPT_SOURCE,
                f"{path.name} has one factor of {where} only; download it again",
            )
        if kind_of(layer) is None:
            raise _misfit(
                path, f"changes {where}, a {type(layer).__name__}; linear and convolution layers only"
            )
        if getattr(layer, "groups", 1) != 1:
            raise _misfit(path, f"changes {where}, a convolution in groups, which cannot be folded")
        if f"{module_path}.weight" in tied[component]:
            raise _misfit(path, f"changes {where}, which is tied to another weight")
        _check_shapes(path, where, tuple(layer.weight.shape), pair[_DOWN], pair[_UP])


def kind_of(layer: nn.Module | None) -> TargetKind | None:
    """Whether a module is of a kind that PEFT merges here."""
    if isinstance(layer, nn.Linear):
        return "linear"
    return "conv" if isinstance(layer, _CONVOLUTIONS) else None


def _check_shapes(path: Path, where: str, weight: tuple[int, ...], down: Tensor, up: Tensor) -> None:
    rank = down.shape[0] if down.dim() else 0
    expected = ((rank, *weight[1:]), (weight[0], rank, *(1,) * (len(weight) - 2)))
    found = (tuple(down.shape), tuple(up.shape))
    if found != expected:
        raise _misfit(
            path,
            f"has factors of shapes {list(found[0])} and {list(found[1])} for {where}, whose weight of shape "
            f"{list(weight)} takes {list(expected[0])} and {list(expected[1])}",
        )


def _tied_weights(signature: SignatureRecord) -> frozenset[str]:
    """Paths that share their bytes with another."""
    ties = [record for record in signature.tensors if record.alias_of is not None]
    return frozenset(path for record in ties for path in (record.path, record.alias_of) if path)


def _check_finite(path: Path, factors: Factors) -> None:
    for (component, module_path), pair in factors.items():
        for end, tensor in pair.items():
            if not bool(torch.isfinite(tensor).all()):
                raise StoreError(
                    StoreErrorCode.CORRUPT_SOURCE,
                    f"{path.name} has numbers that are not finite in {component}.{module_path}{end}; its "
                    "training diverged or the file is damaged, get another version",
                )


# -- what the library would compute with -----------------------------------------------------------


def _read_layers(path: Path, factors: Factors, modules: Mapping[str, nn.Module]) -> Iterator[ConvertedTarget]:
    injected = {
        (name, module_path): layer
        for name, module in modules.items()
        for module_path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    if strangers := sorted(injected.keys() ^ factors.keys()):
        raise _misfit(path, f"is not taken whole by diffusers: {'.'.join(strangers[0])}")
    for (component, module_path), layer in injected.items():
        where = f"{component}.{module_path}"
        pair = factors[component, module_path]
        if layer.lora_variant.get(_NAME) is not None or layer.lora_bias[_NAME]:
            raise StoreError(StoreErrorCode.NOT_PLAIN_LORA, f"{path.name}: {where} is no plain LoRA")
        if layer.r[_NAME] != pair[_DOWN].shape[0]:
            raise _misfit(path, f"says rank {layer.r[_NAME]} of {where}, its factors {pair[_DOWN].shape[0]}")
        kind = kind_of(layer.get_base_layer())
        assert kind is not None  # checked before it was loaded
        alpha = layer.lora_alpha[_NAME]
        yield ConvertedTarget(
            component=component,
            module_path=module_path,
            kind=kind,
            shape=tuple(layer.get_base_layer().weight.shape),
            alpha=float(alpha),
            alpha_dtype=dtype_name(alpha.dtype) if isinstance(alpha, Tensor) else None,
            is_rank_stabilised=bool(layer.use_rslora.get(_NAME, False)),
            down=pair[_DOWN],
            up=pair[_UP],
        )


# -- errors ----------------------------------------------------------------------------------------


def _misfit(path: Path, why: str) -> StoreError:
    return StoreError(StoreErrorCode.ADAPTER_MISFIT, f"{path.name} {why}")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise about a file into `StoreError(adapter_misfit)`."""
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # the seam: conversion raises anything, from KeyError to AssertionError
        raise _misfit(
            path, f"cannot be read for this base ({type(error).__name__}: {str(error)[:300]})"
        ) from error
