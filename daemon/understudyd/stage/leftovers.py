"""What a run leaves on a shared module besides moved and cast tensors, and how it is undone.

Some components keep tensors on themselves while they compute: caches of causal convolutions, tables made
at the first call. After a run, a cancelled one too, none of them may be left for the next one, whose
weights are others.
"""

import dis
import functools
from collections.abc import Collection
from operator import is_
from types import CodeType
from typing import Any

from torch import Tensor, nn

_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_SETTERS = ("set_", "_set_", "enable_", "disable_", "fuse_", "unfuse_")
"""How the libraries name what a user calls, not a computation. They would make most modules suspects."""


class PlainState:
    """The plain attributes of the modules whose classes can change any, as they were when this was made.

    Which classes these are is read off their methods, once per class, so that a restore looks at a
    few modules of a thousand. A module that kept no tensor is left as it is: what else the libraries
    set up at a first call (hooks, flags) belongs together and stays.
    """

    def __init__(self, root: nn.Module, slots: Collection[tuple[Any, ...]]) -> None:
        """`slots` are (id of the dict, key) of the tensors that a bind sets: they are left alone."""
        changing = [vars(m) for m in root.modules() if any(map(_changes_itself, type(m).__mro__))]
        self._modules = [_Attributes(attributes, slots) for attributes in changing]

    def restore(self) -> None:
        """Put every module that kept a tensor back."""
        for module in self._modules:
            if not all(map(is_, module.now.values(), module.values)) or len(module.now) != len(module.values):
                module.restore()
            for cache in filter(None, module.caches):
                if _holds_tensor(cache):
                    cache.clear()


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
def _changes_itself(cls: type[Any]) -> bool:
    """Whether a method other than constructor and setters assigns attributes; torch's own layers do not."""
    if cls is object or cls.__module__.startswith("torch."):
        return False
    return any(
        _assigns(code)
        for name, member in vars(cls).items()
        if name != "__init__" and not name.startswith(_SETTERS) and (code := _code(member)) is not None
    )


def _code(member: Any) -> CodeType | None:
    """The code of a method, behind decorators and properties."""
    while (inner := getattr(member, "__wrapped__", None) or getattr(member, "fget", None)) is not None:
        member = inner
    return getattr(member, "__code__", None)


@functools.cache
def _assigns(code: CodeType) -> bool:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    steps = dis.get_instructions(code)
    return any(step.opname == "STORE_ATTR" for step in steps) or any(map(_assigns, inner))
