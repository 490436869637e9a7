"""Building a custom pipeline's components for real and filling them with their state dicts, on the CPU."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from understudyd.pipelines.installed import GROUP, PipelineUnavailable, blamed_on
from understudyd.store.custom import CustomPlan
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.signature import Component, Recipe, torch_dtype

_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LISTED = 3


class CustomComponents:
    """The components of a checked folder, one in memory at a time.

    Each is what its builder makes, with the state dict loaded strictly, in the dtypes of the files; with a
    `dtype` other than "keep", then cast by `module.to(dtype)`.
    """

    def __init__(self, plan: CustomPlan, dtype: str) -> None:
        """Imports the class. Raises `StoreError`."""
        self._plan = plan
        self._dtype = None if dtype == "keep" else torch_dtype(_DTYPES[dtype])
        with _translated():
            self._builders = _checked_builders(plan)
        if strangers := sorted(plan.weights.keys() - self._builders.keys()):
            raise StoreError(
                StoreErrorCode.UNSUPPORTED_SOURCE,
                f"the folder has weights of {_listed(strangers)}, but the components of {plan.pipeline} are "
                f"{', '.join(self._builders)}; rename or remove them",
            )

    def __iter__(self) -> Iterator[tuple[str, Component, int]]:
        """`(name, component, bytes of its weights)`. Raises `StoreError`."""
        for name in self._builders:
            yield name, self._component(name), self._plan.component_bytes.get(name, 0)

    def _component(self, name: str) -> Component:
        with _translated(), blamed_on(f"{self._plan.pipeline} cannot build {name}", "repair its builder"):
            module = self._builders[name]()
        if not isinstance(module, nn.Module):
            raise _failed(f"{self._plan.pipeline}: the builder of {name} makes a {type(module).__name__}")
        _refuse_hidden(module, name)
        _load(module, name, self._state(name))
        if self._dtype is not None:
            module.to(self._dtype)
        recipe = Recipe(
            library=GROUP, class_name=f"{self._plan.pipeline.name}:{name}", config=self._plan.config
        )
        return Component(name, module.eval().requires_grad_(False), recipe)

    def _state(self, name: str) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for path in self._plan.weights.get(name, ()):
            part = load_file(path)
            if twice := sorted(state.keys() & part.keys()):
                raise _corrupt(f"{name}: {_listed(twice)} in more than one file; keep one of them")
            state |= part
        return state


def _checked_builders(plan: CustomPlan) -> Mapping[str, Callable[[], Any]]:
    pipeline_class = plan.pipeline.load()
    with blamed_on(f"components() of {plan.pipeline} failed", "repair it, or the folder's config.json"):
        builders = pipeline_class.components(copy.deepcopy(plan.config))
    well_made = (
        isinstance(builders, Mapping)
        and builders
        and all(isinstance(name, str) and _NAME.fullmatch(name) for name in builders)
        and all(callable(build) and not isinstance(build, nn.Module) for build in builders.values())
    )
    if not well_made:
        raise PipelineUnavailable(
            f"components() of {plan.pipeline} must give builders by name, "
            '{"denoiser": lambda: Denoiser(...)}, with identifiers as names'
        )
    return builders


def _refuse_hidden(module: nn.Module, name: str) -> None:
    """Tensors inside objects that are no module would be left without data in the daemon."""
    for path, sub in module.named_modules():
        for key, value in vars(sub).items():
            is_object = hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type)
            if is_object and any(isinstance(item, Tensor) for item in vars(value).values()):
                where = f"{name}.{path}.{key}".replace("..", ".")
                raise StoreError(
                    StoreErrorCode.UNSUPPORTED_SOURCE,
                    f"{where} is a {type(value).__name__} that holds tensors; make them buffers of a module",
                )


def _load(module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
    """`load_state_dict(strict=True)`, except that tensors take the files' dtypes.

    Of tensors that the module ties, a file may hold all or only one, as safetensors writes them.
    """
    places = module.state_dict(keep_vars=True)
    for key, place in places.items():
        if not isinstance(place, Tensor):
            raise _failed(f"{name} keeps {key} in its state dict, which is no tensor")
    by_tensor: dict[int, list[str]] = {}
    for key, place in places.items():
        by_tensor.setdefault(id(place), []).append(key)
    for tied in by_tensor.values():
        given = [key for key in tied if key in state]
        if any(not _same(state[given[0]], state[key]) for key in given[1:]):
            raise _corrupt(f"{name}: {_listed(tied)} are tied, but their weights differ; keep one of them")
        if given:
            places[tied[0]].data = places[tied[0]].data.to(state[given[0]].dtype)
            state |= dict.fromkeys(tied, state[given[0]])
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise _corrupt(f"{name}: {reason}; give the state dict of this architecture") from error


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(torch.equal(one, other))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PipelineUnavailable as error:
        raise _failed(str(error)) from error


def _failed(why: str) -> StoreError:
    return StoreError(StoreErrorCode.PIPELINE_FAILED, why)


def _corrupt(why: str) -> StoreError:
    return StoreError(StoreErrorCode.CORRUPT_SOURCE, why)
