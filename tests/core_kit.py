"""A world for the core machine: virtual time, scripted fakes, and a ledger that trusts nothing.

`World` drives a machine: by hand (`tell`) or, with `ScriptedLoaders` and `ScriptedStage`, through virtual
time (`run`). As a context manager it runs to the end and checks that everything was answered and every byte
came back.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from core_fakes import ScriptedLoaders, ScriptedStage
from core_ledger import PAGE, Ledger
from core_pool_ledger import PoolLedger
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import invariants
from understudyd.core.machine import Machine
from understudyd.core.pace import MUCH
from understudyd.core.policy import PolicySettings
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, RequestInfo


def blob(key: str, pages: int) -> BlobInfo:
    return BlobInfo(key, pages * PAGE)


def model(name: str, *blobs: BlobInfo | int, edition: int = 0, max_batch: int = 1) -> ModelInfo:
    """A model; a bare number is a blob of its own with so many pages, which no other edition has."""
    key = ModelInfo(name, (), edition).key
    own = (blob(f"{key}.{i}", b) if isinstance(b, int) else b for i, b in enumerate(blobs))
    return ModelInfo(name, tuple(own), edition, max_batch)


def overlay(base: BlobInfo, *adapters: BlobInfo, scale: float = 1.0) -> BlobInfo:
    """Half as large as what it lies over, rounded up."""
    pages = -(-base.size_bytes // PAGE)
    key = "*".join([base.key, *(adapter.key for adapter in adapters)]) + f"@{scale:g}"
    return BlobInfo(key, -(-pages // 2) * PAGE, (base, *dict.fromkeys(adapters)))


def derived(
    base: ModelInfo, *adapters: BlobInfo, components: Iterable[int] = (0,), scale: float = 1.0
) -> ModelInfo:
    """A model with adapters over some of its components; their names in its own."""
    name = "+".join([base.name, *(f"{adapter.key}@{scale:g}" for adapter in adapters)])
    overlays = [overlay(base.blobs[i], *adapters, scale=scale) for i in components]
    return ModelInfo(name, (*base.blobs, *overlays), max_batch=base.max_batch, is_derived=True)


class VirtualClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 100.0


# -- the world ----------------------------------------------------------------------------------------


class World:
    """A machine, its ledger and a virtual clock; with fakes it runs by itself.

    `tell` hands one event over, checks everything and has the actions performed. Without fakes nothing
    that the actions ask for happens unless the test tells.
    """

    def __init__(
        self,
        pages: int,
        *,
        models: Iterable[ModelInfo] = (),
        loaders: ScriptedLoaders | None = None,
        stage: ScriptedStage | None = None,
        policy: PolicySettings | None = None,
        max_waiting: int = 1000,
        grace_s: float = 1.0,
        pool_pages: int = 0,
        max_derived: int = 1000,
        much: int = MUCH,
        waits_every: int = 0,
    ) -> None:
        self.waits_every = waits_every
        self.clock = VirtualClock()
        self.machine = Machine(
            pages * PAGE,
            pool_bytes=pool_pages * PAGE,
            policy=policy,
            max_waiting=max_waiting,
            quarantine_grace_s=grace_s,
            max_derived=max_derived,
            much=much,
        )
        pool = PoolLedger(self.machine, pool_pages * PAGE)
        self.ledger = Ledger(self.machine, pages * PAGE, grace_s, pool)
        self.loaders, self.stage = loaders, stage
        self.log: list[tuple[float, ac.Action]] = []
        self.events = 0
        self._agenda: list[tuple[float, int, ev.Event, Any]] = []
        self._order = itertools.count()
        self._request_ids = itertools.count(1)
        for info in models:
            self.tell(ev.ModelAdded(info))
        if loaders is not None:
            loaders.start(self)

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    # -- by hand --------------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> list[ac.Action]:
        """One event; every invariant is checked after it. Of some, what follows waits for a tick."""
        may_wait = self.waits_every > 0 and self.events % self.waits_every == 0
        self.events += 1
        self.ledger.before(event, self.now_s)
        actions = self.machine.handle(event, self.now_s, may_wait=may_wait)
        if may_wait and self.machine.next_deadline_s(self.now_s) == self.now_s:
            actions += self.machine.handle(ev.Ticked(), self.now_s)
        self.ledger.after(event, actions, self.now_s)
        invariants.check(self.machine)
        self.log += [(self.now_s, action) for action in actions]
        if self.stage is not None and isinstance(event, ev.RunEnded):
            self.stage.ended(self, event)
        for action in actions:
            self._perform(action)
        return actions

    def ask(
        self,
        name: str,
        *,
        id: str | None = None,
        client: str = "somebody",
        priority: int = 0,
        deadline_in_s: float | None = None,
        cost: float = 1.0,
        batch_key: str = "",
        images: int = 1,
    ) -> str:
        """A request for a model; returns its id."""
        request_id = id or f"r{next(self._request_ids)}"
        at_s = None if deadline_in_s is None else self.now_s + deadline_in_s
        asked = RequestInfo(request_id, client, name, priority, at_s, cost, batch_key, images)
        self.tell(ev.RequestReceived(asked))
        return request_id

    def answer(self, request_id: str) -> ErrorCode | str | None:
        """The answer's code, None when there are images, "none yet" when there is no answer."""
        found = self.ledger.answers.get(request_id)
        return "none yet" if found is None else found.code

    # -- through time ---------------------------------------------------------------------------------

    def later(self, after_s: float, event: ev.Event, about: Any = None) -> None:
        """An event of a fake; `about` names what it ends, for `forget`."""
        heapq.heappush(self._agenda, (self.now_s + after_s, next(self._order), event, about))

    def forget(self, about: Any) -> None:
        """What the fake had planned will not happen."""
        self._agenda = [entry for entry in self._agenda if entry[3] != about or about is None]
        heapq.heapify(self._agenda)

    def run(self, for_s: float | None = None, max_events: int = 5000) -> None:
        """Let time pass until nothing more happens, or for so long."""
        until_s = float("inf") if for_s is None else self.now_s + for_s
        for _ in range(max_events):
            wake_s = self.machine.next_deadline_s(self.now_s)
            planned_s = self._agenda[0][0] if self._agenda else None
            due = [at_s for at_s in (wake_s, planned_s) if at_s is not None]
            if not due or min(due) > until_s:
                break
            self.clock.now_s = max(self.now_s, min(due))
            if planned_s is not None and planned_s <= self.now_s:
                self.tell(heapq.heappop(self._agenda)[2])
            else:
                self.tell(ev.Ticked())
        else:
            raise AssertionError(f"no end after {max_events} events")
        if for_s is not None:
            self.clock.now_s = until_s

    def finish(self) -> None:
        """Run to the end; everything is answered once, and without models the arena is empty again."""
        self.run()
        self.assert_all_answered()
        for name in list(self.machine.residency.models):
            if name not in self.ledger.retiring:
                self.tell(ev.ModelRemoved(name))
        self.run()
        self.assert_back_to_baseline()

    # -- how it ends ----------------------------------------------------------------------------------

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()

    def assert_all_answered(self) -> None:
        missing = self.ledger.received.keys() - self.ledger.answers.keys()
        assert not missing, f"never answered: {sorted(missing)}"

    def assert_back_to_baseline(self) -> None:
        residency = self.machine.residency
        assert not residency.models and not residency.blobs and not residency.loads
        assert not self.machine.catalogue.editions and not self.machine.catalogue.coming
        assert not self.ledger.coming and not self.ledger.leaving
        assert residency.arena.free_bytes == residency.arena.largest_gap_bytes == self.ledger.arena_bytes
        pool = residency.copies.pool
        assert pool.free_bytes == pool.largest_gap_bytes == self.ledger.pool.pool_bytes
        assert not self.machine.queue.requests and not len(self.machine.queue)
        assert residency.leases == 0 and not self.machine.wanted and not residency.pinned

    # -- actions --------------------------------------------------------------------------------------

    def _perform(self, action: ac.Action) -> None:
        if self.loaders is not None:
            match action:
                case ac.StartLoad():
                    self.loaders.load(self, action)
                case ac.CancelLoad(load_id=load_id):
                    self.loaders.cancel(self, load_id)
        if self.stage is not None:
            match action:
                case ac.BuildViews(blob=key, generation=generation):
                    self.later(self.stage.views_s, ev.ViewsBuilt(key, generation))
                case ac.Fold():
                    self.stage.fold(self, action)
                case ac.CancelFold(overlay=key, generation=generation):
                    self.stage.cancel_fold(self, (key, generation))
                case ac.MoveExtent(blob=key, generation=generation):
                    self.later(self.stage.views_s, ev.ExtentMoved(key, generation))
                case ac.PrepareModel(key=key) if key in self.stage.broken:
                    self.later(self.stage.prepare_s, ev.ModelPreparationFailed(key, "as told"))
                case ac.PrepareModel(key=key):
                    self.later(self.stage.prepare_s, ev.ModelPrepared(key))
                case ac.PutOnDeck(request_id=request_id, companions=companions):
                    self.stage.put_on_deck(self, [request_id, *companions])
                case ac.CancelRun(request_id=request_id):
                    self.stage.cancel(self, request_id)

    def make_resident(self, name: str) -> None:
        """By hand: the model is loaded, for an operator, and prepared."""
        self.tell(ev.LoadWanted(name))
        while not self.machine.residency.models[name].is_ready:
            if self.ledger.loads:
                self.tell(ev.LoadFinished(min(self.ledger.loads)))
            elif self.ledger.views:
                self.tell(ev.ViewsBuilt(*min(self.ledger.views)))
            elif self.ledger.folds.under_way is not None:
                self.tell(ev.FoldFinished(*self.ledger.folds.key))
            else:
                self.tell(ev.ModelPrepared(min(self.ledger.preparing)))

    def resident_models(self) -> set[str]:
        """Models that can go on stage."""
        return {m.name for m in self.machine.residency.models.values() if m.is_ready}

    # -- questions about the past ---------------------------------------------------------------------

    def of(self, kind: type[ac.Action]) -> list[Any]:
        """All actions of a kind so far."""
        return [action for _, action in self.log if isinstance(action, kind)]

    @property
    def loaded(self) -> list[str]:
        """Blobs in the order in which their loads were started."""
        return [load.blob for load in self.of(ac.StartLoad)]

    @property
    def ran(self) -> list[str]:
        """Models in the order in which they went on deck."""
        return [action.model for action in self.of(ac.PutOnDeck)]


