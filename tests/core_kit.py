"""A world for the core machine: virtual time, scripted fakes, and a ledger that trusts nothing.

`Ledger` keeps its own books from the events that went in and the actions that came out, by the contract
in `core/actions.py`, and complains when the machine breaks it. `World` drives a machine: by hand (`tell`)
or, with `ScriptedLoaders` and `ScriptedStage`, through virtual time (`run`). As a context manager it runs
to the end and checks that everything was answered and every byte came back.
"""

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core import invariants
from understudyd.core.machine import Machine
from understudyd.core.policy import PolicySettings
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, Outcome, RequestInfo

PAGE = 4096


def blob(key: str, pages: int) -> BlobInfo:
    return BlobInfo(key, pages * PAGE)


def model(name: str, *blobs: BlobInfo | int) -> ModelInfo:
    """A model; a bare number is a blob of its own with so many pages."""
    own = (blob(f"{name}.{i}", b) if isinstance(b, int) else b for i, b in enumerate(blobs))
    return ModelInfo(name, tuple(own))


class VirtualClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 100.0


# -- the ledger ---------------------------------------------------------------------------------------


@dataclass
class Held:
    """Bytes of the arena that nobody else may touch, in the ledger's opinion."""

    start: int
    end: int
    blob: str
    generation: int
    kind: str  # filling, viewing, resident, quarantined
    free_at_s: float | None = None


@dataclass
class Waiting:
    info: RequestInfo
    received_at_s: float
    overtaken: int = 0


