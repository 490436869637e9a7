"""Loaders and a stage that do as they are told, in the world of `core_kit`."""

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.types import ErrorCode, Outcome

if TYPE_CHECKING:
    from core_kit import World

PAGE = 4096


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
    fold_s: float = 0.5
    unfoldable: Mapping[str, ErrorCode] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._deck: list[str] = []
        self._running: list[str] = []

    def fold(self, world: "World", fold: ac.Fold) -> None:
        about = (fold.overlay, fold.generation)
        if (code := self.unfoldable.get(fold.overlay)) is not None:
            world.later(self.fold_s, ev.FoldFailed(*about, code, "as told"), about)
        else:
            world.later(self.fold_s, ev.FoldFinished(*about), about)

    def cancel_fold(self, world: "World", about: tuple[str, int]) -> None:
        world.forget(about)
        world.later(0.01, ev.FoldCancelled(*about), about)

    def put_on_deck(self, world: "World", request_ids: Iterable[str]) -> None:
        self._deck = list(request_ids)
        self._go(world)

    def _go(self, world: "World") -> None:
        if not self._running and self._deck:
            self._running, self._deck = self._deck, []
            self.ran += self._running
            for request_id in self._running:
                world.later(0.0, ev.RunStarted(request_id), request_id)
                outcome = Outcome.FAILED if (code := self.faults.get(request_id)) else Outcome.FINISHED
                world.later(self.run_s, ev.RunEnded(request_id, outcome, code), request_id)

    def cancel(self, world: "World", request_id: str) -> None:
        if request_id in self._deck:
            self._deck.remove(request_id)
            world.later(0.0, ev.RunEnded(request_id, Outcome.CANCELLED))
        elif request_id in self._running and request_id in world.ledger.running:
            world.forget(request_id)
            world.later(0.1, ev.RunEnded(request_id, Outcome.CANCELLED), request_id)

    def ended(self, world: "World", event: ev.RunEnded) -> None:
        world.later(self.lease_lag_s, ev.LeaseEnded(event.request_id))
        if event.outcome is Outcome.FINISHED:
            world.later(self.encode_s, ev.ImagesEncoded(event.request_id))
        if event.request_id in self._running:
            self._running.remove(event.request_id)
            self._go(world)