def busy_world(pages: int, *infos: ModelInfo, **options: Any) -> World:
    """A world that runs by itself; prefetching is off unless asked for, so that examples stay small."""
    policy = options.pop("policy", PolicySettings(prefetch=False))
    loaders, stage = options.pop("loaders", ScriptedLoaders()), options.pop("stage", ScriptedStage())
    return World(pages, models=infos, loaders=loaders, stage=stage, policy=policy, **options)


QUIET = PolicySettings(prefetch=False)


def by_hand(
    pages: int, *names_and_pages: tuple[str, BlobInfo | int], policy: PolicySettings = QUIET, loaders: int = 1
) -> World:
    """Nothing happens but what the test tells."""
    world = World(pages, models=[model(n, p) for n, p in names_and_pages], policy=policy)
    for loader_id in range(loaders):
        world.tell(ev.LoaderReady(loader_id))
    return world


def on_stage(world: World, name: str) -> str:
    """A request that runs on and on."""
    world.make_resident(name)
    request = world.ask(name)
    world.tell(ev.RunStarted(request))
    return request


def loading(world: World) -> list[str]:
    return [load.blob.split(".")[0] for load in world.ledger.loads.values()]


def photograph(thing: Any, seen: dict[int, int] | None = None) -> Any:
    """A machine's whole state as plain nested tuples, to compare before and after."""
    seen = {} if seen is None else seen
    if thing is None or isinstance(thing, (str, int, float, bool, bytes, Enum)):
        return thing
    if id(thing) in seen:
        return ("again", seen[id(thing)])
    seen[id(thing)] = len(seen)
    if isinstance(thing, (set, frozenset)):
        parts = sorted(thing, key=lambda x: getattr(x, "key", None) or str(x))
        return ("set", tuple(photograph(x, seen) for x in parts))
    if isinstance(thing, Mapping):
        return ("map", tuple((photograph(k, seen), photograph(v, seen)) for k, v in thing.items()))
    if isinstance(thing, (list, tuple, deque)):
        return (type(thing).__name__, tuple(photograph(x, seen) for x in thing))
    if callable(thing):
        return ("callable",)
    names = [
        *getattr(thing, "__dict__", ()),
        *(s for c in type(thing).__mro__ for s in getattr(c, "__slots__", ())),
    ]
    return (type(thing).__name__, tuple((n, photograph(getattr(thing, n), seen)) for n in names))
