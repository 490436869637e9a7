"""A daemon without its machinery: the core machine, driven through virtual time.

What the shell, the stage and the loaders do in the daemon happens here at the times that a profile gives: one
event ends each action. As in the daemon, one request runs (or those that share a run do), the next one is on
deck and takes the stage over without asking; images are encoded off the stage; loads share disk and bus.
"""

import heapq
from collections.abc import Callable, Iterable
from time import thread_time_ns
from typing import assert_never

from understudyd.core import actions as ac
from understudyd.core import events as ev
from understudyd.core.machine import Machine
from understudyd.core.types import Outcome, RequestInfo
from understudyd.recorded import TraceRequest, derived_name, loras_of, work_of
from understudyd.simulate.meter import Meter, Quantiles
from understudyd.simulate.profiles import Profile
from understudyd.simulate.traffic import Traffic

START_BEFORE_S = 3600.0
"""The daemon is started so long before the first request: its host pool has filled, as far as it will."""

_STEP_BYTES = 4 << 20  # a cancelled load stops within a piece of this size
_FOLD_STEP_S = 0.001  # a cancelled fold stops after one weight

Watch = Callable[[float, ac.Action], None]


class _Open:
    """A request without an answer."""

    __slots__ = ("arrived_at_s", "images", "run_s")

    def __init__(self, arrived_at_s: float, run_s: float, images: int) -> None:
        self.arrived_at_s = arrived_at_s
        self.run_s = run_s
        self.images = images


