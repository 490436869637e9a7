"""Where the tensors of a module tree are: one walk, the same at ingest and when a skeleton is built.

What ingest records under a path, the skeleton must find under that path again; so both ask here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import TensorKind

_MODULE_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_OWN_OBJECTS = ("diffusers.", "transformers.")
"""Plain objects of these libraries are looked into: attention processors, a decoder's own scheduler."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor's place: `owner[key]` reads it and `owner[key] = tensor` replaces it.

    `owner` is a dict or list of the module tree, or stands for a tuple in it.
    """

    path: str
    kind: TensorKind
    owner: Any
    key: Any

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        tensor = self.owner[self.key]
        assert isinstance(tensor, Tensor)
        return tensor

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two paths that lead to the same place, as when a module is registered twice."""
        if isinstance(self.owner, _TupleItems):
            return (*self.owner.identity, self.key)
        return (id(self.owner), self.key)


class _TupleItems:
    """A tuple's items as if they could be replaced: its holder gets a new tuple."""

    def __init__(self, holder: Any, key: Any) -> None:
        self._holder = holder
        self._key = key

    @property
    def identity(self) -> tuple[Any, ...]:
        before = self._holder.identity if isinstance(self._holder, _TupleItems) else (id(self._holder),)
        return (*before, self._key)

    def __getitem__(self, index: int) -> Any:
        return self._holder[self._key][index]

    def __setitem__(self, index: int, value: Any) -> None:
        old = self._holder[self._key]
        items = [*old[:index], value, *old[index + 1 :]]
        self._holder[self._key] = old._make(items) if hasattr(old, "_make") else type(old)(items)


def tensor_places(module: nn.Module, *, every_path: bool = False) -> Iterator[TensorPlace]:
    """Every tensor of a module tree, in order of registration.

    Parameters, buffers (persistent or not) and plain attributes. Tensors in lists, tuples, dicts and the
    library's own plain objects, nested or not, are attributes with paths such as `rope.freqs.0`. A module
    that is registered twice is visited once, or with `every_path` under each of its names.
    Raises `StoreError(unsupported_source)` where a path would not be unique.
    """
    taken: set[str] = set()
    registered = {id(sub) for sub in module.modules()}
    for place in _walk_modules(module, "", registered, set(), every_path):
        if place.path in taken:
            raise StoreError(
                StoreErrorCode.UNSUPPORTED_SOURCE,
                f"{place.path} is the path of two tensors, which cannot be served; use another model",
            )
        taken.add(place.path)
        yield place


def _walk_modules(
    root: nn.Module, start: str, registered: set[int], seen: set[int], every_path: bool
) -> Iterator[TensorPlace]:
    for prefix, sub in root.named_modules(prefix=start, remove_duplicate=not every_path):
        dot = prefix + "." if prefix else ""
        yield from _registered(sub, dot)
        if every_path:
            seen = set()
        for name, value in vars(sub).items():
            if name not in _MODULE_TABLES:
                yield from _plain(value, dot + name, vars(sub), name, registered, seen, every_path)


def _registered(module: nn.Module, dot: str) -> Iterator[TensorPlace]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield TensorPlace(dot + name, "parameter", module._parameters, name)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            is_temporary = name in module._non_persistent_buffers_set
            kind: TensorKind = "temporary_buffer" if is_temporary else "buffer"
            yield TensorPlace(dot + name, kind, module._buffers, name)


def _plain(
    value: Any, path: str, owner: Any, key: Any, registered: set[int], seen: set[int], every_path: bool
) -> Iterator[TensorPlace]:
    """Tensors in what is no parameter and no buffer; `seen` ends cycles."""
    if isinstance(value, Tensor):
        yield TensorPlace(path, "attribute", owner, key)
        return
    items = _items(value, owner, key)
    is_hidden_module = isinstance(value, nn.Module) and id(value) not in registered
    if (items is None and not is_hidden_module) or id(value) in seen:
        return
    if not isinstance(value, tuple):  # its items are replaced holder by holder
        seen.add(id(value))
    if is_hidden_module:  # in a list, say: no parameter of the tree, but computed with
        yield from _walk_modules(value, path, registered, seen, every_path)
        return
    holder, entries = items or (None, ())
    for name, item in entries:
        yield from _plain(item, f"{path}.{name}", holder, name, registered, seen, every_path)


def _items(value: Any, owner: Any, key: Any) -> tuple[Any, list[tuple[Any, Any]]] | None:
    """What holds the entries of a container, and they; None for what is none."""
    if isinstance(value, Mapping):
        return value, [(k, v) for k, v in value.items() if isinstance(k, str | int)]
    if isinstance(value, list):
        return value, list(enumerate(value))
    if isinstance(value, tuple):
        return _TupleItems(owner, key), list(enumerate(value))
    is_own = type(value).__module__.startswith(_OWN_OBJECTS) and not isinstance(value, nn.Module | type)
    if is_own and isinstance(getattr(value, "__dict__", None), dict):
        return vars(value), list(vars(value).items())
    return None
