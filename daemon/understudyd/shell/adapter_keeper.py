"""Keeps adapters, and the models that they are folded into, in step with stores, models and core.

A derived model is added to the core when it is first asked for, and forgotten when the core lets go of it.
One whose base or adapter is replaced is replaced as well where somebody needs it now; else it is removed, and
made anew when it is asked for. What runs finishes with what it began with.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count

from understudy.wire import Adapter
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.entities import Model
from understudyd.core.machine import Machine
from understudyd.core.states import PartsState
from understudyd.shell.adapter_book import AdapterBook, AdapterRefused
from understudyd.shell.derived import DerivedModels, derived_name, parse_name
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.served import ServedModels
from understudyd.shell.threads import in_daemon_thread
from understudyd.store.adapters.records import AdapterRecord
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.store import Store
from understudyd.store.union import FoundAdapter, Inventory, StoreUnion

log = logging.getLogger(__name__)

EditionAction = ac.RetireModel | ac.AdoptEdition | ac.RejectEdition | ac.RetireEdition


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request is for: `model` as the core knows it, and what that is made of."""

    model: str
    base: str
    adapters: tuple[Adapter, ...] = ()


class AdapterKeeper:
    """`lock` is held by whoever changes the own store; `in_use` are blobs that must stay on its disk.

    `tidy` has what nobody needs any more deleted there, sooner or later.
    """

    def __init__(
        self,
        machine: Machine,
        stores: StoreUnion,
        served: ServedModels,
        settings: ModelSettings,
        handle: Callable[[ev.Event], None],
        lock: asyncio.Lock,
        in_use: Callable[[], Collection[str]],
        tidy: Callable[[], None],
    ) -> None:
        self.book = AdapterBook(served)
        self.derived = DerivedModels(served, self.book, settings)
        self._machine = machine
        self._stores = stores
        self._served = served
        self._handle = handle
        self._lock = lock
        self._in_use = in_use
        self._tidy = tidy
        self._replaced: set[str] = set()  # contents that editions may still have
        self._leaving: dict[str, asyncio.Future[None]] = {}  # adapters that are being removed
        self._removals: set[asyncio.Task[int]] = set()

    # -- what is asked for --------------------------------------------------------------------------

    def wish(self, model: str, adapters: Sequence[Adapter] = ()) -> Wish:
        """What a request for a model is for, which the core knows from now on. Raises `AdapterRefused`.

        `model` may be an adapter's name, or a derived model's. One that is nothing is left to the core.
        """
        base, wanted = self._apart(model, tuple(adapters))
        if not wanted or base not in self._served.records or not self._may_be_asked_for(base):
            return Wish(base, base)
        name = self._free_name(derived_name(base, wanted))
        if self._core_model(name) is None:
            derived = self.derived.derive(base, wanted, name)
            self.derived.enter(derived)
            self.derived.adopt(name, derived.info.key)
            self._handle(ev.ModelAdded(derived.info))
        return Wish(name, base, wanted)

    def revive(self, name: str) -> None:
        """Have the core know a derived model of an earlier life, if there is all that it takes."""
        if parse_name(name) is not None:
            with contextlib.suppress(AdapterRefused):
                self.wish(name)

    def name_of(self, model: str) -> str:
        """What the core calls what may be asked for as `model`, whether or not it knows it yet.

        Raises `AdapterRefused` for an adapter whose base is open.
        """
        base, wanted = self._apart(model, ())
        return self._free_name(derived_name(base, wanted)) if wanted else base

    def _apart(self, model: str, adapters: tuple[Adapter, ...]) -> tuple[str, tuple[Adapter, ...]]:
        if "+" in model and (parsed := parse_name(model)) is not None:
            model, adapters = parsed[0], (*parsed[1], *adapters)
        if model not in self._served.records and model in self.book.found:
            return self.book.base_of(self.book.found[model]), (Adapter(model), *adapters)
        return model, adapters

    def _may_be_asked_for(self, name: str) -> bool:
        model = self._core_model(name)
        return model is not None and not model.retiring

    def _free_name(self, name: str) -> str:
        """The name, or one with a number behind it while the last user of a removed model has it."""
        names = (name if number == 1 else f"{name}#{number}" for number in count(1))
        return next(name for name in names if (m := self._core_model(name)) is None or not m.retiring)

    def _core_model(self, name: str) -> Model | None:
        return self._machine.residency.models.get(name)

    # -- adapters come and go -----------------------------------------------------------------------

    def add(self, found: FoundAdapter) -> bool:
        """A store has this adapter: it may be asked for from now on. Whether it is another than before."""
        name = found.record.name
        before = self.book.found.get(name)
        self.book.put(name, found)
        if before is None or _is_same(before, found):
            return False
        self._replaced.add(before.record.content)
        self._renew(self.derived.of_adapter(name))
        self._look_who_left()
        return True

    async def refresh(self, name: str) -> AdapterRecord:
        """Serve what the stores hold under this name. Raises `StoreError` when they hold nothing usable."""
        if self.is_leaving(name):
            raise StoreError(StoreErrorCode.EXISTS, f"{name} is being removed; add it again when it is gone")
        found: FoundAdapter = await in_daemon_thread(self._stores.find_adapter, name)
        self.add(found)
        return found.record

    def is_leaving(self, name: str) -> bool:
        """The adapter is being removed: somebody still uses it, or its files are."""
        return name in self._leaving

    async def remove(self, name: str) -> int:
        """Stop serving an adapter, delete it when its last user is gone; returns freed bytes on disk.

        Raises KeyError, and `StoreError(read_only)` for one that is not in the own store.
        """
        home = self.book.found[name].home
        if home is not self._stores.own:
            raise StoreError(
                StoreErrorCode.READ_ONLY,
                f"{name} is in the read-only store {home.path}; delete it there and rescan",
            )
        removal = asyncio.get_running_loop().create_task(self._remove(name))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        return await asyncio.shield(removal)

    async def _remove(self, name: str) -> int:
        self._leaving[name] = unused = asyncio.get_running_loop().create_future()
        try:
            self._drop(name)
            self._look_who_left()
            await unused
            async with self._lock:
                freed_bytes: int = await in_daemon_thread(_delete, self._stores.own, name, self._in_use())
        finally:
            del self._leaving[name]
        if self._stores.read_only:
            await self._reveal(name)
        return freed_bytes

    async def _reveal(self, name: str) -> None:
        """A read-only store may have an adapter of the name that was removed."""
        try:
            found: FoundAdapter = await in_daemon_thread(self._stores.find_adapter, name)
        except StoreError:
            return
        if name not in self.book.found and not self.is_leaving(name):
            self.add(found)

    def _drop(self, name: str) -> None:
        """It is served no more: requests that wait for it fail, running ones finish."""
        self.book.put(name, None)
        self._remove_derived(self.derived.of_adapter(name))

    def rescan(self, inventory: Inventory) -> tuple[list[str], list[str], list[str]]:
        """Follow what all stores hold; the names that were added, replaced and removed."""
        added: list[str] = []
        replaced: list[str] = []
        removed: list[str] = []
        for name, found in inventory.adapters.items():
            if self.is_leaving(name):
                continue
            if name not in self.book.found:
                added.append(name)
            if self.add(found):
                replaced.append(name)
        for name, found in list(self.book.found.items()):
            is_damaged = name in inventory.damaged and name not in inventory.found
            is_there = name in inventory.adapters or is_damaged
            if not (is_there or found.home.path in inventory.away):
                self._drop(name)
                removed.append(name)
        return added, replaced, removed

    # -- their models -------------------------------------------------------------------------------

    def base_leaves(self, name: str) -> None:
        """A model is about to be removed: what is derived from it goes first."""
        self._remove_derived(self.derived.of_base(name))

    def base_replaced(self, name: str) -> None:
        """The model's name stands for another edition."""
        self._renew(self.derived.of_base(name))

    def set_max_batch(self, base: str, max_batch: int) -> None:
        """What is set for a model holds with adapters, too."""
        for name in self.derived.of_base(base):
            if self._may_be_asked_for(name):
                self._handle(ev.MaxBatchChanged(name, max_batch))

    def _remove_derived(self, names: Sequence[str]) -> None:
        for name in names:
            if self._may_be_asked_for(name):
                self._handle(ev.ModelRemoved(name))

    def _renew(self, names: Sequence[str]) -> None:
        """Their ingredients have changed."""
        for name in names:
            model = self._core_model(name)
            if model is None or model.retiring:
                continue
            before = self.derived.latest[name]
            try:
                after = self.derived.derive(before.base_name, before.adapters, name)
            except AdapterRefused as error:
                log.warning("%s can be made no more: %s", name, error)
                after = before
            if after is before or not self._is_needed(model):
                self._handle(ev.ModelRemoved(name))
            elif after.ingredients != before.ingredients:
                self.derived.enter(after)
                self._handle(ev.ModelReplaced(after.info))

    def _is_needed(self, model: Model) -> bool:
        machine, name = self._machine, model.name
        return (
            model.leases > 0
            or model.parts.state is PartsState.PREPARING
            or name in machine.residency.pinned
            or name in machine.wanted
            or bool(machine.queue.waiting_for(name))
        )

    def perform(self, action: EditionAction) -> None:
        """Follow the core, about a derived model."""
        match action:
            case ac.AdoptEdition(name=name, key=key):
                self.derived.adopt(name, key)
            case ac.RejectEdition(name=name, message=message):
                log.warning("%s cannot be prepared, it is made anew when it is asked for: %s", name, message)
                self._remove_derived([name])
            case ac.RetireEdition(key=key):
                self.derived.forget(key)
            case ac.RetireModel(name=name):
                self.derived.forget_name(name)
        self._look_who_left()

    def _look_who_left(self) -> None:
        if self._replaced:
            still = {f.record.content for d in self.derived.editions.values() for f in d.found}
            if self._replaced - still:
                self._replaced &= still
                self._tidy()
        for name, unused in self._leaving.items():
            if not unused.done() and not self.derived.uses_adapter(name):
                unused.set_result(None)


def _is_same(one: FoundAdapter, other: FoundAdapter) -> bool:
    return one.record.content == other.record.content and one.home is other.home


def _delete(own: Store, name: str, keep: Collection[str]) -> int:
    with own.writing(keep) as writer:
        return writer.remove_adapter(name)
