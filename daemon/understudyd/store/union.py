"""Several stores seen as one: the writable one first, then read-only ones in their order.

A read-only store may be a mount that vanishes and comes back. It is looked at only when a model is looked for
or all are listed, both of which may take as long as the mount does: never from the event loop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import ModelRecord, SignatureRecord
from understudyd.store.store import Store


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model and the store that it is served from. `shadowed` are later stores that have the name, too."""

    record: ModelRecord
    home: Store
    shadowed: tuple[Path, ...] = ()


@dataclass(slots=True)
class Inventory:
    """All stores at one moment: usable models, why others are not, and stores that cannot be reached."""

    found: dict[str, FoundModel] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    away: dict[Path, str] = field(default_factory=dict)


class StoreUnion:
    """`own` is written to; what is in `read_only` is read and never touched."""

    def __init__(self, own: Store, read_only: Sequence[Store] = ()) -> None:
        self.own = own
        self.read_only = tuple(read_only)

    def __iter__(self) -> Iterator[Store]:
        """In the order in which a name is looked for."""
        return iter((self.own, *self.read_only))

    def inventory(self) -> Inventory:
        """What all stores hold. A store that cannot be reached is noted, and no error."""
        inventory = Inventory()
        for store in self:
            try:
                models, damaged = store.scan()
            except OSError as error:
                inventory.away[store.path] = error.strerror or str(error)
                continue
            for name, record in models.items():
                self._enter(inventory, name, record, store)
            inventory.damaged |= {name: f"{store.path}: {why}" for name, why in damaged.items()}
        for name in inventory.found:
            inventory.damaged.pop(name, None)
        return inventory

    @staticmethod
    def _enter(inventory: Inventory, name: str, record: ModelRecord, store: Store) -> None:
        known = inventory.found.get(name)
        if known is None:
            inventory.found[name] = FoundModel(record, store)
        else:
            shadowed = (*known.shadowed, store.path)
            inventory.found[name] = FoundModel(known.record, known.home, shadowed)

    def find(self, name: str) -> FoundModel:
        """The first usable model of this name. Raises the `StoreError` of the first store that has it, else
        `not_found`.
        """
        found: FoundModel | None = None
        trouble: StoreError | None = None
        for store in self:
            try:
                record = store.model(name)
            except StoreError as error:
                if error.code is StoreErrorCode.BAD_NAME:
                    raise
                if error.code is not StoreErrorCode.NOT_FOUND and trouble is None:
                    trouble = error
                continue
            found = (
                FoundModel(record, store)
                if found is None
                else FoundModel(found.record, found.home, (*found.shadowed, store.path))
            )
        if found is None:
            raise trouble or StoreError(StoreErrorCode.NOT_FOUND, f"no store has a model {name!r}")
        return found

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