@dataclass
class Ledger:
    """What is under way, who was answered, and whose bytes are whose; told by events and actions alone."""

    machine: Machine
    arena_bytes: int
    grace_s: float
    models: dict[str, ModelInfo] = field(default_factory=dict)
    retiring: set[str] = field(default_factory=set)
    loaders: dict[int, int | None] = field(default_factory=dict)
    lost: dict[int, list[Held]] = field(default_factory=dict)
    loads: dict[int, ac.StartLoad] = field(default_factory=dict)
    told_to_stop: set[int] = field(default_factory=set)
    held: list[Held] = field(default_factory=list)
    views: dict[tuple[str, int], ac.BuildViews] = field(default_factory=dict)
    preparing: set[str] = field(default_factory=set)
    prepared: set[str] = field(default_factory=set)
    received: Counter[str] = field(default_factory=Counter)
    answers: dict[str, ac.AnswerRequest] = field(default_factory=dict)
    accepted: dict[str, ac.AcceptRequest] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)
    leases: dict[str, str] = field(default_factory=dict)
    deck: str | None = None
    running: set[str] = field(default_factory=set)
    unreleased: set[str] = field(default_factory=set)
    encoding: set[str] = field(default_factory=set)
    infos: dict[str, RequestInfo] = field(default_factory=dict)
    last_generation: int = 0
    evictions: list[str] = field(default_factory=list)

    # -- what goes in, before the machine sees it -----------------------------------------------------

    def before(self, event: ev.Event, now_s: float) -> None:
        match event:
            case ev.RequestReceived(request=info):
                self.received[info.request_id] += 1
                self.infos[info.request_id] = info
                self.waiting[info.request_id] = Waiting(info, now_s)
            case ev.ModelAdded(model=info):
                self.models[info.name] = info
            case ev.ModelRemoved(name=name):
                self.retiring.add(name)
            case ev.LoaderReady(loader_id=loader_id):
                self.loaders[loader_id] = None
            case ev.LoaderLost(loader_id=loader_id):
                load_id = self.loaders.pop(loader_id, None)
                self.lost[loader_id] = []
                if load_id is not None:
                    held = self._filling(self.loads.pop(load_id))
                    held.kind = "quarantined"
                    self.lost[loader_id].append(held)
            case ev.LoaderReaped(loader_id=loader_id):
                for held in self.lost.pop(loader_id, []):
                    held.free_at_s = now_s + self.grace_s
            case ev.LoadFinished(load_id=load_id):
                self._load_ended(load_id).kind = "viewing"
            case ev.LoadFailed(load_id=load_id) | ev.LoadCancelled(load_id=load_id):
                self.held.remove(self._load_ended(load_id))
            case ev.ViewsBuilt(blob=key, generation=generation):
                del self.views[key, generation]
                self._holder(key, generation).kind = "resident"
            case ev.ViewsFailed(blob=key, generation=generation):
                del self.views[key, generation]
            case ev.ModelPrepared(name=name):
                self.preparing.remove(name)
                self.prepared.add(name)
            case ev.ModelPreparationFailed(name=name):
                self.preparing.remove(name)
            case ev.RunStarted(request_id=request_id):
                assert self.deck == request_id
                self.deck = None
                self.running.add(request_id)
            case ev.RunEnded(request_id=request_id, outcome=outcome):
                if self.deck == request_id:
                    self.deck = None
                self.running.discard(request_id)
                self.unreleased.add(request_id)
                if outcome is Outcome.FINISHED:
                    self.encoding.add(request_id)
            case ev.LeaseEnded(request_id=request_id):
                self.unreleased.remove(request_id)
                del self.leases[request_id]
            case ev.ImagesEncoded(request_id=request_id) | ev.EncodingFailed(request_id=request_id):
                self.encoding.remove(request_id)
            case _:
                pass
        self.held = [h for h in self.held if h.free_at_s is None or h.free_at_s > now_s]

    def _filling(self, load: ac.StartLoad) -> Held:
        return next(h for h in self.held if h.kind == "filling" and h.generation == load.generation)

    def _load_ended(self, load_id: int) -> Held:
        load = self.loads.pop(load_id)
        self.loaders[load.loader_id] = None
        return self._filling(load)

    def _holder(self, key: str, generation: int) -> Held:
        return next(h for h in self.held if (h.blob, h.generation) == (key, generation))

    # -- what comes out -------------------------------------------------------------------------------

    def after(self, event: ev.Event, actions: Iterable[ac.Action], now_s: float) -> None:
        actions = list(actions)
        if isinstance(event, ev.LoadFinished):  # nobody wants it any more: no views, its bytes are free
            building = {(a.blob, a.generation) for a in actions if isinstance(a, ac.BuildViews)}
            pending = building | self.views.keys()
            self.held = [h for h in self.held if h.kind != "viewing" or (h.blob, h.generation) in pending]
        for action in actions:
            self._take(action, now_s)
        self._same_as_machine()

    def _take(self, action: ac.Action, now_s: float) -> None:
        match action:
            case ac.AcceptRequest(request_id=request_id):
                assert request_id in self.waiting and request_id not in self.accepted
                self.accepted[request_id] = action
            case ac.AnswerRequest(request_id=request_id):
                assert self.received[request_id] == 1, f"{request_id} was never received"
                assert request_id not in self.answers, f"{request_id} is answered twice"
                self.answers[request_id] = action
                self.waiting.pop(request_id, None)
            case ac.StartLoad():
                self._start_load(action)
            case ac.CancelLoad(load_id=load_id):
                assert load_id in self.loads and load_id not in self.told_to_stop
                self.told_to_stop.add(load_id)
            case ac.BuildViews(blob=key, generation=generation):
                assert self._holder(key, generation).kind == "viewing"
                self.views[key, generation] = action
            case ac.DropViews(blob=key, generation=generation):
                held = self._holder(key, generation)
                assert held.kind in ("resident", "viewing"), f"{key} was evicted while {held.kind}"
                assert key not in self.leased_blobs(), f"{key} was evicted while leased"
                assert (key, generation) not in self.views, f"{key} lost its views while they were built"
                self.held.remove(held)
                self.evictions.append(key)
            case ac.PrepareModel(name=name):
                assert name in self.models and name not in self.preparing | self.prepared
                self.preparing.add(name)
            case ac.PutOnDeck(request_id=request_id, model=name):
                self._put_on_deck(request_id, name, now_s)
            case ac.CancelRun(request_id=request_id):
                assert request_id == self.deck or request_id in self.running
            case ac.ForgetModel(name=name):
                assert name in self.retiring
                self.prepared.discard(name)
            case ac.RetireModel(name=name):
                assert name in self.retiring and name not in self.leases.values()
                assert name not in self.preparing
                assert all(w.info.model != name for w in self.waiting.values())
                self.retiring.remove(name)
                del self.models[name]

    def _start_load(self, load: ac.StartLoad) -> None:
        assert self.loaders[load.loader_id] is None, "a loader has one load at a time"
        self.loaders[load.loader_id] = load.load_id
        assert load.generation > self.last_generation
        self.last_generation = load.generation
        assert all(h.blob != load.blob or h.kind == "quarantined" for h in self.held), "resident twice"
        end = load.offset + -(-max(1, load.size_bytes) // PAGE) * PAGE
        assert 0 <= load.offset < end <= self.arena_bytes
        clash = [h for h in self.held if load.offset < h.end and h.start < end]
        assert not clash, f"{load} over {clash}"
        self.held.append(Held(load.offset, end, load.blob, load.generation, "filling"))
        self.loads[load.load_id] = load

    def _put_on_deck(self, request_id: str, name: str, now_s: float) -> None:
        assert self.deck is None, "one on deck at a time"
        chosen = self.waiting.pop(request_id)
        assert chosen.info.model == name and name in self.prepared
        resident = {h.blob for h in self.held if h.kind == "resident"}
        assert {b.key for b in self.models[name].blobs} <= resident, f"{name} is not all there"
        self.deck, self.leases[request_id] = request_id, name
        self._overtaking(chosen, now_s)

    def _overtaking(self, chosen: Waiting, now_s: float) -> None:
        """Nobody is overtaken beyond the bounds, unless nothing can be done for it at the moment."""
        bounds = self.machine.policy.settings
        if bounds.order == "fcfs":
            assert all(w.info.priority <= chosen.info.priority for w in self._earlier(chosen))
            return
        for waiting in self._earlier(chosen):
            at_bound = (
                waiting.overtaken >= bounds.max_skips
                or now_s >= waiting.received_at_s + bounds.max_wait_s
            )
            entity = self.machine.residency.models[waiting.info.model]
            held_up = self.machine.residency.is_held_up(entity, now_s)
            assert not at_bound or held_up, f"{waiting} was overtaken by {chosen.info} beyond its bound"
            waiting.overtaken += 1

    def _earlier(self, chosen: Waiting) -> list[Waiting]:
        order = list(self.received)
        rank = order.index(chosen.info.request_id)
        return [w for w in self.waiting.values() if order.index(w.info.request_id) < rank]

    def leased_blobs(self) -> set[str]:
        return {b.key for name in self.leases.values() for b in self.models[name].blobs}

    def _same_as_machine(self) -> None:
        """The machine believes the same about every byte."""
        mine = {(h.start, h.end - h.start, h.blob) for h in self.held}
        theirs = {(e.offset, e.size_bytes, e.blob) for e in self.machine.residency.arena}
        assert mine == theirs, f"ledger {mine - theirs}, machine {theirs - mine}"
        assert self.waiting.keys() == {r.id for r in self.machine.queue.waiting()}

    @property
    def is_nothing_under_way(self) -> bool:
        return not (
            self.loads
            or self.views
            or self.preparing
            or self.deck
            or self.running
            or self.unreleased
            or self.encoding
            or self.lost
        )

    def resident(self) -> list[str]:
        """Blobs that can be bound, by offset."""
        return [h.blob for h in sorted(self.held, key=lambda h: h.start) if h.kind == "resident"]


# -- fakes --------------------------------------------------------------------------------------------


@dataclass
class ScriptedLoaders:
    """Loaders that take `seconds_per_page`, fail and crash as told.

    `faults[blob]` is consumed load by load: None succeeds, an error code fails, "crash" kills the loader
    (a new one follows after `respawn_s`), "hang" never ends. After the script every load succeeds.
    """

    count: int = 2
    seconds_per_page: float = 1.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, Iterable[ErrorCode | str | None]] = field(default_factory=dict)
    respawn_s: float = 0.5
    stops_when_told: bool = True

    def __post_init__(self) -> None:
        self._scripts = {key: deque(script) for key, script in self.faults.items()}
        self._ids = itertools.count(self.count)
        self._cancelled: set[int] = set()

    def start(self, world: "World") -> None:
        for loader_id in range(self.count):
            world.tell(ev.LoaderReady(loader_id))

    def load(self, world: "World", load: ac.StartLoad) -> None:
        took_s = self.seconds.get(load.blob, self.seconds_per_page * load.size_bytes / PAGE)
        script = self._scripts.get(load.blob)
        match script.popleft() if script else None:
            case None:
                world.later(took_s, ev.LoadFinished(load.load_id), load.load_id)
            case "crash":
                gone = load.loader_id
                world.later(took_s, ev.LoaderLost(gone, "signal 9"), load.load_id)
                world.later(took_s + self.respawn_s / 2, ev.LoaderReaped(gone))
                world.later(took_s + self.respawn_s, ev.LoaderReady(next(self._ids)))
            case "hang":
                pass
            case ErrorCode() as code:
                world.later(took_s, ev.LoadFailed(load.load_id, code, "as told"), load.load_id)

    def cancel(self, world: "World", load_id: int) -> None:
        if self.stops_when_told:
            world.forget(load_id)
            world.later(0.01, ev.LoadCancelled(load_id))


