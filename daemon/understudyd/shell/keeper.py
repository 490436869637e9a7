"""Keeps what is served in step with what the stores hold: adds, replaces, removes, looks again.

Everything here runs on the event loop's thread, but for `verified`. What reads or writes a store runs in
other threads: it may take as long as a network mount does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.shell.adapter_keeper import AdapterKeeper, EditionAction
from understudyd.shell.model_settings import ModelSettings
from understudyd.shell.served import ServedModels
from understudyd.shell.threads import in_daemon_thread
from understudyd.store.errors import StoreError, StoreErrorCode
from understudyd.store.records import ModelRecord
from understudyd.store.union import FoundModel, StoreUnion

log = logging.getLogger(__name__)


class ReplaceFailed(Exception):
    """The new edition cannot be used; the name stands for what it stood for."""


@dataclass(slots=True)
class Rescan:
    """What a look at all stores has changed. `rejected` and `damaged` say why, `away` which stores are."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)


class Keeper:
    """`lock` is held by whoever changes the own store, or compares it with what is served."""

    def __init__(
        self,
        machine: Machine,
        stores: StoreUnion,
        loop: asyncio.AbstractEventLoop,
        handle: Callable[[ev.Event], None],
        settings: ModelSettings | None = None,
    ) -> None:
        self.stores = stores
        self.settings = settings or ModelSettings()
        self.served = ServedModels(stores, self.settings)
        self.lock = asyncio.Lock()
        self.adapters = AdapterKeeper(
            machine,
            stores,
            self.served,
            self.settings,
            handle,
            self.lock,
            self._blobs_in_use,
            lambda: self._start(self._collect_garbage()),
        )
        self._machine = machine
        self._loop = loop
        self._handle = handle
        self._told: dict[str, FoundModel] = {}  # what the core knows, or is to know next
        self._swaps: dict[str, asyncio.Future[None]] = {}  # by the new edition's key
        self._latest_swap: dict[str, asyncio.Future[None]] = {}  # by name
        self._removals: dict[str, asyncio.Future[int]] = {}
        self._leaving: set[str] = set()  # names whose files are about to be deleted
        self._dropped: set[str] = set()  # names whose files are gone already
        self._tasks: set[asyncio.Task[None]] = set()

    async def set_max_batch(self, name: str, max_batch: int) -> None:
        """Let so many images of a model be made by one run, from now on. Raises `OSError`."""
        await self.settings.put(name, replace(self.settings.of(name), max_batch=max_batch))
        if name in self.names():
            self._handle(ev.MaxBatchChanged(name, max_batch))
            self.adapters.set_max_batch(name, max_batch)

    # -- adding and replacing -----------------------------------------------------------------------

    def add(self, found: FoundModel) -> None:
        """A store has this model: it may be asked for from now on."""
        info = self.served.enter(found)
        self.served.adopt(info.name, info.key)
        self._told[info.name] = found
        self._handle(ev.ModelAdded(info))

    async def refresh(self, name: str) -> ModelRecord:
        """Serve what the stores hold under this name; returns when the name stands for it.

        Raises `StoreError` when they hold nothing usable, `ReplaceFailed` when it cannot be prepared.
        """
        found: FoundModel = await in_daemon_thread(self.stores.find, name)
        if name not in self.served.records:
            self.add(found)
        else:
            await self._replace(found)
        return found.record

    def names(self) -> list[str]:
        """The models that may be asked for, those with adapters left out."""
        models = self._machine.residency.models
        return [name for name, m in models.items() if not (m.retiring or m.info.is_derived)]

    def label(self, blob: str) -> str | None:
        """What people know a blob or an overlay by; None for one that nobody has any more."""
        return self.served.places.label(blob) or self.adapters.derived.label(blob)

    def is_leaving(self, name: str) -> bool:
        """The model is being removed: it is in use still, or its files are."""
        model = self._machine.residency.models.get(name)
        return (model is not None and model.retiring) or name in self._leaving

    def _replace(self, found: FoundModel) -> Awaitable[None]:
        """Have the core swap this edition in; the same one twice is one."""
        name = found.record.name
        known = self._told[name]
        if (known.record, known.home) == (found.record, found.home) and name in self._latest_swap:
            return asyncio.shield(self._latest_swap[name])
        swap: asyncio.Future[None] = self._loop.create_future()
        swap.add_done_callback(_look_at_error)
        self._latest_swap[name] = swap
        if (known.record, known.home) == (found.record, found.home):
            swap.set_result(None)
        else:
            self._told[name] = found
            info = self.served.enter(found)
            self._swaps[info.key] = swap
            self._handle(ev.ModelReplaced(info))
        return asyncio.shield(swap)

    # -- removing -----------------------------------------------------------------------------------

    async def remove(self, name: str) -> int:
        """Stop serving a model, delete it when its last user is gone; returns freed bytes on disk.

        Raises `StoreError(read_only)` for one that is not in the own store.
        """
        home = self.served.current(name).home
        if home is not self.stores.own:
            raise StoreError(
                StoreErrorCode.READ_ONLY,
                f"{name} is in the read-only store {home.path}; delete it there and rescan",
            )
        removal: asyncio.Future[int] = self._loop.create_future()
        self._removals[name] = removal
        self.adapters.base_leaves(name)
        self._handle(ev.ModelRemoved(name))
        return await removal

    async def rescan(self) -> Rescan:
        """Serve what all stores hold now. What is in a store that cannot be reached stays as it is."""
        async with self.lock:
            inventory = await in_daemon_thread(self.stores.inventory)
            report = Rescan(damaged=inventory.damaged)
            report.away = {str(path): why for path, why in inventory.away.items()}
            swaps: dict[str, Awaitable[None]] = {}
            for name, found in inventory.found.items():
                if self.is_leaving(name):
                    continue
                if name not in self.served.records:
                    self.add(found)
                    report.added.append(name)
                elif (known := self._told[name]).record != found.record or known.home is not found.home:
                    swaps[name] = self._replace(found)
            for name in list(self.served.records):
                home = self.served.current(name).home
                is_there = name in inventory.found or name in inventory.damaged
                if not (is_there or home.path in inventory.away or self.is_leaving(name)):
                    self._dropped.add(name)
                    report.removed.append(name)
                    self.adapters.base_leaves(name)
                    self._handle(ev.ModelRemoved(name))
            added, replaced, removed = self.adapters.rescan(inventory)
            report.added += added
            report.replaced += replaced
            report.removed += removed
        for name, swap in swaps.items():
            try:
                await swap
                report.replaced.append(name)
            except ReplaceFailed as error:
                report.rejected[name] = str(error)
        return report

    # -- what the core decides ----------------------------------------------------------------------

    def perform(self, action: EditionAction) -> None:
        """Follow the core."""
        if action.name in self.adapters.derived:
            self.adapters.perform(action)
            return
        match action:
            case ac.AdoptEdition(name=name, key=key):
                self.served.adopt(name, key)
                self.adapters.base_replaced(name)
                _settle(self._swaps.pop(key), None)
            case ac.RejectEdition(name=name, key=key, message=message):
                log.warning("%s: the new edition cannot be used, the old one is served on: %s", name, message)
                self._told[name] = self.served.current(name)
                _settle(self._swaps.pop(key), ReplaceFailed(message))
            case ac.RetireEdition(name=name, key=key):
                if (swap := self._swaps.pop(key, None)) is not None:
                    _settle(swap, ReplaceFailed(f"{name} was changed again meanwhile"))
                if self.served.forget(key).home is self.stores.own:
                    self._start(self._collect_garbage())
            case ac.RetireModel(name=name):
                self._retire(name)

    def _retire(self, name: str) -> None:
        gone = self.served.forget_name(name)
        self._told.pop(name)
        self._latest_swap.pop(name, None)
        if name in self._dropped or gone.home is not self.stores.own:
            self._dropped.discard(name)
        else:
            self._leaving.add(name)
            self._start(self._delete(name))

    async def _delete(self, name: str) -> None:
        """Delete a retired model's files; whoever waits for it hears how that went."""
        removal = self._removals.pop(name, None)
        try:
            async with self.lock:
                self._leaving.discard(name)
                freed_bytes = 0
                if name not in self.served.records:  # else it was added anew while this waited
                    freed_bytes = await in_daemon_thread(self.stores.own.remove, name, self._blobs_in_use())
        except StoreError as error:
            log.error("%s could not be deleted from the store: %s", name, error)
            if removal is not None and not removal.done():
                removal.set_exception(error)
            return
        if removal is not None and not removal.done():
            removal.set_result(freed_bytes)
        await self._reveal(name)

    async def _reveal(self, name: str) -> None:
        """A read-only store may have a model of the name that was removed."""
        if self.stores.read_only and name not in self.served.records:
            try:
                found = await in_daemon_thread(self.stores.find, name)
            except StoreError:
                return
            if name not in self.served.records and not self.is_leaving(name):
                self.add(found)

    async def _collect_garbage(self) -> None:
        try:
            async with self.lock:
                await in_daemon_thread(self.stores.own.clean, self._blobs_in_use())
        except StoreError as error:
            log.warning("what was replaced stays in the store for now: %s", error)

    def _blobs_in_use(self) -> frozenset[str]:
        """Those that an edition has which is not retired yet, whatever the store's manifests say.

        A load that is being stopped because no edition is left may find its file gone, and may fail.
        """
        return frozenset(key for key, blob in self._machine.residency.blobs.items() if blob.models)

    # -- preparations -------------------------------------------------------------------------------

    def verified(self, event: ev.Event) -> ev.Event | None:
        """What the stage reports, unless it built from files that are no longer the edition's; any thread.

        A model's folder is replaced in one step, and may be while its small parts are read: then the core
        must know of the new edition before it hears about the old one. None: the event will follow.
        """
        if not isinstance(event, ev.ModelPrepared | ev.ModelPreparationFailed):
            return event
        derived = self.adapters.derived.editions.get(event.key)
        edition = self.served.editions.get(event.key if derived is None else derived.base_key)
        if edition is None:
            return event
        try:
            on_disk = edition.home.manifest(edition.record.name)
        except StoreError:  # out of reach, or being removed
            if isinstance(event, ev.ModelPreparationFailed) and edition.home is not self.stores.own:
                return ev.ModelPreparationFailed(event.key, event.message, is_lasting=False)
            return event
        if on_disk == edition.record:
            return event
        found = FoundModel(on_disk, edition.home, edition.shadowed)
        self._loop.call_soon_threadsafe(self._changed_under, found, event)
        return None

    def _changed_under(self, found: FoundModel, event: ev.Event) -> None:
        name = found.record.name
        if name in self.served.records and not self.is_leaving(name):
            self._replace(found)
        self._handle(event)

    # -- inside -------------------------------------------------------------------------------------

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _settle(swap: asyncio.Future[None], error: Exception | None) -> None:
    if swap.done():
        return
    if error is None:
        swap.set_result(None)
    else:
        swap.set_exception(error)


def _look_at_error(swap: asyncio.Future[None]) -> None:
    """Nobody need wait for a swap."""
    if not swap.cancelled():
        swap.exception()
