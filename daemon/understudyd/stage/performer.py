"""Taking one request over the stage, on the thread that calls `perform`.

The pipeline is started before the baton is ours: its input checks and tokenizers need no weights. The
first touch of a component is where the thread waits for the baton, binds, and goes on; so from one
request's last operation to the next one's first there is a wake-up and a bind, and nothing else.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

from understudyd.core.events import (
    EncodingFailed,
    Event,
    LeaseEnded,
    RunEnded,
    RunStarted,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage.baton import Turn
from understudyd.stage.custom import CustomModel
from understudyd.stage.device import Device
from understudyd.stage.early import EarlyReads, WeightsReadEarly
from understudyd.stage.encode import encode_images
from understudyd.stage.errors import RunCancelled, StageError
from understudyd.stage.inputs import check_inputs, decode_inputs
from understudyd.stage.keywords import call_arguments, frames_per_second
from understudyd.stage.pictures import Made, find_made
from understudyd.stage.run import Run, RunResult, unwatch_steps, watch_steps
from understudyd.stage.views import ResidentBlobs
from understudyd.stage.wrapper import PreparedModel

_log = logging.getLogger(__name__)

_MESSAGE_CHARS = 300

Prepared = PreparedModel | CustomModel


class Announcer:
    """Emits events in the order they happened, at a moment when it costs the stage nothing."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()

    def note(self, event: Event) -> None:
        """It happened now; somebody will `flush` soon."""
        self._events.append(event)

    def flush(self) -> None:
        """Emit what was noted."""
        with self._lock:
            while self._events:
                self._emit(self._events.popleft())

    def announce(self, event: Event) -> None:
        """Note and flush."""
        self.note(event)
        self.flush()


