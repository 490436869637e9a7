"""Everything that can happen to the core machine, chosen by somebody else.

`Walk` knows which events the contract allows (and which it does not) in the present state of its world.
Who chooses is an argument: hypothesis, which shrinks, or a seeded `random.Random`, which goes far.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from core_kit import World, blob, derived, model, overlay, photograph
from core_ledger import PAGE
from understudyd.core import events as ev
from understudyd.core.pace import MUCH
from understudyd.core.policy import PolicySettings
from understudyd.core.states import IllegalEvent
from understudyd.core.types import BlobInfo, ErrorCode, ModelInfo, Outcome, RequestInfo

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]

NAMES = ["a", "b", "c", "d", "e", "f"]
CLIENTS = ["ann", "ann", "bob", "cy"]
MAX_LOADERS = 3
MAX_RUNNING = 2
MAX_DERIVED = 4
ADAPTERS = [blob("ink", 1), blob("wax", 1), blob("oil", 2)]
FAULTS = [ErrorCode.LOAD_FAILED, ErrorCode.MODEL_CORRUPT]
FOLD_FAULTS = [ErrorCode.INTERNAL, ErrorCode.INTERNAL, ErrorCode.BAD_REQUEST]


def family(choose: Choose[int]) -> dict[str, ModelInfo]:
    """Six models of one to three blobs; some blobs are shared, as fine-tunes share their VAE."""
    pages = range(1, 6)
    shared = [blob(f"shared{i}", choose(pages)) for i in range(2)]
    infos = {}
    for name in NAMES:
        which = choose(range(4))
        own = [choose(pages) for _ in range(choose(range(1, 3)))]
        infos[name] = model(name, *shared[which : which + 1], *own, max_batch=choose([1, 2, 4, 4]))
    return infos


def leftovers(infos: dict[str, ModelInfo], choose: Choose) -> ev.CopiesFound | None:
    """What another daemon may have left in the pool, some of it nonsense."""
    if choose(range(3)) == 0:
        return None
    blobs = [b for info in infos.values() for b in info.blobs]
    copies, place = [], 0
    for _ in range(choose(range(5))):
        kept = choose(blobs)
        offset = place + choose([0, 0, 0, 0, PAGE, 100, -PAGE])
        size_bytes = kept.size_bytes + choose([0, 0, 0, 0, 1])
        copies.append(ev.KeptCopy(choose([kept.key, kept.key, kept.key, "?"]), offset, size_bytes))
        place += kept.size_bytes
    return ev.CopiesFound(tuple(copies), tuple(choose([*NAMES, "?"]) for _ in range(choose(range(4)))))


class Walk:
    """One world and all ways on. `choose(options)` picks one of a non-empty sequence."""

    def __init__(
        self,
        infos: dict[str, ModelInfo],
        policy: PolicySettings,
        pages: int,
        loaders: int,
        pool_pages: int = 0,
        much: int = MUCH,
        found: ev.CopiesFound | None = None,
    ) -> None:
        self.infos = infos
        first = list(infos.values())[:4]
        self.world = World(
            pages,
            pool_pages=pool_pages,
            models=first,
            policy=policy,
            max_waiting=6,
            max_derived=MAX_DERIVED,
            much=much,
            waits_every=3,
        )
        if found is not None:
            self.world.tell(found)
        self.ledger = self.world.ledger
        self.next_loader_id = self.editions = 0
        for _ in range(loaders):
            self._new_loader()

    def _new_loader(self) -> None:
        self.next_loader_id += 1
        self.world.tell(ev.LoaderReady(self.next_loader_id))

    def usable(self) -> list[str]:
        """Models that may be asked for."""
        return [name for name in self.ledger.models if name not in self.ledger.retiring]

    def _next_edition(self) -> int:
        self.editions += 1
        return self.editions

    def _successor(self, name: str, choose: Choose) -> ModelInfo:
        """The same bytes again, some of them, somebody else's, or all new ones."""
        edition, old = self._next_edition(), self.ledger.models[name]
        new = model(name, choose(range(1, 6)), edition=edition).blobs
        kept = choose([old.blobs, old.blobs[:1] + new, new, self.infos[choose(NAMES)].blobs[:1] + new])
        return ModelInfo(name, kept, edition, choose([1, 3]))

    def _derive(self, choose: Choose) -> str | None:
        """A model with adapters, known to the machine from now on: over one component, or all of them."""
        bases = [name for name in self.usable() if not self.ledger.models[name].is_derived]
        if not bases:
            return None
        base = self.ledger.models[choose(bases)]
        own = [i for i, blob in enumerate(base.blobs) if not blob.made_of]
        adapters = [choose(ADAPTERS) for _ in range(choose([1, 1, 2]))]
        components = choose([own[:1], own[:1], own[-1:], own])
        info = derived(base, *adapters, components=components, scale=choose([1.0, 0.5]))
        if info.name not in self.ledger.models:
            self.world.tell(ev.ModelAdded(replace(info, edition=self._next_edition())))
        return info.name

    # -- kinds of steps -------------------------------------------------------------------------------

    def ask(self, choose: Choose) -> None:
        """One request, or a few that could share a run."""
        name, key = choose([*self.usable(), *self.usable(), choose(NAMES)]), choose(["", "k", "k", "l"])
        if choose([True, False]):
            name = self._derive(choose) or name
        priority = choose([0, 0, 0, 0, 1, 5])
        for _ in range(choose([1, 1, 1, 4])):
            self.world.ask(
                name,
                client=choose(CLIENTS),
                priority=priority,
                deadline_in_s=choose([None, None, None, None, None, None, 40.0, 0.5, -1.0]),
                cost=choose([1.0, 1.0, 0.25, 4.0]),
                batch_key=key,
                images=choose([1, 1, 1, 2]),
            )

    def take_back(self, choose: Choose) -> None:
        if choose(range(4)) == 3:
            self.world.tell(ev.ClientGone(choose(CLIENTS)))
        else:
            known = list(self.world.machine.queue.requests)
            self.world.tell(ev.RequestCancelled(choose([*known, "unheard of"])))

    def administer(self, choose: Choose) -> None:
        kinds = ["add", "add", "pin", "unpin", "unpin", "load", "evict", "remove", "open", "open", "close"]
        what = choose([*kinds, "replace", "replace", "batch", "settings", "drop"])
        absent = [n for n in NAMES if n not in self.ledger.models]
        if what in ("open", "close"):
            self.world.tell(ev.AdmissionChanged(what == "open"))
        elif what == "drop":
            self.world.tell(ev.CopiesDropWanted())
        elif what == "settings":
            settings = self.world.machine.policy.settings
            fields = {"lookahead": choose([0, 1, 4]), "prefetch": choose([True, False])}
            changed = replace(settings, **fields, pause_priority=choose([None, 1]))
            self.world.tell(ev.SettingsChanged(changed, choose([3, 6])))
        elif what == "add" and absent:
            self.world.tell(ev.ModelAdded(replace(self.infos[choose(absent)], edition=self._next_edition())))
        elif self.usable():
            name = choose(self.usable())
            match what:
                case "remove":
                    self.world.tell(ev.ModelRemoved(name))
                case "pin" | "unpin":
                    self.world.tell(ev.PinChanged(name, what == "pin"))
                case "batch":
                    self.world.tell(ev.MaxBatchChanged(name, choose([1, 2, 3])))
                case "replace":
                    self.world.tell(ev.ModelReplaced(self._successor(name, choose)))
                case "load":
                    self.world.tell(ev.LoadWanted(name))
                case _:
                    self.world.tell(ev.EvictWanted(name))

    def goes_well(self, choose: Choose) -> None:
        """Something that is under way goes on as it should, whatever came first."""
        ledger = self.ledger
        ends: list[ev.Event] = [ev.LoadFinished(i) for i in sorted(ledger.loads)]
        ends += [ev.LoadCancelled(i) for i in sorted(ledger.told_to_stop & ledger.loads.keys())]
        if ledger.folds.under_way is not None:
            ends.append(ev.FoldFinished(*ledger.folds.key))
            ends += [ev.FoldCancelled(*ledger.folds.key)] * ledger.folds.is_told_to_stop
        ends += [ev.ViewsBuilt(*view) for view in sorted(ledger.views)]
        ends += [ev.ExtentMoved(*move) for move in sorted(ledger.moves)]
        ends += [ev.ModelPrepared(key, choose([True, True, False])) for key in sorted(ledger.preparing)]
        if len(ledger.running) < MAX_RUNNING:
            ends += [ev.RunStarted(i) for i in sorted(ledger.deck)]
        ends += [ev.RunEnded(i, Outcome.FINISHED) for i in sorted(ledger.running)]
        ends += [ev.ImagesEncoded(i) for i in sorted(ledger.encoding)]
        ends += [ev.LeaseEnded(i) for i in sorted(ledger.unreleased)]
        ends += [ev.LoaderReaped(i) for i in sorted(ledger.lost)]
        if ends:
            self.world.tell(choose(ends))

    def goes_wrong(self, choose: Choose) -> None:
        """Something that is under way fails."""
        ledger = self.ledger
        ends: list[ev.Event] = [ev.LoadFailed(i, c, "?") for i in sorted(ledger.loads) for c in FAULTS]
        if ledger.folds.under_way is not None:
            ends += [ev.FoldFailed(*ledger.folds.key, code, "?") for code in FOLD_FAULTS]
        ends += [ev.ViewsFailed(*view, "?") for view in sorted(ledger.views)]
        ends += [ev.MoveFailed(*move, "?") for move in sorted(ledger.moves)]
        ends += [
            ev.ModelPreparationFailed(key, "?", b)
            for key in sorted(ledger.preparing)[:1]
            for b in (True, False)
        ]
        on_stage = sorted(ledger.running | ledger.deck)
        ends += [ev.RunEnded(i, o) for i in on_stage for o in (Outcome.FAILED, Outcome.CANCELLED)]
        ends += [ev.EncodingFailed(i, "?") for i in sorted(ledger.encoding)]
        if ends:
            self.world.tell(choose(ends))

    def loaders_change(self, choose: Choose) -> None:
        alive = sorted(self.ledger.loaders)
        what = choose(["more", "more", "more", "fewer", "fewer", "none", "stranger"])
        if what == "stranger":  # a loader that dies before it was ready
            self.next_loader_id += 1
            self.world.tell(ev.LoaderLost(self.next_loader_id, "exec failed"))
            self.world.tell(ev.LoaderReaped(self.next_loader_id))
        elif what == "more" and len(alive) < MAX_LOADERS:
            self._new_loader()
        elif what == "fewer" and alive:
            self.world.tell(ev.LoaderLost(choose(alive), "killed"))
        elif what == "none":
            for loader_id in alive:
                self.world.tell(ev.LoaderLost(loader_id, "killed"))

    def time_passes(self, choose: Choose) -> None:
        """With or without the tick that was due: an event loop may be late."""
        self.world.clock.now_s += choose([0.0, 0.05, 0.3, 1.0, 1.0, 20.0])
        if choose([True, False]):
            self.world.tell(ev.Ticked())

    # -- what cannot be -------------------------------------------------------------------------------

    def what_cannot_be(self, choose: Choose) -> None:
        """An illegal event raises and changes nothing."""
        machine = self.world.machine
        event = choose(list(self.illegal_events()))
        before = photograph(machine)
        with pytest.raises(IllegalEvent):
            machine.handle(event, self.world.now_s)
        assert photograph(machine) == before, f"{event} was refused and yet changed something"

    def illegal_events(self) -> Iterator[ev.Event]:
        """What nobody can report now."""
        yield ev.LoadFinished(10**6)
        yield ev.LoadFailed(10**6, ErrorCode.LOAD_FAILED, "?")
        yield ev.LoadCancelled(10**6)
        known = self.world.machine.residency.loaders.keys()
        yield from (ev.LoaderReady(i) for i in known)
        yield from (ev.LoaderLost(i, "again") for i in self.ledger.lost if i in known)
        yield from (ev.LoaderReaped(i) for i in self.ledger.loaders)
        yield from (ev.ViewsBuilt(h.blob, h.generation) for h in self.ledger.held if h.kind != "viewing")
        live = {(h.blob, h.generation) for h in self.ledger.held}
        unknown = sorted({(h.blob, h.generation + 1) for h in self.ledger.held} - live)
        yield from (ev.ViewsFailed(*extent, "?") for extent in unknown)
        if self.ledger.folds.under_way is not None:
            live.discard(self.ledger.folds.key)
        yield from (ev.FoldFinished(*key) for key in sorted(live))
        yield from (ev.FoldCancelled(*key) for key in sorted(live))
        yield from (ev.FoldFailed(*key, ErrorCode.INTERNAL, "?") for key in unknown)
        yield from (ev.ExtentMoved(h.blob, h.generation) for h in self.ledger.held if h.kind != "moving")
        yield from (ev.MoveFailed(*extent, "?") for extent in unknown)
        if list(self.world.machine.residency.copies.pool):
            yield ev.CopiesFound(())
        settings = self.world.machine.policy.settings
        yield ev.SettingsChanged(replace(settings, max_skips=settings.max_skips + 1), 6)
        yield from self._illegal_about_models()
        yield from self._illegal_about_requests()

    def _illegal_about_models(self) -> Iterator[ev.Event]:
        ledger = self.ledger
        for key in [
            *(info.key for info in ledger.models.values()),
            *ledger.coming,
            *ledger.leaving,
            "nobody",
        ]:
            if key not in ledger.preparing:
                yield ev.ModelPrepared(key)
                yield ev.ModelPreparationFailed(key, "?")
        for info in [*ledger.coming.values(), *ledger.leaving.values()]:
            yield ev.ModelReplaced(info)
        for name in [*ledger.models, "nobody"]:
            if name == "nobody" or name in ledger.retiring:
                yield ev.ModelReplaced(model(name, 1, edition=self.editions + 1))
                yield ev.ModelRemoved(name)
                yield ev.PinChanged(name, True)
                yield ev.LoadWanted(name)
                yield ev.MaxBatchChanged(name, 2)
                yield ev.EvictWanted(name)
        for name, info in ledger.models.items():
            yield ev.ModelAdded(info)
            yield ev.ModelReplaced(info)
            stray = overlay(blob("nobody's", 1), ADAPTERS[0])
            yield ev.ModelAdded(ModelInfo(f"not {name}", (*info.blobs, stray), is_derived=True))
            other = BlobInfo(info.blobs[0].key, info.blobs[0].size_bytes + 1)
            yield ev.ModelAdded(ModelInfo(f"not {name}", (BlobInfo("new", 1), other)))
            yield ev.ModelReplaced(ModelInfo(name, (BlobInfo("new", 1), other), self.editions + 1))

    def _illegal_about_requests(self) -> Iterator[ev.Event]:
        ledger = self.ledger
        for request_id in [*self.world.machine.queue.requests, "unheard of"]:
            if request_id in self.world.machine.queue.requests:
                yield ev.RequestReceived(RequestInfo(request_id, "ann", "a"))
            if request_id in ledger.deck:
                yield ev.RunEnded(request_id, Outcome.FINISHED)
            else:
                yield ev.RunStarted(request_id)
                if request_id not in ledger.running:
                    yield from (ev.RunEnded(request_id, outcome) for outcome in Outcome)
            if request_id not in ledger.unreleased:
                yield ev.LeaseEnded(request_id)
            if request_id not in ledger.encoding:
                yield ev.ImagesEncoded(request_id)
                yield ev.EncodingFailed(request_id, "?")

    # -- the end --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """From now on all goes well: everything is answered, and without models the arena is empty."""
        self._drive_to_quiescence()
        self.world.assert_all_answered()
        assert not self.world.machine.wanted, "an operator's wish was neither granted nor given up"
        assert not self.ledger.retiring
        for name in self.usable():
            self.world.tell(ev.ModelRemoved(name))
        self._drive_to_quiescence()
        self.world.assert_back_to_baseline()

    def _drive_to_quiescence(self) -> None:
        """Within a bounded number of events."""
        limit = self.world.events + 400 + 2 * len(self.ledger.lost)
        while self._one_good_step():
            assert self.world.events < limit, f"no rest: {self.ledger.waiting} {self.world.log[-20:]}"

    def _one_good_step(self) -> bool:
        world, ledger = self.world, self.ledger
        if not ledger.loaders:
            self._new_loader()
        elif ledger.running and not ledger.deck:
            world.tell(ev.RunEnded(min(ledger.running), Outcome.FINISHED))
        elif ledger.deck and not ledger.running:
            world.tell(ev.RunStarted(min(ledger.deck)))
        elif not ledger.is_nothing_under_way:
            self.goes_well(lambda options: options[0])
        elif (at_s := world.machine.next_deadline_s(world.now_s)) is not None:
            assert at_s >= world.now_s
            world.clock.now_s = at_s
            world.tell(ev.Ticked())
        else:
            return False
        return True
