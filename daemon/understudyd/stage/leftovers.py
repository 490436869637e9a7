"""What a run leaves on a shared module besides moved and cast tensors, and how it is undone.

Some components keep tensors on themselves while they compute: caches of causal convolutions, tables made
at the first call, and what a method decorated with a cache returned. After a run, a cancelled one too, none
of them may be left for the next one, whose weights are others and lie elsewhere.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from types import CodeType
from typing import Any

from torch import Tensor, nn

_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_SETTERS = ("_init_", "set_", "_set_", "enable_", "disable_", "fuse_", "unfuse_")
"""How the libraries name what constructors or users call, not a computation."""

_BASES = (
    "torch.",
    "diffusers.loaders.",
    "diffusers.models.modeling_utils",
    "transformers.modeling_utils",
    "transformers.integrations.",
)
"""Modules of classes that compute nothing with attributes: these would make every component a suspect."""


class PlainState:
    """The plain attributes of the modules whose classes can change any, as they were when this was made.

    Which classes these are, and which attributes, is read off their methods, once per class, so that a
    restore looks at a few modules of a thousand. A module that kept no tensor is left as it is: what else
    the libraries set up at a first call (hooks, flags) belongs together and stays.
    """

    def __init__(self, root: nn.Module, slots: Collection[tuple[Any, ...]]) -> None:
        """`slots` are (id of the dict, key) of the tensors that a bind sets: they are left alone."""
        modules = list(root.modules())
        self._methods = [cache for module in modules for cache in _give_own_caches(module)]
        found = map(_assigned_names, map(type, modules))
        changing: list[tuple[dict[str, Any], frozenset[str]]] = [
            (vars(module), names) for module, names in zip(modules, found)
        ]
        self._modules = [_Attributes(attributes, slots) for attributes, names in changing if names]
        self._caches = [cache for module in self._modules for cache in module.caches]
        # What nearly always is as it was is found to be so by a few look-ups: this is on the way of a switch.
        self._lengths = [(attributes, len(attributes)) for attributes, names in changing if names]
        self._watched = [
            (attributes, name, attributes.get(name))
            for attributes, names in changing
            for name in sorted(names)
            if (id(attributes), name) not in slots
        ]

    def restore(self) -> None:
        """Put every module that kept a tensor back, and forget what methods returned."""
        for cache_clear in self._methods:
            cache_clear()
        is_as_it_was = all(attributes.get(name) is value for attributes, name, value in self._watched)
        if not is_as_it_was or any(len(attributes) != length for attributes, length in self._lengths):
            for module in self._modules:
                module.restore()
        if any(self._caches):
            for cache in filter(_holds_tensor, self._caches):
                cache.clear()


def _give_own_caches(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Give the module caches of its own in place of its class's around methods; yields how to clear them.

    The class's are keyed by the module among others: they would return views of an extent that is
    another blob's by now, and keep every module they ever saw alive.
    """
    cls: Any = type(module)
    for name, function, maxsize in _cached_methods(cls):
        cached = functools.lru_cache(maxsize)(functools.partial(function, module))
        vars(module)[name] = cached
        yield cached.cache_clear


@functools.cache
def _cached_methods(cls: Any) -> tuple[tuple[str, Callable[..., Any], int | None], ...]:
    """Name, what is decorated, and the cache's size, of every method behind `functools.lru_cache`."""
    names = {name for base in cls.__mro__ if base not in (nn.Module, object) for name in vars(base)}
    found = ((name, inspect.getattr_static(cls, name)) for name in sorted(names))
    caches = ((name, _cache_of(member)) for name, member in found)
    return tuple(
        (name, cache.__wrapped__, cache.cache_parameters()["maxsize"]) for name, cache in caches if cache
    )


def _cache_of(member: Any) -> Any:
    """The cache that the member is, or that the library's own decorator around one calls."""
    if isinstance(member, functools._lru_cache_wrapper):
        return member
    if not hasattr(member, "__wrapped__"):
        return None
    inside = (cell.cell_contents for cell in getattr(member, "__closure__", None) or ())
    return next((value for value in inside if isinstance(value, functools._lru_cache_wrapper)), None)


class _Attributes:
    """One module's attributes. `caches` are its containers that began empty."""

    __slots__ = ("caches", "now", "slots", "values", "was")

    def __init__(self, attributes: dict[str, Any], slots: Collection[tuple[Any, ...]]) -> None:
        self.now = attributes
        self.was = dict(attributes)
        self.values = list(attributes.values())
        self.slots = frozenset(key for key in attributes if (id(attributes), key) in slots)
        own = (value for key, value in attributes.items() if key not in _EVERY_MODULE_HAS)
        self.caches: list[Any] = [v for v in own if isinstance(v, dict | list | set) and not v]

    def restore(self) -> None:
        changed = [
            key
            for key in self.now.keys() - self.slots
            if key not in self.was or self.now[key] is not self.was[key]
        ]
        if not any(_holds_tensor(self.now[key]) for key in changed):
            return
        for key in changed:
            if key in self.was:
                self.now[key] = self.was[key]
            else:
                del self.now[key]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple | set):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


@functools.cache
def _assigned_names(cls: Any) -> frozenset[str]:
    """What methods other than constructors and setters assign to; torch's own layers nothing."""
    return frozenset().union(*map(_assigned_by, cls.__mro__))


@functools.cache
def _assigned_by(cls: Any) -> frozenset[str]:
    if cls is object or cls.__module__.startswith(_BASES):
        return frozenset()
    codes = (
        _code(member)
        for name, member in vars(cls).items()
        if name != "__init__" and not name.startswith(_SETTERS)
    )
    return frozenset().union(*map(_stores, filter(None, codes)))


def _code(member: Any) -> CodeType | None:
    """The code of a method, behind decorators and properties."""
    while (inner := getattr(member, "__wrapped__", None) or getattr(member, "fget", None)) is not None:
        member = inner
    return getattr(member, "__code__", None)


@functools.cache
def _stores(code: CodeType) -> frozenset[str]:
    """Attributes that the code assigns to, of whatever object."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(own).union(*map(_stores, inner))
