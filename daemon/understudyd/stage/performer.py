"""Taking requests over the stage, on the thread that calls `perform`.

The pipeline is started before the baton is ours: its input checks and tokenizers need no weights. The
first touch of a component is where the thread waits for the baton, binds, and goes on; so from one
request's last operation to the next one's first there is a wake-up and a bind, and nothing else.

Several requests may share a run: one call of the pipeline for all. If that fails nobody is blamed: they are
played one after the other.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from understudy.trace import BIND, ENCODE, FAILED, Record, Span
from understudyd.core.events import EncodingFailed, Event, ImagesEncoded, LeaseEnded, RunStarted
from understudyd.core.types import ErrorCode
from understudyd.stage.batching import shared_arguments, split
from understudyd.stage.baton import Turn
from understudyd.stage.custom import CustomModel
from understudyd.stage.device import Device
from understudyd.stage.early import EarlyReads, WeightsReadEarly
from understudyd.stage.encode import encode_images
from understudyd.stage.errors import BadRequest, RunCancelled, StageError, without_paths
from understudyd.stage.inputs import check_inputs, decode_inputs
from understudyd.stage.keywords import call_arguments, frames_per_second
from understudyd.stage.pictures import Made, find_made
from understudyd.stage.repertoire import Prepared
from understudyd.stage.run import Member, Run, RunResult, unwatch_steps, watch_steps
from understudyd.stage.views import ResidentBlobs
from understudyd.stage.wrapper import PreparedModel, ServedTask

_log = logging.getLogger(__name__)

_MESSAGE_CHARS = 300

Keep = Callable[[str, RunResult], None]
"""`keep(request_id, result)`; called from the thread that encodes."""


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
        record: Record,
        clock: Callable[[], float],
        give_way: Callable[[], None] = lambda: None,
    ) -> None:
        """`give_way` is called between two operations of a run."""
        self._resident = resident
        self._device = device
        self._announcer = announcer
        self._on_progress = on_progress
        self._record = record
        self._clock = clock
        self._give_way = give_way
        self._local = threading.local()
        self._last_ended_at_s: float | None = None  # written by the holder of the baton

    def perform(self, run: Run, find: Callable[[str], Prepared], keep: Keep) -> None:
        """Run, hand over, encode. Every result is given to `keep` before it is announced.

        `find` gives the prepared model of a name or raises `StageError`.
        """
        model = None
        try:
            model = find(run.model)
            self._local.current = (run, model)
            self._play_all(run, model)
        except RunCancelled:
            pass  # each member knows it
        except StageError as error:
            for member in run.members:
                member.error, member.failed = error, self._explain(run, error)
        self._local.current = None
        self._step_off(run, model)
        for member in run.members:
            self._log_error(run, member)
        for member in run.members:
            if member.made is not None:
                self._encode(run, member, keep)

    def touch(self) -> None:
        """A stage operation comes: be on stage for it, unless cancelled."""
        current: tuple[Run, Prepared] | None = getattr(self._local, "current", None)
        if current is None:
            return
        run, model = current
        self._checkpoint(run)
        if run.is_on_stage:
            self._give_way()
        else:
            self._step_on(run, model)

    def _checkpoint(self, run: Run) -> None:
        """Tell the core at once of those who are cancelled while others go on. Raises `RunCancelled`."""
        run.check_cancelled()
        for member in run.members:
            if member.cancel_code is not None and member.is_open:
                member.has_ended = True
                self._announcer.announce(member.outcome())

    # -- playing ------------------------------------------------------------------------------------

    def _play_all(self, run: Run, model: Prepared) -> None:
        self._checkpoint(run)
        run.playing = tuple(member for member in run.members if not member.has_ended)
        if len(run.playing) > 1 and self._play_together(run, model):
            return
        for member in run.members:
            if run.is_on_stage:
                self._free(model)
            run.playing, run.steps_done = (member,), 0
            self._play_alone(run, model, member)

    def _play_together(self, run: Run, model: Prepared) -> bool:
        """Whether one call served all; if not, that says nothing about any of them."""
        if isinstance(model, CustomModel) or not model.can_batch:
            return False
        try:
            parts = self._play_from_deck(run, model)
        except RunCancelled:
            return True
        except Exception as error:  # noqa: BLE001  the task's boundary, for all together
            if not isinstance(error, BadRequest):
                _log.warning("requests %s run one by one, not together: %s", run.label, _short(error))
        else:
            for member, made in zip(run.playing, parts, strict=True):
                member.made = None if member.has_ended else made
            return True
        return False

    def _play_alone(self, run: Run, model: Prepared, member: Member) -> None:
        try:
            self._checkpoint(run)
            (member.made,) = self._play_within_memory(run, model)
        except RunCancelled:
            pass
        except Exception as error:  # noqa: BLE001  the task's boundary: one request fails, the stage goes on
            member.error, member.failed = error, self._explain(run, error)

    def _play_within_memory(self, run: Run, model: Prepared) -> list[Made]:
        """Play; once more with an empty cache if the memory for activations runs out."""
        try:
            return self._play_from_deck(run, model)
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            _log.warning("request %s ran out of memory; trying once more", run.label)
        self._free(model)
        run.steps_done = 0
        return self._play(run, model)

    def _play_from_deck(self, run: Run, model: Prepared) -> list[Made]:
        """Play; from the start, on stage, if that reads weights before it holds the baton."""
        if run.is_on_stage:
            return self._play(run, model)
        addresses = self._resident.address_range
        unbound = frozenset().union(*(part.skeleton.unbound_addresses for part in model.components))
        try:
            with EarlyReads(lambda address: address in addresses or address in unbound) as early:
                self._local.early = early
                return self._play(run, model)
        except WeightsReadEarly:
            self.touch()
            return self._play(run, model)

    def _play(self, run: Run, model: Prepared) -> list[Made]:
        """One call; what it made for each of `run.playing`."""
        if isinstance(model, CustomModel):
            return [model.play(run, self.touch, lambda done, total: self._told(run, done, total))]
        params = run.params
        task = model.task_for(params.task, [info.name for info, _ in params.inputs])
        arguments = self._arguments(run, model, task)
        fps = frames_per_second(params, task.call)
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
        return [made] if len(run.playing) == 1 else split(made, [m.params.images for m in run.playing])

    def _arguments(self, run: Run, model: PreparedModel, task: ServedTask) -> dict[str, Any]:
        """Made anew for a second try: a pipeline may change what it was given, and moves generators on."""
        params = run.params
        calls = {name: other.call for name, other in model.tasks.items()}
        each = [call_arguments(member.params, task.call, calls) for member in run.playing]
        arguments = each[0]
        if len(each) > 1:
            arguments = shared_arguments(each, [member.params.images for member in run.playing])
        if params.inputs or task.needed_images:
            others = {name: other.images for name, other in model.tasks.items() if other is not task}
            check_inputs(params.inputs, task.call, task.images, task.needed_images, others)
            arguments |= decode_inputs(params.inputs, task.call, run.check_cancelled)
        return arguments

    def _step_done(self, run: Run, steps: int) -> None:
        """Between two steps: the place to give the baton to somebody else for a while."""
        self._told(run, run.steps_done + 1, steps)

    def _told(self, run: Run, done: int, steps: int) -> None:
        run.steps_done = done
        run.note_step(self._clock())
        for member in run.playing:
            if not member.has_ended:
                self._on_progress(member.request_id, done, steps)
        self._checkpoint(run)

    # -- on and off ---------------------------------------------------------------------------------

    def _step_on(self, run: Run, model: Prepared) -> None:
        """Take the baton and bind what differs."""
        while not run.turn.take():
            self._checkpoint(run)
        self._local.early.end()
        self._checkpoint(run)
        bind_started_at_s = self._clock()
        run.components_bound = tuple(part.name for part in model.components if part.bind(self._resident))
        run.is_on_stage = True
        run.previous_ended_at_s = self._last_ended_at_s
        run.first_op_at_s = self._clock()
        run.bind_s = run.first_op_at_s - bind_started_at_s
        for member in run.members:
            if not member.has_ended:
                self._announcer.note(RunStarted(member.request_id))
        run.turn.begin()
        if not run.turn.is_awaited:
            self._announcer.flush()

    def _step_off(self, run: Run, model: Prepared | None) -> None:
        """Hand the baton on, and only when the successor has begun see to everything else."""
        mark, displaced = None, []
        if run.is_on_stage:
            run.ended_at_s = self._last_ended_at_s = self._clock()
            mark = self._device.mark_last_use()
        if run.is_on_stage and model is not None:
            displaced = [part.skeleton.restore() for part in model.components]
        for member in run.members:
            if not member.has_ended:
                self._announcer.note(member.outcome())
        successor: Turn | None = run.turn.leave()
        if successor is not None:
            successor.wait_begun()
        self._announcer.flush()
        if run.is_on_stage:
            self._record_spans(run)
            self._device.wait(mark)
        displaced.clear()  # freed here, off the stage: for a real VAE it takes milliseconds
        for member in run.members:
            self._announcer.announce(LeaseEnded(member.request_id))

    def _record_spans(self, run: Run) -> None:
        self._record(Span(BIND, run.model, run.first_op_at_s - run.bind_s, run.first_op_at_s))
        self._record(run.span())

    def _log_error(self, run: Run, member: Member) -> None:
        """Its traceback holds the frames it went through, and all the pipeline's tensors: let go of it."""
        error, member.error = member.error, None
        if error is not None and member.failed is not None and member.failed[0] is not ErrorCode.BAD_REQUEST:
            _log.error("request %s for %s failed", member.request_id, run.model, exc_info=error)

    def _encode(self, run: Run, member: Member, keep: Keep) -> None:
        started_at_s = self._clock()
        made, member.made = member.made, None
        assert made is not None
        try:
            made = made.on_host(self._device.to_host)
            encoded, infos = encode_images(made, member.params.format, member.params.quality)
        except Exception as error:  # noqa: BLE001  a task's boundary
            _log.exception("encoding the images of request %s failed", member.request_id)
            self._record(Span(ENCODE, run.model, started_at_s, self._clock(), outcome=FAILED))
            self._announcer.announce(EncodingFailed(member.request_id, _short(error)))
            return
        encoded_at_s = self._clock()
        self._record(Span(ENCODE, run.model, started_at_s, encoded_at_s, request=member.request_id))
        result = RunResult(
            images=tuple(encoded),
            infos=tuple(infos),
            timings=run.timings(encoded_at_s),
            components_bound=run.components_bound,
        )
        run.components_bound = ()  # one switch is told once, by the first of those that share it
        keep(member.request_id, result)
        self._announcer.announce(ImagesEncoded(member.request_id))

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
    return without_paths(f"{type(error).__name__}: {error}")[:_MESSAGE_CHARS]
