"""Who moves what: loaders and the loads that they have in hand, always the same pairs."""

from collections.abc import Iterator

from understudyd.core.actions import Action, CancelLoad, StartLoad
from understudyd.core.decisions import Decisions
from understudyd.core.entities import Blob, Load, Loader
from understudyd.core.extents import Extent
from understudyd.core.states import LOADER_TABLE, IllegalEvent, Lifecycle, LoaderState


class Loads:
    """Loads by id and loaders by id. A lost loader is known until it is reaped. `changes` counts them."""

    def __init__(self, actions: list[Action], decisions: Decisions | None = None) -> None:
        self.under_way: dict[int, Load] = {}
        self.loaders: dict[int, Loader] = {}
        self._actions = actions
        self._decisions = decisions
        self._next_id = 0
        self.changes = 0

    def find(self, load_id: int) -> Load:
        """The load of that id. Raises `IllegalEvent` when there is none."""
        if load_id not in self.under_way:
            raise IllegalEvent(f"load {load_id} is not under way")
        return self.under_way[load_id]

    def start(
        self,
        blob: Blob,
        loader: Loader,
        extent: Extent | None,
        copy: Extent | None,
        from_pool: bool,
        now_s: float,
    ) -> Load:
        """Give an idle loader a load, to the extent, by way of the copy, from it, or to the copy only."""
        self._next_id += 1
        self.changes += 1
        load = Load(self._next_id, blob, loader.id, extent, copy, from_pool, now_s)
        loader.life.to(LoaderState.BUSY, now_s, f"load {load.id}")
        blob.load_id = loader.load_id = load.id
        self.under_way[load.id] = load
        if len(self.under_way) > 1:
            for one in self.under_way.values():
                one.had_company = True
        self._actions.append(
            StartLoad(
                load_id=load.id,
                loader_id=loader.id,
                blob=blob.key,
                offset=None if extent is None else extent.offset,
                size_bytes=blob.info.size_bytes,
                generation=0 if extent is None else extent.generation,
                pool_offset=None if copy is None else copy.offset,
                from_pool=from_pool,
                must_verify=copy is not None and not copy.is_proved,
            )
        )
        return load

    def cancel(self, load: Load) -> None:
        """Ask the loader to stop between two chunks."""
        if not load.is_cancelling:
            if self._decisions is not None:
                self._decisions.stopped(load.blob, is_to_host=load.extent is None)
            load.is_cancelling = True
            self._actions.append(CancelLoad(load.id))

    def end(self, load: Load, now_s: float) -> None:
        """The loader has done with it, one way or another, and takes the next."""
        self.changes += 1
        del self.under_way[load.id]
        load.blob.load_id = None
        loader = self.loaders[load.loader_id]
        loader.load_id = None
        loader.life.to(LoaderState.IDLE, now_s, f"load {load.id} ended")

    def idle_loaders(self) -> Iterator[Loader]:
        """Loaders that take a load now."""
        return (loader for loader in self.loaders.values() if loader.life.state is LoaderState.IDLE)

    def has_loader(self) -> bool:
        """Some loader lives."""
        return any(x.life.state in (LoaderState.IDLE, LoaderState.BUSY) for x in self.loaders.values())

    def loader_ready(self, loader_id: int) -> None:
        """A new loader takes loads."""
        if loader_id in self.loaders:
            raise IllegalEvent(f"loader {loader_id} is known already: {self.loaders[loader_id].life.story()}")
        self.changes += 1
        life = Lifecycle(f"loader {loader_id}", LoaderState.IDLE, LOADER_TABLE)
        self.loaders[loader_id] = Loader(loader_id, life)

    def loader_lost(self, loader_id: int, now_s: float, why: str) -> Load | None:
        """The loader takes nothing more; returns the load that it had in hand.

        A loader that never became ready is not known here: nothing to do.
        """
        loader = self.loaders.get(loader_id)
        if loader is None:
            return None
        loader.life.to(LoaderState.LOST, now_s, why)
        self.changes += 1
        if loader.load_id is None:
            return None
        load = self.under_way.pop(loader.load_id)
        loader.load_id = load.blob.load_id = None
        return load

    def loader_reaped(self, loader_id: int, now_s: float) -> None:
        """The process is gone."""
        loader = self.loaders.get(loader_id)
        if loader is not None:
            loader.life.to(LoaderState.GONE, now_s, "reaped")
            del self.loaders[loader_id]
