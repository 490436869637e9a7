"""Several stores seen as one: the writable one first, then read-only ones in their order.

A read-only store may be a mount that vanishes and comes back. It is looked at only when a model is looked for
or all are listed, both of which may take as long as the mount does: never from the event loop.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.adapters.shelf import AdapterShelf
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import ModelRecord, SignatureRecord
from understudyd.store.store import Store


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model and the store that it is served from. `shadowed` are later stores that have the name, too."""

    record: ModelRecord
    home: Store
    shadowed: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter and the store that it is served from. `shadowed` are later stores that have the name."""

    record: AdapterRecord
    home: Store
    shadowed: tuple[Path, ...] = ()


_Record = TypeVar("_Record")


@dataclass(slots=True)
class Inventory:
    """All stores at one moment: what is usable, why the rest is not, and stores that cannot be reached.

    A name is a model's or an adapter's: the model's, where different stores have both.
    """

    found: dict[str, FoundModel] = field(default_factory=dict)
    adapters: dict[str, FoundAdapter] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    away: dict[Path, str] = field(default_factory=dict)


class StoreUnion:
    """`own` is written to; what is in `read_only` is read and never touched."""

    def __init__(self, own: Store, read_only: Sequence[Store] = ()) -> None:
        self.own = own
        self.read_only = tuple(read_only)
        self._shelves = {store.path: AdapterShelf(store) for store in self}

    def __iter__(self) -> Iterator[Store]:
        """In the order in which a name is looked for."""
        return iter((self.own, *self.read_only))

    def inventory(self) -> Inventory:
        """What all stores hold. A store that cannot be reached is noted, and no error."""
        inventory = Inventory()
        for store in self:
            try:
                models, damaged = store.scan()
                adapters, damaged_adapters = self._shelves[store.path].scan()
            except OSError as error:
                inventory.away[store.path] = error.strerror or str(error)
                continue
            for name, record in models.items():
                model = inventory.found.get(name)
                inventory.found[name] = (
                    FoundModel(record, store) if model is None else _shadowing(model, store)
                )
            for name, adapter in adapters.items():
                known = inventory.adapters.get(name)
                inventory.adapters[name] = (
                    FoundAdapter(adapter, store) if known is None else _shadowing(known, store)
                )
            for name, why in (damaged | damaged_adapters).items():
                inventory.damaged[name] = f"{store.path}: {why}"
        for name in (*inventory.found, *inventory.adapters):
            inventory.damaged.pop(name, None)
        for name in inventory.found.keys() & inventory.adapters.keys():
            home = inventory.adapters.pop(name).home
            inventory.damaged[name] = f"{home.path}: this adapter has a model's name; add it under another"
        return inventory

    def find(self, name: str) -> FoundModel:
        """The first usable model of this name. Raises the `StoreError` of the first store that has it, else
        `not_found`.
        """
        return FoundModel(*self._first(lambda store: store.model(name), f"no store has a model {name!r}"))

    def find_adapter(self, name: str) -> FoundAdapter:
        """The first usable adapter of this name. Raises as `find` does."""
        what = f"no store has an adapter {name!r}"
        return FoundAdapter(*self._first(lambda store: self._shelves[store.path].adapter(name), what))

    def _first(
        self, read: Callable[[Store], _Record], otherwise: str
    ) -> tuple[_Record, Store, tuple[Path, ...]]:
        """What the first store reads, that store, and where else it is."""
        found: list[tuple[_Record, Store]] = []
        trouble: StoreError | None = None
        for store in self:
            try:
                found.append((read(store), store))
            except StoreError as error:
                if error.code is StoreErrorCode.BAD_NAME:
                    raise
                if error.code is not StoreErrorCode.NOT_FOUND and trouble is None:
                    trouble = error
        if not found:
            raise trouble or StoreError(StoreErrorCode.NOT_FOUND, otherwise)
        return *found[0], tuple(store.path for _, store in found[1:])

    def signature(self, signature_id: str) -> SignatureRecord:
        """The shape of a component, which is the same in every store. Raises `StoreError`."""
        trouble: StoreError | None = None
        for store in self:
            try:
                return store.signature(signature_id)
            except StoreError as error:
                trouble = trouble or error
        assert trouble is not None
        raise trouble


_AnyFound = TypeVar("_AnyFound", FoundModel, FoundAdapter)


def _shadowing(found: _AnyFound, store: Store) -> _AnyFound:
    return replace(found, shadowed=(*found.shadowed, store.path))