@dataclass
class ScriptedStage:
    """A stage that takes the times it is told, one run at a time, and fails what it is told to fail."""

    run_s: float = 5.0
    lease_lag_s: float = 0.001
    encode_s: float = 0.2
    views_s: float = 0.01
    prepare_s: float = 0.1
    broken: frozenset[str] = frozenset()
    faults: Mapping[str, ErrorCode] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._deck: str | None = None
        self._running: str | None = None

    def put_on_deck(self, world: "World", request_id: str) -> None:
        self._deck = request_id
        self._go(world)

    def _go(self, world: "World") -> None:
        if self._running is None and self._deck is not None:
            self._running, self._deck = self._deck, None
            self.ran.append(self._running)
            world.later(0.0, ev.RunStarted(self._running), self._running)
            code = self.faults.get(self._running)
            self._end_later(world, self.run_s, Outcome.FAILED if code else Outcome.FINISHED, code)

    def _end_later(self, world: "World", after_s: float, outcome: Outcome, code: ErrorCode | None) -> None:
        assert self._running is not None
        world.later(after_s, ev.RunEnded(self._running, outcome, code), self._running)

    def cancel(self, world: "World", request_id: str) -> None:
        if self._deck == request_id:
            self._deck = None
            world.later(0.0, ev.RunEnded(request_id, Outcome.CANCELLED))
        elif self._running == request_id and request_id in world.ledger.running:
            world.forget(request_id)
            self._end_later(world, 0.1, Outcome.CANCELLED, None)

    def ended(self, world: "World", event: ev.RunEnded) -> None:
        world.later(self.lease_lag_s, ev.LeaseEnded(event.request_id))
        if event.outcome is Outcome.FINISHED:
            world.later(self.encode_s, ev.ImagesEncoded(event.request_id))
        if self._running == event.request_id:
            self._running = None
            self._go(world)


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
    ) -> None:
        self.clock = VirtualClock()
        self.machine = Machine(
            pages * PAGE, policy=policy, max_waiting=max_waiting, quarantine_grace_s=grace_s
        )
        self.ledger = Ledger(self.machine, pages * PAGE, grace_s)
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
        """One event; every invariant is checked after it."""
        self.events += 1
        self.ledger.before(event, self.now_s)
        actions = self.machine.handle(event, self.now_s)
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
    ) -> str:
        """A request for a model; returns its id."""
        request_id = id or f"r{next(self._request_ids)}"
        deadline = None if deadline_in_s is None else self.now_s + deadline_in_s
        self.tell(ev.RequestReceived(RequestInfo(request_id, client, name, priority, deadline)))
        return request_id

    def answer(self, request_id: str) -> ErrorCode | None | str:
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
        assert residency.arena.free_bytes == residency.arena.largest_gap_bytes == self.ledger.arena_bytes
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
                case ac.PrepareModel(name=name) if name in self.stage.broken:
                    self.later(self.stage.prepare_s, ev.ModelPreparationFailed(name, "as told"))
                case ac.PrepareModel(name=name):
                    self.later(self.stage.prepare_s, ev.ModelPrepared(name))
                case ac.PutOnDeck(request_id=request_id):
                    self.stage.put_on_deck(self, request_id)
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
    names = [*getattr(thing, "__dict__", ()), *(s for c in type(thing).__mro__ for s in getattr(c, "__slots__", ()))]
    return (type(thing).__name__, tuple((n, photograph(getattr(thing, n), seen)) for n in names))
