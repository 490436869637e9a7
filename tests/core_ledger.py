"""Independent books about a core machine: what is under way, who was answered, whose bytes are whose.

`Ledger` is told the events that went in and the actions that came out, keeps its own account by the contract
in `core/actions.py`, and complains when the machine breaks it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from core_fair_ledger import FairLedger
from core_fold_ledger import FoldLedger
from core_idle_hands import check_no_idle_hands
from core_pool_ledger import PoolLedger
from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import ModelInfo, Outcome, RequestInfo

PAGE = 4096


def _rounded(size_bytes: int) -> int:
    return -(-max(1, size_bytes) // PAGE) * PAGE


@dataclass
class Held:
    """Bytes of the arena that nobody else may touch, in the ledger's opinion."""

    start: int
    end: int
    blob: str
    generation: int
    kind: str  # filling, viewing, resident, moving, quarantined
    free_at_s: float | None = None


@dataclass
class Ledger:
    """What is under way, who was answered, and whose bytes are whose; told by events and actions alone."""

    machine: Machine
    arena_bytes: int
    grace_s: float
    pool: PoolLedger
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
    waiting: dict[str, RequestInfo] = field(default_factory=dict)
    leases: dict[str, ModelInfo] = field(default_factory=dict)
    coming: dict[str, ModelInfo] = field(default_factory=dict)
    leaving: dict[str, ModelInfo] = field(default_factory=dict)
    can_serve: dict[str, bool] = field(default_factory=dict)  # by its successor's key
    deck: set[str] = field(default_factory=set)
    max_batch: dict[str, int] = field(default_factory=dict)  # by edition
    cannot_batch: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    unreleased: set[str] = field(default_factory=set)
    encoding: set[str] = field(default_factory=set)
    infos: dict[str, RequestInfo] = field(default_factory=dict)
    moves: dict[tuple[str, int], ac.MoveExtent] = field(default_factory=dict)
    loads_rest: bool = False
    last_generation: int = 0
    pinned: set[str] = field(default_factory=set)
    folds: FoldLedger = field(default_factory=FoldLedger)
    evictions: list[str] = field(default_factory=list)

    # -- what goes in, before the machine sees it -----------------------------------------------------

    def __post_init__(self) -> None:
        self.fair = FairLedger(self.machine)

    def before(self, event: ev.Event, now_s: float) -> None:
        match event:
            case ev.RequestReceived(request=info):
                self.received[info.request_id] += 1
                self.infos[info.request_id] = info
                self.waiting[info.request_id] = info
            case ev.CopiesFound():
                sizes = {blob.key: blob.size_bytes for info in self.models.values() for blob in info.blobs}
                self.pool.found(event, sizes)
            case ev.CopiesDropWanted():
                self.pool.dropped()
            case ev.ModelAdded(model=info):
                self.models[info.name] = info
                self.max_batch[info.key] = info.max_batch
            case ev.MaxBatchChanged(name=name, max_batch=max_batch):
                keys = [self.models[name].key]
                keys += [info.key for info in self.coming.values() if info.name == name]
                self.max_batch |= dict.fromkeys(keys, max_batch)
            case ev.ModelReplaced(model=info):
                old = self.machine.residency.models[info.name]
                self.can_serve[info.key] = old.key in self.prepared and not old.is_unfit
                self.coming[info.key] = info
                self.max_batch[info.key] = info.max_batch
            case ev.ModelRemoved(name=name):
                self.retiring.add(name)
                self.pinned.discard(name)
            case ev.PinChanged(name=name, pinned=pinned):
                (self.pinned.add if pinned else self.pinned.discard)(name)
            case ev.LoaderReady(loader_id=loader_id):
                self.loaders[loader_id] = None
            case ev.LoaderLost(loader_id=loader_id):
                load_id = self.loaders.pop(loader_id, None)
                self.lost[loader_id] = []
                if load_id is not None:
                    load = self.loads.pop(load_id)
                    self.pool.loader_lost(loader_id, load)
                    if load.offset is not None:
                        held = self._filling(load)
                        held.kind = "quarantined"
                        self.lost[loader_id].append(held)
            case ev.LoaderReaped(loader_id=loader_id):
                self.pool.loader_reaped(loader_id, now_s + self.grace_s)
                for held in self.lost.pop(loader_id, []):
                    held.free_at_s = now_s + self.grace_s
            case ev.LoadFinished(load_id=load_id):
                load = self._load_ended(load_id)
                self.pool.finished(load)
                if load.offset is not None:
                    self._filling(load).kind = "viewing"
            case ev.LoadFailed(load_id=load_id) | ev.LoadCancelled(load_id=load_id):
                load = self._load_ended(load_id)
                self.pool.ended_empty(load)
                if load.offset is not None:
                    self.held.remove(self._filling(load))
            case ev.FoldFinished(overlay=key, generation=generation):
                self.folds.ended(key, generation)
                self._holder(key, generation).kind = "viewing"
            case (
                ev.FoldFailed(overlay=key, generation=generation)
                | ev.FoldCancelled(overlay=key, generation=generation)
            ):
                self.folds.ended(key, generation)
                self.held.remove(self._holder(key, generation))
            case ev.ExtentMoved(blob=key, generation=generation):
                move, held = self.moves.pop((key, generation)), self._holder(key, generation)
                held.end, held.kind = held.start + _rounded(move.size_bytes), "viewing"
            case ev.MoveFailed(blob=key, generation=generation):
                del self.moves[key, generation]
                self.held.remove(self._holder(key, generation))
            case ev.ViewsBuilt(blob=key, generation=generation):
                del self.views[key, generation]
                self._holder(key, generation).kind = "resident"
            case ev.ViewsFailed(blob=key, generation=generation):
                del self.views[key, generation]
            case ev.ModelPrepared(key=key, can_batch=can_batch):
                if not can_batch:
                    self.cannot_batch.add(key)
                self.preparing.remove(key)
                self.prepared.add(key)
            case ev.ModelPreparationFailed(key=key):
                self.preparing.remove(key)
            case ev.RunStarted(request_id=request_id):
                self.deck.remove(request_id)
                self.running.add(request_id)
            case ev.RunEnded(request_id=request_id, outcome=outcome):
                self.deck.discard(request_id)
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
        self.pool.pass_time(now_s)

    def _filling(self, load: ac.StartLoad) -> Held:
        return next(h for h in self.held if h.kind == "filling" and h.generation == load.generation)

    def _load_ended(self, load_id: int) -> ac.StartLoad:
        load = self.loads.pop(load_id)
        self.loaders[load.loader_id] = None
        return load

    def _holder(self, key: str, generation: int) -> Held:
        return next(h for h in self.held if (h.blob, h.generation) == (key, generation))

    # -- what comes out -------------------------------------------------------------------------------

    def after(self, event: ev.Event, actions: Iterable[ac.Action], now_s: float) -> None:
        actions = list(actions)
        if isinstance(event, ev.LoadFinished | ev.FoldFinished | ev.ExtentMoved):
            # Nobody wants it any more: no views, its bytes are free.
            building = {(a.blob, a.generation) for a in actions if isinstance(a, ac.BuildViews)}
            pending = building | self.views.keys()
            self.held = [h for h in self.held if h.kind != "viewing" or (h.blob, h.generation) in pending]
        for action in actions:
            self._take(action, now_s)
        self._same_as_machine()
        self.fair.same_as_machine(now_s)
        check_no_idle_hands(self, now_s)

    def _take(self, action: ac.Action, now_s: float) -> None:
        match action:
            case ac.AcceptRequest(request_id=request_id):
                assert request_id in self.waiting and request_id not in self.accepted
                self.accepted[request_id] = action
                self.fair.admitted(self.infos[request_id], now_s)
            case ac.AnswerRequest(request_id=request_id):
                assert self.received[request_id] == 1, f"{request_id} was never received"
                assert request_id not in self.answers, f"{request_id} is answered twice"
                self.answers[request_id] = action
                self.waiting.pop(request_id, None)
                self.fair.answered(request_id, now_s)
            case ac.StartLoad():
                self._start_load(action)
            case ac.CancelLoad(load_id=load_id):
                assert load_id in self.loads and load_id not in self.told_to_stop
                self.told_to_stop.add(load_id)
            case ac.Fold():
                self._start_fold(action)
            case ac.CancelFold():
                self.folds.stop(action)
            case ac.MoveExtent():
                self._move(action)
            case ac.PauseLoads(is_paused=is_paused):
                assert is_paused is not self.loads_rest, "told twice"
                self.loads_rest = is_paused
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
            case ac.PrepareModel(key=key):
                assert key in self._alive() and key not in self.preparing | self.prepared
                self.preparing.add(key)
            case ac.PutOnDeck():
                self._put_on_deck(action, now_s)
            case ac.CancelRun(request_id=request_id):
                assert request_id in self.deck | self.running
            case ac.ForgetModel(key=key):
                self.cannot_batch.discard(key)
                assert key not in self.preparing and key not in {x.key for x in self.leases.values()}
                self.prepared.discard(key)
            case ac.RetireModel(name=name):
                is_surplus = self.models[name].is_derived and name not in self.pinned
                assert name in self.retiring or is_surplus
                assert self.models[name] not in self.leases.values()
                assert self.models[name].key not in self.preparing | self.prepared
                assert all(info.model != name for info in self.waiting.values())
                self.retiring.discard(name)
                del self.models[name]
            case ac.AdoptEdition() | ac.RejectEdition() | ac.RetireEdition():
                self._edition(action)

    def _alive(self) -> set[str]:
        return {info.key for info in self.models.values()} | self.coming.keys() | self.leaving.keys()

    def _edition(self, action: ac.AdoptEdition | ac.RejectEdition | ac.RetireEdition) -> None:
        """Nobody waits for an edition's parts because of the swap, and nobody loses what it uses."""
        match action:
            case ac.AdoptEdition(name=name, key=key):
                old = self.models[name]
                assert key in self.prepared or not self.can_serve[key], f"{old.key} could still serve"
                self.models[name] = self.coming.pop(key)
                self.leaving[old.key] = old
            case ac.RejectEdition(name=name, key=key):
                assert key not in self.preparing | self.prepared and self.models[name].key != key
            case ac.RetireEdition(name=name, key=key):
                assert key not in self.preparing | self.prepared
                assert key not in {info.key for info in self.leases.values()}
                gone = self.leaving.pop(key, None) or self.coming.pop(key)
                assert gone.name == name

    def _start_load(self, load: ac.StartLoad) -> None:
        assert self.loaders[load.loader_id] is None, "a loader has one load at a time"
        self.loaders[load.loader_id] = load.load_id
        self.loads[load.load_id] = load
        self.pool.start(load)
        assert all(h.blob != load.blob or h.kind == "quarantined" for h in self.held), "resident twice"
        if load.offset is not None:
            self._fill(load.blob, load.offset, load.size_bytes, load.generation)

    def _start_fold(self, fold: ac.Fold) -> None:
        assert all(h.blob != fold.overlay for h in self.held), "resident twice"
        infos = (*self.models.values(), *self.leaving.values())
        overlay = next(blob for info in infos for blob in info.blobs if blob.key == fold.overlay)
        self.folds.start(fold, overlay, {h.blob: h.start for h in self.held if h.kind == "resident"})
        self._fill(fold.overlay, fold.offset, fold.size_bytes, fold.generation)

    def _fill(self, key: str, offset: int, size_bytes: int, generation: int) -> None:
        """Over bytes that are nobody's, a base's or an adapter's least of all."""
        assert generation > self.last_generation
        self.last_generation = generation
        end = offset + _rounded(size_bytes)
        assert 0 <= offset < end <= self.arena_bytes
        clash = [h for h in self.held if offset < h.end and h.start < end]
        assert not clash, f"{key} over {clash}"
        self.held.append(Held(offset, end, key, generation, "filling"))

    def _move(self, move: ac.MoveExtent) -> None:
        """Down, over bytes that are nobody's, after its views were dropped, while nobody uses it."""
        assert self.evictions.pop() == move.blob and move.to_offset < move.offset
        assert move.generation > self.last_generation
        self.last_generation = move.generation
        end = move.offset + _rounded(move.size_bytes)
        clash = [h for h in self.held if move.to_offset < h.end and h.start < end]
        assert not clash, f"{move} over {clash}"
        self.held.append(Held(move.to_offset, end, move.blob, move.generation, "moving"))
        self.moves[move.blob, move.generation] = move

    def _put_on_deck(self, action: ac.PutOnDeck, now_s: float) -> None:
        assert not self.deck, "one batch on deck at a time"
        key, batch = action.model, (action.request_id, *action.companions)
        first = self.waiting[action.request_id]
        info = self.models[first.model]
        assert info.key == key and key in self.prepared, "only what its name stands for now"
        resident = {h.blob for h in self.held if h.kind == "resident"}
        assert {b.key for b in info.blobs} <= resident, f"{key} is not all there"
        self._check_batch(first, [self.waiting[name] for name in action.companions], key)
        for request_id in batch:
            del self.waiting[request_id]
            self.leases[request_id] = info
            self.fair.on_deck(request_id, now_s)
        self.deck = set(batch)

    def _check_batch(self, first: RequestInfo, companions: list[RequestInfo], key: str) -> None:
        """They fit together, the model allows so many, and the first in the fair order go."""
        if not companions:
            return
        assert first.batch_key and key not in self.cannot_batch
        assert sum(info.images for info in (first, *companions)) <= self.max_batch[key]

        def kind(info: RequestInfo) -> tuple[str, int, str]:
            return (info.model, info.priority, info.batch_key)

        fitting = [i for i in self.waiting.values() if kind(i) == kind(first) and i is not first]
        fitting.sort(key=lambda info: self.fair.waiting[info.request_id].turn)
        assert companions == fitting[: len(companions)]

    def leased_blobs(self) -> set[str]:
        return {b.key for info in self.leases.values() for b in info.blobs} | self.folds.sources

    def _same_as_machine(self) -> None:
        """The machine believes the same about every byte."""
        mine = {(h.start, h.end - h.start, h.blob) for h in self.held}
        theirs = {(e.offset, e.size_bytes, e.blob) for e in self.machine.residency.arena}
        assert mine == theirs, f"ledger {mine - theirs}, machine {theirs - mine}"
        self.pool.same_as_machine()
        assert self.waiting.keys() == {r.id for r in self.machine.queue.waiting()}

    @property
    def is_nothing_under_way(self) -> bool:
        return not (
            self.loads
            or self.folds.under_way
            or self.views
            or self.moves
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
