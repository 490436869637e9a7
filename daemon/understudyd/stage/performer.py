"""Taking one request over the stage, on the thread that calls `perform`.

The pipeline is started before the baton is ours: its input checks and tokenizers need no weights. The
first touch of a component is where the thread waits for the baton, binds, and goes on; so from one
request's last operation to the next one's first there is a wake-up and a bind, and nothing else.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from understudyd.core.events import (
    EncodingFailed,
    Event,
    LeaseEnded,
    RunEnded,
    RunStarted,
)
from understudyd.core.types import ErrorCode, Outcome
from understudyd.stage.baton import Turn
from understudyd.stage.device import Device
from understudyd.stage.encode import encode_images
from understudyd.stage.errors import RunCancelled, StageError
from understudyd.stage.run import Run, RunResult, call_arguments, unwatch_steps, watch_steps
from understudyd.stage.views import ResidentBlobs
from understudyd.stage.wrapper import PreparedModel

_log = logging.getLogger(__name__)

_MESSAGE_CHARS = 300


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

    def perform(self, run: Run, find: Callable[[str], PreparedModel]) -> RunResult | None:
        """Run, hand over, encode. Announces everything but `ImagesEncoded`: the result is not stored yet.

        `find` gives the prepared model of a name or raises `StageError`.
        """
        model, images, error = None, None, None
        try:
            model = find(run.model)
            self._local.current = (run, model)
            run.check_cancelled()
            images = self._play_within_memory(run, model)
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
        return self._encode(run, images) if ended.outcome is Outcome.FINISHED else None

    def touch(self) -> None:
        """A stage operation comes: be on stage for it, unless cancelled."""
        current: tuple[Run, PreparedModel] | None = getattr(self._local, "current", None)
        if current is None:
            return
        run, model = current
        run.check_cancelled()
        if not run.is_on_stage:
            self._step_on(run, model)

    def _play_within_memory(self, run: Run, model: PreparedModel) -> Any:
        """Play; once more with an empty cache if the memory for activations runs out."""
        try:
            return self._play(run, model)
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            _log.warning("request %s ran out of memory; trying once more", run.request_id)
        self._free(model)
        run.steps_done = 0
        return self._play(run, model)

    def _play(self, run: Run, model: PreparedModel) -> Any:
        arguments = call_arguments(run.params, model.call_names, model.pipeline_class.__name__)
        if model.rewrites_configs:
            self.touch()
        pipeline, schedulers = model.open_pipeline()
        for scheduler in schedulers:
            watch_steps(scheduler, self.touch, lambda steps: self._step_done(run, steps))
        try:
            images = pipeline(**arguments).images
        finally:
            for scheduler in schedulers:
                unwatch_steps(scheduler)
        self.touch()
        return images

    def _step_done(self, run: Run, steps: int) -> None:
        """Between two steps: the place to give the baton to somebody else for a while."""
        run.steps_done += 1
        self._on_progress(run.request_id, run.steps_done, steps)
        run.check_cancelled()

    def _step_on(self, run: Run, model: PreparedModel) -> None:
        """Take the baton and bind what differs."""
        run.turn.take()
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

    def _step_off(self, run: Run, model: PreparedModel | None, ended: RunEnded) -> None:
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

    def _encode(self, run: Run, images: Any) -> RunResult | None:
        started_at_s = self._clock()
        try:
            encoded, infos = encode_images(self._device.to_host(images), run.params.format)
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

    def _free(self, model: PreparedModel) -> None:
        for part in model.components:
            part.skeleton.restore()
        self._device.free_cache()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