class Performer:
    """Shared by the worker threads. `touch` is what every skeleton calls before it computes."""

    def __init__(
        self,
        resident: ResidentBlobs,
        device: Device,
        announcer: Announcer,
        on_progress: Callable[[str, int, int], None],
        record: Callable[[str, str, float, float], None],
        clock: Callable[[], float],
    ) -> None:
        self._resident = resident
        self._device = device
        self._announcer = announcer
        self._on_progress = on_progress
        self._record = record
        self._clock = clock
        self._local = threading.local()
        self._last_ended_at_s: float | None = None  # written by the holder of the baton

    def perform(self, run: Run, find: Callable[[str], Prepared]) -> RunResult | None:
        """Run, hand over, encode. Announces everything but `ImagesEncoded`: the result is not stored yet.

        `find` gives the prepared model of a name or raises `StageError`.
        """
        model, made, error = None, None, None
        try:
            model = find(run.model)
            self._local.current = (run, model)
            run.check_cancelled()
            made = self._play_within_memory(run, model)
            ended = RunEnded(run.request_id, Outcome.FINISHED)
        except RunCancelled:
            ended = RunEnded(run.request_id, Outcome.CANCELLED, run.cancel_code, "cancelled")
        except Exception as caught:  # noqa: BLE001  the task's boundary: one request fails, the stage goes on
            error = caught
            ended = RunEnded(run.request_id, Outcome.FAILED, *self._explain(run, caught))
        self._local.current = None
        self._step_off(run, model, ended)
        if error is not None and ended.code is not ErrorCode.BAD_REQUEST:
            _log.error("request %s for %s failed", run.request_id, run.model, exc_info=error)
        error = None  # its traceback holds this frame, and all the pipeline's tensors
        return None if made is None else self._encode(run, made)

    def touch(self) -> None:
        """A stage operation comes: be on stage for it, unless cancelled."""
        current: tuple[Run, Prepared] | None = getattr(self._local, "current", None)
        if current is None:
            return
        run, model = current
        run.check_cancelled()
        if not run.is_on_stage:
            self._step_on(run, model)

    def _play_within_memory(self, run: Run, model: Prepared) -> Made:
        """Play; once more with an empty cache if the memory for activations runs out."""
        try:
            return self._play_from_deck(run, model)
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            _log.warning("request %s ran out of memory; trying once more", run.request_id)
        self._free(model)
        run.steps_done = 0
        return self._play(run, model)

    def _play_from_deck(self, run: Run, model: Prepared) -> Made:
        """Play; from the start, on stage, if that reads weights before it holds the baton."""
        addresses = self._resident.address_range
        unbound = frozenset().union(*(part.skeleton.unbound_addresses for part in model.components))
        try:
            with EarlyReads(lambda address: address in addresses or address in unbound) as early:
                self._local.early = early
                return self._play(run, model)
        except WeightsReadEarly:
            self.touch()
            return self._play(run, model)

    def _play(self, run: Run, model: Prepared) -> Made:
        if isinstance(model, CustomModel):
            return model.play(run, self.touch, lambda done, total: self._told(run, done, total))
        params = run.params
        task = model.task_for(params.task, [info.name for info, _ in params.inputs])
        # Made anew for a second try: a generator has moved on, and a pipeline may change what it was given.
        calls = {name: other.call for name, other in model.tasks.items()}
        arguments = call_arguments(params, task.call, calls)
        fps = frames_per_second(params, task.call)
        if params.inputs or task.needed_images:
            others = {name: other.images for name, other in model.tasks.items() if other is not task}
            check_inputs(params.inputs, task.call, task.images, task.needed_images, others)
            arguments |= decode_inputs(params.inputs, task.call, run.check_cancelled)
        if task.rewrites_configs:
            self.touch()
        pipeline, schedulers = model.open_pipeline(task, params.scheduler)
        for scheduler in schedulers:
            watch_steps(scheduler, self.touch, lambda steps: self._step_done(run, steps))
        try:
            made = find_made(pipeline(**arguments), fps)
        finally:
            for scheduler in schedulers:
                unwatch_steps(scheduler)
        self.touch()
        return made

    def _step_done(self, run: Run, steps: int) -> None:
        """Between two steps: the place to give the baton to somebody else for a while."""
        self._told(run, run.steps_done + 1, steps)

    def _told(self, run: Run, done: int, steps: int) -> None:
        run.steps_done = done
        self._on_progress(run.request_id, done, steps)
        run.check_cancelled()

    def _step_on(self, run: Run, model: Prepared) -> None:
        """Take the baton and bind what differs."""
        run.turn.take()
        self._local.early.end()
        run.check_cancelled()
        bind_started_at_s = self._clock()
        resident = self._resident
        run.components_bound = tuple(
            part.name
            for part in model.components
            if part.skeleton.bind(resident.views(part.blob, part.skeleton.signature))
        )
        run.is_on_stage = True
        run.previous_ended_at_s = self._last_ended_at_s
        run.first_op_at_s = self._clock()
        run.bind_s = run.first_op_at_s - bind_started_at_s
        self._announcer.note(RunStarted(run.request_id))
        run.turn.begin()
        if not run.turn.is_awaited:
            self._announcer.flush()

    def _step_off(self, run: Run, model: Prepared | None, ended: RunEnded) -> None:
        """Hand the baton on, and only when the successor has begun see to everything else."""
        mark, displaced = None, []
        if run.is_on_stage:
            run.ended_at_s = self._last_ended_at_s = self._clock()
            mark = self._device.mark_last_use()
        if run.is_on_stage and model is not None:
            displaced = [part.skeleton.restore() for part in model.components]
        self._announcer.note(ended)
        successor: Turn | None = run.turn.leave()
        if successor is not None:
            successor.wait_begun()
        self._announcer.flush()
        if run.is_on_stage:
            self._record_spans(run)
            self._device.wait(mark)
        displaced.clear()  # freed here, off the stage: for a real VAE it takes milliseconds
        self._announcer.announce(LeaseEnded(run.request_id))

    def _record_spans(self, run: Run) -> None:
        self._record("bind", run.model, run.first_op_at_s - run.bind_s, run.first_op_at_s)
        self._record("stage", run.model, run.first_op_at_s, run.ended_at_s)

    def _encode(self, run: Run, made: Made) -> RunResult | None:
        started_at_s = self._clock()
        try:
            made = made.on_host(self._device.to_host)
            encoded, infos = encode_images(made, run.params.format, run.params.quality)
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("encoding the images of request %s failed", run.request_id)
            self._announcer.announce(EncodingFailed(run.request_id, _short(error)))
            return None
        encoded_at_s = self._clock()
        self._record("encode", run.model, started_at_s, encoded_at_s)
        return RunResult(
            images=tuple(encoded),
            infos=tuple(infos),
            timings=run.timings(encoded_at_s),
            components_bound=run.components_bound,
        )

    def _explain(self, run: Run, error: Exception) -> tuple[ErrorCode, str]:
        if isinstance(error, StageError):
            return error.code, str(error)[:_MESSAGE_CHARS]
        if self._device.is_out_of_memory(error):
            return (
                ErrorCode.OUT_OF_MEMORY,
                "no memory for so large an image now; ask for a smaller one, or fewer",
            )
        # Pipelines check their inputs before they denoise; later the same types are bugs, not bad input.
        if isinstance(error, ValueError | TypeError) and run.steps_done == 0:
            return ErrorCode.BAD_REQUEST, str(error)[:_MESSAGE_CHARS]
        return ErrorCode.INTERNAL, _short(error)

    def _free(self, model: Prepared) -> None:
        for part in model.components:
            part.skeleton.restore()
        self._device.free_cache()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
