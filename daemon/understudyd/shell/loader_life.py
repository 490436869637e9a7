"""What the loader pool knows of its slots and of the loaders in them."""

import asyncio
from dataclasses import dataclass, field

from understudyd.shell.loader_end import LoaderEnd
from understudyd.shell.loading import LoaderSettings, LoaderState, LoaderStatus, LoadTask

_FOREVER = float("inf")


@dataclass(slots=True)
class Loader:
    """One process or thread. Moments are None while what they name is not so.

    `asked_at_s`: since when it owes an answer of its start. `progressed_at_s`: when its load was last seen
    to get on, or did not have to. One that `is_on_notice` is given up unless something changes at once.
    """

    loader_id: int
    slot: "Slot"
    end: LoaderEnd
    spawned_at_s: float
    gone: "asyncio.Future[None]"
    asked_at_s: float | None = None
    heard_at_s: float | None = None
    progressed_at_s: float = 0.0
    is_attached: bool = False
    is_ready: bool = False
    is_lost: bool = False
    is_on_notice: bool = False
    bytes_done: int = 0
    tasks: dict[int, LoadTask] = field(default_factory=dict)
    watch: asyncio.TimerHandle | None = None

    def patience(self, settings: LoaderSettings, is_paused: bool) -> tuple[float, str]:
        """When to give it up unless something changes, and what to say of it then."""
        late = _FOREVER if self.asked_at_s is None else self.asked_at_s + settings.start_timeout_s
        silent = _FOREVER if self.heard_at_s is None else self.heard_at_s + settings.dead_after_s
        is_at_work = bool(self.tasks) and not is_paused
        stalled = self.progressed_at_s + settings.stalled_after_s if is_at_work else _FOREVER
        return min((late, "does not come up"), (silent, "is silent"), (stalled, "makes no progress"))

    def beats(self, load_id: int | None, bytes_done: int, now_s: float) -> None:
        """A heartbeat says how far the load in hand is."""
        bytes_done = bytes_done if load_id in self.tasks else 0
        if bytes_done != self.bytes_done:
            self.bytes_done, self.progressed_at_s = bytes_done, now_s

    @property
    def state(self) -> LoaderState:
        """See `LoaderState`."""
        if self.is_lost:
            return LoaderState.LOST
        if not self.is_ready:
            return LoaderState.STARTING
        return LoaderState.LOADING if self.tasks else LoaderState.IDLE


@dataclass(slots=True)
class Slot:
    """A place in the pool and its record over all the loaders that had it."""

    number: int
    loader: Loader | None = None
    respawn: asyncio.TimerHandle | None = None
    quick_deaths: int = 0
    restarts: int = 0
    loads_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    last_loss: str = ""

    def loaded(self, size_bytes: int, seconds: float) -> None:
        """A load is done."""
        self.loads_done += 1
        self.bytes_total += size_bytes
        self.rate_bytes_per_s = size_bytes / max(seconds, 1e-9)

    def died(self, reason: str, lived_s: float, settings: LoaderSettings) -> float:
        """The slot's loader is lost; seconds until the next one is due.

        At once the first time, then with growing pauses while loaders keep dying young.
        """
        self.last_loss = reason
        self.restarts += 1
        self.quick_deaths = self.quick_deaths + 1 if lived_s < settings.stable_after_s else 0
        doublings = self.quick_deaths - 2
        pause_s = 0.0 if doublings < 0 else settings.respawn_delay_s * 2 ** min(doublings, 16)
        return min(pause_s, settings.respawn_delay_max_s)

    def status(self) -> LoaderStatus:
        """For people."""
        loader = self.loader
        task = None if loader is None else next(iter(loader.tasks.values()), None)
        return LoaderStatus(
            loader_id=-1 if loader is None else loader.loader_id,
            slot=self.number,
            pid=0 if loader is None else loader.end.pid,
            state=LoaderState.LOST if loader is None else loader.state,
            load=None if task is None else task.name,
            route=None if task is None else task.route,
            bytes_done=0 if loader is None else loader.bytes_done,
            size_bytes=0 if task is None else task.size_bytes,
            loads_done=self.loads_done,
            bytes_total=self.bytes_total,
            restarts=self.restarts,
            rate_bytes_per_s=self.rate_bytes_per_s,
            last_loss=self.last_loss,
        )