class World:
    """Plays requests to a machine. `watch`, if given, sees every action in order with its time.

    Every model allows `max_batch` images a run; requests share runs that are for the same task, adapters and
    steps. `decision_us` are microseconds of CPU time of `Machine.handle`, one an event.
    """

    def __init__(
        self,
        machine: Machine,
        profile: Profile,
        *,
        loaders: int = 2,
        max_batch: int = 1,
        watch: Watch | None = None,
    ) -> None:
        self.machine = machine
        self.meter = Meter()
        self.decision_us = Quantiles(least=0.01)
        self.events = 0
        self.loads = 0
        self.folds = 0
        self.loaded_bytes = 0
        self.now_s = 0.0
        self._profile = profile
        self._watch = watch
        self._traffic = Traffic(profile)
        self._agenda: list[tuple[float, int, ev.Event]] = []
        self._order = 0
        self._open: dict[str, _Open] = {}
        self._max_batch = max_batch
        self._deck: tuple[tuple[str, ...], str] | None = None
        self._running: tuple[str, ...] = ()
        self._run_s = 0.0
        self.runs = 0
        self._on_stage: str | None = None
        self._asked = 0
        for loader_id in range(loaders):
            self.tell(ev.LoaderReady(loader_id))

    # -- driving ------------------------------------------------------------------------------------

    def add_models(self, names: Iterable[str]) -> None:
        """Models that may be asked for."""
        for name in names:
            self.tell(ev.ModelAdded(self._profile.model(name, self._max_batch)))

    def settle(self, for_s: float) -> None:
        """Let time pass without requests."""
        until_s = self.now_s + for_s
        while self._step(until_s):
            pass
        self.now_s = until_s

    def play(self, requests: Iterable[TraceRequest]) -> None:
        """Have all these come at their `arrival_s`, which counts from now; return when all are answered.

        Raises RuntimeError when the machine leaves some without an answer.
        """
        start_s = self.now_s
        for request in requests:
            arrival_s = start_s + request.arrival_s
            while self._step(arrival_s):
                pass
            self.now_s = arrival_s
            self._ask(request)
        while self._open and self._step(float("inf")):
            pass
        if self._open:
            raise RuntimeError(f"{len(self._open)} requests were never answered")

    def tell(self, event: ev.Event) -> None:
        """One event; then everything that the machine wants done."""
        started_ns = thread_time_ns()
        actions = self.machine.handle(event, self.now_s)
        self.decision_us.add((thread_time_ns() - started_ns) / 1e3)
        self.events += 1
        for action in actions:
            if self._watch is not None:
                self._watch(self.now_s, action)
            self._perform(action)

    def _step(self, until_s: float) -> bool:
        """What comes next, if it comes before `until_s`."""
        planned_s = self._agenda[0][0] if self._agenda else float("inf")
        loaded_s = self._traffic.next_end_s
        next_s = planned_s if planned_s <= loaded_s else loaded_s
        if next_s > self.now_s:  # else the machine is asked when this moment is over, as by the daemon's loop
            wake_s = self.machine.next_deadline_s(self.now_s)
            if wake_s is not None and wake_s < next_s:
                if wake_s > until_s:
                    return False
                self.now_s = wake_s
                self.tell(ev.Ticked())
                return True
        if next_s > until_s or next_s == float("inf"):
            return False
        self.now_s = next_s
        if planned_s <= loaded_s:
            self._happen(heapq.heappop(self._agenda)[2])
        else:
            self._later(self._profile.load_s.value, ev.LoadFinished(self._traffic.pop_ended()))
        return True

    def _later(self, after_s: float, event: ev.Event) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (self.now_s + after_s, self._order, event))

    # -- requests and the stage ---------------------------------------------------------------------

    def _model(self, request: TraceRequest) -> str:
        """The model's name for the core, which knows it from now on."""
        if not request.loras:
            return request.model
        adapters = loras_of(request.loras)
        name = derived_name(request.model, adapters)
        if name not in self.machine.residency.models:
            self.tell(ev.ModelAdded(self._profile.derived(request.model, adapters, self._max_batch)))
        return name

    def _ask(self, request: TraceRequest) -> None:
        self._asked += 1
        request_id = f"r{self._asked}"
        self._open[request_id] = _Open(self.now_s, self._profile.run_s(request), request.images)
        self.meter.arrived(self.now_s)
        info = RequestInfo(
            request_id,
            request.client,
            self._model(request),
            request.priority,
            batch_key=f"{request.task}/{request.loras}/{request.steps}",
            images=request.images,
            cost=work_of(request.images, request.steps),
        )
        self.tell(ev.RequestReceived(info))

    def _happen(self, event: ev.Event) -> None:
        if not isinstance(event, ev.RunEnded):
            self.tell(event)
            return
        is_last = event.request_id == self._running[-1]
        if is_last:
            self._leave_stage()
        self.tell(event)
        if is_last:
            self._take_stage()

    def _take_stage(self) -> None:
        """Whoever is on deck runs, if the stage is free."""
        if self._running or self._deck is None:
            return
        (self._running, model), self._deck = self._deck, None
        self.runs += 1
        members = [self._open[request_id] for request_id in self._running]
        is_switch = model != self._on_stage
        bind_s = self._profile.bind_s.value if is_switch else 0.0
        self._on_stage = model
        self._run_s = self._profile.shared_run_s([m.run_s for m in members], sum(m.images for m in members))
        first, *others = members
        self.meter.started(first.arrived_at_s, is_switch, self.now_s + bind_s)
        for other in others:
            self.meter.joined(other.arrived_at_s, self.now_s + bind_s)
        for request_id in self._running:
            self._later(bind_s, ev.RunStarted(request_id))
        for request_id in self._running:
            self._later(bind_s + self._run_s, ev.RunEnded(request_id, Outcome.FINISHED))

    def _leave_stage(self) -> None:
        """Pictures are encoded one after the other."""
        members, self._running = self._running, ()
        self.meter.ended(self._run_s, self.now_s, len(members))
        encoded_s = 0.0
        for request_id in members:
            self._later(0.0, ev.LeaseEnded(request_id))
            encoded_s += self._profile.encode_s.value * self._open[request_id].images
            self._later(encoded_s, ev.ImagesEncoded(request_id))

    # -- actions ------------------------------------------------------------------------------------

    def _perform(self, action: ac.Action) -> None:
        match action:
            case ac.PutOnDeck(request_id=request_id, model=model, companions=companions):
                self._deck = ((request_id, *companions), model)
                self._take_stage()
            case ac.AnswerRequest(request_id=request_id, code=code):
                del self._open[request_id]
                if code is not None:
                    self.meter.gave_up(self.now_s)
            case ac.StartLoad():
                self.loads += 1
                self.loaded_bytes += action.size_bytes
                self._traffic.start(
                    action.load_id,
                    action.size_bytes,
                    on_disk=not action.from_pool,
                    on_bus=action.offset is not None,
                    now_s=self.now_s,
                )
            case ac.CancelLoad(load_id=load_id):
                if self._traffic.cancel(load_id, self.now_s):
                    piece_s = _STEP_BYTES / self._profile.disk_bytes_per_s.value
                    self._later(piece_s, ev.LoadCancelled(load_id))
            case ac.Fold(overlay=key, generation=generation, size_bytes=size_bytes, sources=sources):
                self.folds += 1
                fold_s = self._profile.fold_s(size_bytes, len(sources) - 1)
                self._later(fold_s, ev.FoldFinished(key, generation))
            case ac.CancelFold(overlay=key, generation=generation):
                self._stop_fold(key, generation)
            case ac.BuildViews(blob=key, generation=generation):
                self._later(self._profile.views_s.value, ev.ViewsBuilt(key, generation))
            case ac.PrepareModel(which):
                self._later(self._profile.prepare_s.value, ev.ModelPrepared(which))
            case ac.MoveExtent(blob=key, generation=generation, size_bytes=size_bytes):
                move_s = size_bytes / self._profile.move_bytes_per_s.value
                self._later(move_s, ev.ExtentMoved(key, generation))
            case ac.PauseLoads(is_paused=is_paused):
                self._traffic.pause(is_paused, self.now_s)
            case ac.AcceptRequest() | ac.DropViews() | ac.ForgetModel() | ac.RetireModel():
                pass  # takes no time
            case ac.AdoptEdition() | ac.RejectEdition() | ac.RetireEdition():
                raise AssertionError("traces replace no models")
            case ac.CancelRun(request_id=request_id):
                raise AssertionError(f"{request_id}: traces know neither cancellations nor deadlines")
            case _:
                assert_never(action)

    def _stop_fold(self, key: str, generation: int) -> None:
        """Between two steps, each of which is short."""
        finished = ev.FoldFinished(key, generation)
        entry = next((entry for entry in self._agenda if entry[2] == finished), None)
        if entry is not None:
            self._agenda.remove(entry)
            heapq.heapify(self._agenda)
            self._later(_FOLD_STEP_S, ev.FoldCancelled(key, generation))
